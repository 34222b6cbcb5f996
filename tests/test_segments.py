"""Parts of a file as clips of their own: their pixels to the bit, their ids, what is refused."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from odd_videos import still, video
from test_video_source import BUCKET, STAGE
from videos_fixture import level_video

from elastic.data import decode as decode_module
from elastic.data.assign import Members, assign, load_members
from elastic.data.clips import SCHEMA, Clip, Clips, read_parts, sample_id, write_parts
from elastic.data.decode import BadVideo, _cover, _rgb, decode_clip, frame_time, to_unit
from elastic.data.decoders import Decoders
from elastic.data.encode import Part, decode_ahead
from elastic.data.moving_shapes import turn_mp4
from elastic.data.probe import Probe, probe
from elastic.data.probes import Probed, probe_all
from elastic.data.segment import SECOND, WHOLE, Segment
from elastic.data.sources import VideoSource
from elastic.data.table import read_table, read_tables
from elastic.errors import InputError
from models import DCAE
from stages import Mix, Videos

NUM = 72
NTSC = Fraction(1001, 30000)


def _blocks() -> NDArray[np.uint8]:
    """Frames of 64 x 96 of which each keeps most of the one before, and none is like another."""
    rng = np.random.default_rng(0)
    small_HWC = rng.integers(30, 220, (8, 12, 3))
    frames = []
    for k in range(NUM):
        small_HWC = small_HWC.copy()
        small_HWC[k % 8] = rng.integers(30, 220, (12, 3))
        small_HWC[:, k % 12] = 20 + 3 * k
        frames.append(np.kron(small_HWC, np.ones((8, 8, 1))).astype(np.uint8))
    return np.stack(frames)


def _film(codec: str, form: str, tick: Fraction = Fraction(1, 8), **more: Any) -> bytes:
    return video(codec, form, x_THWC=_blocks(), tick=tick, **more)


def _x264(params: str) -> dict[str, Any]:
    return {"options": {"preset": "medium", "x264-params": params}}


def _vfr() -> bytes:
    ticks = [125 * k + (k * 37) % 90 for k in range(NUM)]
    return _film("libx264", "matroska", Fraction(1, 1000), ticks=ticks,
                 **_x264("keyint=12:bframes=3"))  # fmt: skip


_B = _x264("keyint=24:bframes=3:b-pyramid=normal:scenecut=0")
_X265 = {"options": {"x265-params": "log-level=none:pools=1:keyint=12:bframes=4:open-gop=1"}}
FILMS: dict[str, Callable[[], bytes]] = {
    "b-frames.mp4": lambda: _film("libx264", "mp4", **_B),
    "one-gop.mp4": lambda: _film("libx264", "mp4", **_x264("keyint=infinite:bframes=3")),
    "open-gop.mkv": lambda: _film("libx264", "matroska",
                                  **_x264("open-gop=1:keyint=12:bframes=3:scenecut=0")),
    "open-gop.mp4": lambda: _film("libx264", "mp4",
                                  **_x264("open-gop=1:keyint=12:bframes=3:scenecut=0")),
    "refreshed.mkv": lambda: _film("libx264", "matroska", **_x264("intra-refresh=1:keyint=12")),
    "refreshed.mp4": lambda: _film("libx264", "mp4", **_x264("intra-refresh=1:keyint=12")),
    "ntsc.mov": lambda: _film("libx264", "mov", NTSC, **_B),
    "slow.mp4": lambda: _film("libx264", "mp4", Fraction(2), **_B),
    "turned.mp4": lambda: turn_mp4(_film("libx264", "mp4", **_B)),
    "hevc.mp4": lambda: _film("libx265", "mp4", **_X265),
    "hevc.mkv": lambda: _film("libx265", "matroska", **_X265),
    "av1.mp4": lambda: _film("libsvtav1", "mp4", options={"svtav1-params": "lp=1:keyint=12"}),
    "vp9.webm": lambda: _film("libvpx-vp9", "webm", options={"g": "12"}),
    "uneven.mkv": _vfr,
    "mpeg2.mkv": lambda: _film("mpeg2video", "matroska", options={"g": "12", "bf": "2"}),
    "mpeg2.ts": lambda: _film("mpeg2video", "mpegts", options={"g": "12", "bf": "2"}),
    "mpeg4.avi": lambda: _film("mpeg4", "avi", options={"g": "12"}),
    "mpeg4.mov": lambda: _film("mpeg4", "mov", options={"g": "12", "bf": "2"}),
    "alpha.mov": lambda: _film("qtrle", "mov", pix_fmt="argb", options={"g": "12"}),
    "small.gif": lambda: _film("gif", "gif", pix_fmt="rgb8"),
}  # fmt: skip


def _expected(path: Path, frames: int, rate: Fraction, segment: Segment) -> torch.Tensor:
    """By decoding all of the file; raises IndexError where the segment is too short."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = list(container.decode(stream))
        length = 1 / (stream.average_rate or 1)
        times = [frame_time(frame) for frame in shown]
        last = shown[-1]
        ends = times[-1] + (last.duration * last.time_base if last.duration else length)
        start = times[0] + segment.start
        end = ends if segment.length is None else min(ends, start + segment.length)
        inside = [(t, f) for t, f in zip(times, shown, strict=True) if start <= t < end]
        pictures = []
        for k in range(frames):
            at = start + k / rate
            if at >= end:
                raise IndexError
            before = [f for t, f in inside if t <= at]
            frame = before[-1] if before else inside[0][1]
            converter = decode_module.VideoReformatter()
            x_HWC = _rgb(frame, converter)
            pictures.append(_cover(x_HWC, Fraction(1), frame.rotation, 64, 96))
    return torch.stack(pictures, dim=1)


def _us(seconds: Fraction | float) -> int:
    return round(Fraction(seconds) * SECOND)


@pytest.mark.parametrize("name", FILMS)
def test_a_segment_has_the_pixels_that_the_whole_file_has_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILMS[name]())
    known = probe(str(path))
    assert known.frames == NUM
    step = Fraction(known.duration_s).limit_denominator(10**6) / NUM
    rng = np.random.default_rng(len(name))
    # At a frame, just after one, between two, at the very end; close to and far from the start.
    starts = [k * step for k in (1, 11, 12, 13, 23, 25, 40, 71)]
    starts += [starts[4] + Fraction(1, SECOND), *(k * step + step / 3 for k in (5, 36, 60))]
    seen = 0
    for start in starts:
        rate = 1 / step * int(rng.integers(1, 5)) / 2
        frames = int(rng.integers(1, 7))
        end = None if rng.random() < 0.4 else _us(start + step * int(rng.integers(1, 9)))
        segment = Segment(_us(start), end)
        try:
            wanted = _expected(path, frames, rate, segment)
        except IndexError:
            with pytest.raises(BadVideo, match=r"too short from|has no frame from"):
                decode_clip(str(path), frames, rate, 64, 96, segment)
            continue
        assert torch.equal(decode_clip(str(path), frames, rate, 64, 96, segment), wanted), segment
        seen += 1
    assert seen >= 4


def test_a_segment_shows_the_levels_of_its_frames_and_none_of_before_or_beyond(
    tmp_path: Path,
) -> None:
    path, levels = str(tmp_path / "v.mp4"), [20 + 4 * k for k in range(50)]
    level_video(Path(path), levels, list(range(50)), Fraction(1, 10))

    def shown(frames: int, rate: float, start: float, end: float | None) -> list[int]:
        segment = Segment(_us(start), None if end is None else _us(end))
        x_CTHW = decode_clip(path, frames, rate, 32, 48, segment)
        means = x_CTHW.float().mean(dim=(0, 2, 3))
        return [round((v - 20) / 4) for v in means.tolist()]

    assert shown(4, 10, 0.7, None) == [7, 8, 9, 10], "seven tenths are not a little less"
    assert shown(4, 10, 0.69, None) == [7, 7, 8, 9], "the sixth began before the start"
    assert shown(3, 5, 2.0, 2.5) == [20, 22, 24]
    assert shown(5, 10, 2.0, 2.5) == [20, 21, 22, 23, 24]
    with pytest.raises(BadVideo, match=r"too short from 2 s to 2\.5 s: 0\.50 s, 6 frames"):
        shown(6, 10, 2.0, 2.5)
    with pytest.raises(BadVideo, match=r"has no frame from 2\.01 s to 2\.09 s"):
        shown(1, 10, 2.01, 2.09)
    assert torch.equal(decode_clip(path, 9, 10, 32, 48, WHOLE), decode_clip(path, 9, 10, 32, 48))


@pytest.mark.parametrize("name", ["b-frames.mp4", "open-gop.mkv", "vp9.webm", "hevc.mp4"])
def test_what_comes_long_before_a_segment_is_not_decoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(FILMS[name]())
    monkeypatch.setattr(decode_module, "MAX_FRAMES", 40)
    segment = Segment(60 * SECOND // 8)
    decode_clip(str(path), 2, 8, 64, 96, segment)
    monkeypatch.setattr(decode_module, "packets_before", lambda *_: None)
    with pytest.raises(BadVideo, match="more than 40 frames"):
        decode_clip(str(path), 2, 8, 64, 96, segment)


moments = st.integers(0, 40).map(lambda k: k * SECOND // 60) | st.integers(0, SECOND)


@settings(max_examples=30, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 12), min_size=2, max_size=9),
    start=moments, lasts=st.none() | moments.filter(bool), frames=st.integers(1, 9),
    rate=st.sampled_from([Fraction(8), Fraction(60), Fraction(30000, 1001), Fraction(7, 3)]),
)  # fmt: skip
def test_whether_a_segment_fills_a_bucket_is_known_before_it_is_decoded(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], start: int, lasts: int | None,
    frames: int, rate: Fraction,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("v") / "v.mp4"
    ticks = [0, *np.cumsum(gaps).tolist()]
    level_video(path, [20 + 16 * k for k in range(len(ticks))], ticks, Fraction(1, 60))
    end = None if lasts is None else start + lasts
    clip = Clip(1, str(path), "", False, start, end)
    probed = Probed.of([clip], {1: probe(str(path))})
    if not probed.is_good[0]:
        assert start / SECOND >= probe(str(path)).duration_s
        assert str(probed.at(0)).startswith("starts at ")
    fits = probed.is_good[0] and probed.can_fill(frames, rate)[0]
    reason = ""
    try:
        decode_clip(str(path), frames, rate, 32, 48, clip.segment)
    except BadVideo as error:
        reason = error.reason
    assert fits == (not reason) or "has no frame" in reason


def _write(folder: Path, text: str) -> Videos:
    (folder / "t.csv").write_text(text)
    return Videos(str(folder / "t.csv"))


def test_csv_and_parquet_give_the_same_segments_and_each_is_a_clip(tmp_path: Path) -> None:
    rows = "path,text,start,end\na.mp4,x,,\na.mp4,y,0,2.5\na.mp4,z,2.5,\nb.mp4,w,0.7,1e1\n"
    clips = read_table(_write(tmp_path, rows))
    wanted = [WHOLE, Segment(0, 2_500_000), Segment(2_500_000), Segment(700_000, 10_000_000)]
    assert [clip.segment for clip in clips] == wanted
    assert len(set(clips.ids().tolist())) == 4
    columns = {
        "path": ["a.mp4", "a.mp4", "a.mp4", "b.mp4"], "text": list("xyzw"),
        "start": [None, 0.0, 2.5, 0.7], "end": [None, 2.5, None, 10.0],
    }  # fmt: skip
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert read_table(Videos(f"{tmp_path}/t.parquet")) == clips
    whole = pa.table({"path": ["a.mp4"], "text": ["x"], "start": pa.array([3], pa.int32())})
    pyarrow.parquet.write_table(whole, tmp_path / "t.parquet")
    (clip,) = read_table(Videos(f"{tmp_path}/t.parquet"))
    assert clip.segment == Segment(3 * SECOND)


def test_rows_without_a_segment_have_the_ids_that_they_had(tmp_path: Path) -> None:
    """A run that goes on with other ids would take every clip for a new one."""
    plain = read_table(_write(tmp_path, "path,text\na.mp4,x\nb.mp4,y\n"))
    empty = read_table(_write(tmp_path, "path,text,start,end\na.mp4,x,,\nb.mp4,y,0,\n"))
    assert plain == empty
    digest = hashlib.blake2b(b"a.mp4", digest_size=8).digest()
    assert plain[0] == Clip(int.from_bytes(digest, "big") >> 1, f"{tmp_path}/a.mp4", "x", False)
    assert sample_id("a.mp4", WHOLE) == sample_id("a.mp4") != sample_id("a.mp4", Segment(1))


def test_all_parts_of_a_file_are_held_out_or_none(tmp_path: Path) -> None:
    names = [f"{number}.mp4" for number in range(60)]
    rows = [f"{name},x,{k},{k + 1}\n" for name in names for k in range(5)]
    clips = read_table(_write(tmp_path, "path,text,start,end\n" + "".join(rows)))
    whole = read_table(_write(tmp_path, "path,text\n" + "".join(f"{n},x\n" for n in names)))
    assert 0 < whole.held_out().sum() < 60
    assert clips.held_out().tolist() == np.repeat(whole.held_out(), 5).tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("-1,2", r"row 1: start is '-1'; it must be a number of seconds"),
        ("0:10,", r"row 1: start is '0:10'"),
        ("1,nan", r"row 1: end is 'nan'"),
        ("1,inf", r"row 1: end is 'inf'"),
        ("1e300,", r"row 1: start is '1e300'"),
        ("2,2", r"row 1: end is 2 and start is 2 seconds; a clip ends after it starts"),
        ("2.5,1", r"row 1: end is 1 and start is 2\.5"),
        (",0", r"row 1: end is 0 and start is 0"),
        ("1,2\na.mp4,y,1.0,2.0", r"row 2: path 'a\.mp4' is there already, in row 1.*own start"),
    ],
)
def test_a_bad_time_is_refused_with_its_row(row: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_table(_write(tmp_path, f"path,text,start,end\na.mp4,x,{row}\n"))


def test_a_time_that_is_no_number_is_refused_in_parquet(tmp_path: Path) -> None:
    for column in (pa.array([True]), pa.array([1], pa.duration("s"))):
        table = pa.table({"path": ["a.mp4"], "text": ["x"], "end": column})
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        with pytest.raises(InputError, match=r"row 1: end is .*number of seconds"):
            read_table(Videos(f"{tmp_path}/t.parquet"))


def test_parts_of_a_file_in_two_sources_are_two_clips(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name, "path,text,start,end\nv.mp4,x,0,1\nv.mp4,y,1,2\n")
    mix = Mix((Videos(f"{tmp_path}/a/t.csv"), 1), (Videos(f"{tmp_path}/b/t.csv"), 1))
    for spill in (None, tmp_path / "spilled"):
        first, second = read_tables(mix, spill)
        assert len({*first.ids().tolist(), *second.ids().tolist()}) == 4
        assert [clip.segment for clip in second] == [
            Segment(0, SECOND),
            Segment(SECOND, 2 * SECOND),
        ]


def test_each_file_is_probed_once_and_a_row_that_it_has_not_is_quarantined_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level_video(tmp_path / "v.mp4", [90] * 16, list(range(16)), Fraction(1, 8))
    (tmp_path / "p.png").write_bytes(still("png", "rgb24"))
    names = ["v.mp4,a,,", "v.mp4,b,0.5,1", "p.png,c,,", "v.mp4,d,1,9", "v.mp4,e,2,", "p.png,f,,1"]
    clips = read_table(_write(tmp_path, "path,text,start,end\n" + "\n".join(names) + "\n"))
    monkeypatch.setattr("elastic.data.clips.ROWS", 2)  # of a batch
    asked: list[str] = []
    whole = Decoders.probe

    def counting(self: Decoders, paths: Iterable[str]) -> Iterator[Any]:
        wanted = list(paths)
        asked.extend(Path(path).name for path in wanted)
        return whole(self, wanted)

    monkeypatch.setattr(Decoders, "probe", counting)
    for _ in range(2):  # the second time from the cache
        probed = probe_all(clips, tmp_path / "probes.parquet", workers=1)
        assert [(clip.text, why) for clip, why in probed.quarantined()] == [
            ("e", "starts at 2 s, and the file is 2 s long"),
            ("f", "one picture, of which there is no start and no end: leave both out"),
        ]
        assert asked == ["v.mp4", "p.png"] or sorted(asked) == ["p.png", "p.png", "v.mp4"]
    assert probed.can_fill(4, 8).tolist()[:4] == [True, True, False, True]
    assert probed.can_fill(5, 8).tolist()[:4] == [True, False, False, True]
    assert probed.can_fill(9, 8).tolist()[:4] == [True, False, False, False], "up to its file's end"


@pytest.fixture
def film(tmp_path: Path) -> list[Clip]:
    """Clips of one file, of which one is too short for the bucket; and all of it."""
    path = tmp_path / "v.mp4"
    level_video(path, [20 + 5 * k for k in range(40)], list(range(40)), Fraction(1, 8))
    rows = "".join(f"v.mp4,{k},{k / 2},{k / 2 + 0.5},train\n" for k in range(8))
    rows += "v.mp4,whole,,,train\nv.mp4,short,1,1.3,train\nv.mp4,held,3,4,held-out\n"
    return list(read_table(_write(tmp_path, f"path,text,start,end,split\n{rows}")))


def test_training_on_pixels_has_each_part_of_a_file(film: list[Clip], tmp_path: Path) -> None:
    assigned = assign(STAGE, probe_all(film, tmp_path / "probes.parquet", workers=1))
    members = assigned.save(tmp_path / "clips.arrow")
    assert load_members(tmp_path / "clips.arrow") == members
    assert list(members.clips[BUCKET.name]) == film[:9]
    decoders = Decoders(1)
    try:
        source = VideoSource(STAGE, members, held_out=False, decoders=decoders)
        (samples,) = source.fetch_all([(BUCKET, np.array([2, 5, 8, 2]))])
    finally:
        decoders.close()
    assert samples.weight_B.tolist() == [1.0] * 4
    size = BUCKET.frames, STAGE.rate, BUCKET.height, BUCKET.width
    for place, x_CTHW in zip([2, 5, 8, 2], samples.x_BCTHW, strict=True):
        clip = film[place]
        assert torch.equal(x_CTHW, to_unit(decode_clip(clip.path, *size, clip.segment)))
    assert len({x.numpy().tobytes() for x in samples.x_BCTHW}) == 3


def test_what_is_encoded_is_each_part_of_a_file(film: list[Clip]) -> None:
    codec = STAGE.vae
    assert isinstance(codec, DCAE)
    found = [
        x
        for _, some in decode_ahead(codec, [Part(BUCKET, film[:4])], STAGE.rate, 1)
        for x in some
    ]  # fmt: skip
    size = BUCKET.frames, STAGE.rate, BUCKET.height, BUCKET.width
    for clip, x_CTHW in zip(film, found, strict=False):
        assert not isinstance(x_CTHW, BadVideo)
        assert torch.equal(x_CTHW, decode_clip(clip.path, *size, clip.segment))
    assert len(found) == 4


def test_clips_that_were_pinned_before_there_were_segments_are_whole(tmp_path: Path) -> None:
    old = pa.schema([*list(SCHEMA)[:4], pa.field("part", pa.string())])
    batch = pa.RecordBatch.from_pylist(
        [{"sample_id": 5, "path": "/v.mp4", "text": "x", "held_out": False, "part": "32px-4f"}],
        schema=old,
    )
    with pa.ipc.new_file(str(tmp_path / "clips.arrow"), old) as writer:
        writer.write_batch(batch)
    members = load_members(tmp_path / "clips.arrow")
    assert members == Members({"32px-4f": [Clip(5, "/v.mp4", "x", False)]})
    new = Clips.of([Clip(6, "/v.mp4", "y", False, 3, 4)])
    write_parts(tmp_path / "n.arrow", [("32px-4f", new.batches())])
    joined = Clips.joined(
        [Clips.of(members.clips["32px-4f"]), read_parts(tmp_path / "n.arrow")["32px-4f"]]
    )
    assert [clip.segment for clip in joined] == [WHOLE, Segment(3, 4)]
    known = {5: Probe(9, Fraction(8), 64, 64, 0, 9 / 8), 6: Probe(9, Fraction(8), 64, 64, 0, 9 / 8)}
    assert Probed.of(joined, known).can_fill(2, 8).tolist() == [True, False]
