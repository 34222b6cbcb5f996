"""Tables, probing and decoding: real files, good and bad."""

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from videos_fixture import level_video, still_video, tagged_video

from elastic.data import decoders
from elastic.data import probe as probe_module
from elastic.data.clips import Clip, sample_id
from elastic.data.decode import BadVideo, Unreachable, decode_clip, to_unit
from elastic.data.moving_shapes import render, tone_mp4, turn_mp4
from elastic.data.probe import Probe, probe
from elastic.data.probes import Probed, probe_all
from elastic.data.table import read_table
from elastic.errors import InputError
from stages.videos import Videos


def _table(folder: Path, text: str, name: str = "clips.csv") -> Videos:
    (folder / name).write_text(text)
    return Videos(str(folder / name))


def test_csv_and_parquet_give_the_same_clips(tmp_path: Path) -> None:
    rows = [("a.mp4", 'a "red", round\nthing', "train"), ("b/c.mp4", "12", "held-out")]
    videos = _table(
        tmp_path,
        'path,text,split\na.mp4,"a ""red"", round\nthing",train\nb/c.mp4,12,held-out\n',
    )
    columns = dict(zip(("path", "text", "split"), zip(*rows, strict=True), strict=True))
    parquet = tmp_path / "clips.parquet"
    pyarrow.parquet.write_table(pa.table({k: list(v) for k, v in columns.items()}), parquet)
    clips = read_table(videos)
    assert clips == read_table(Videos(str(parquet)))
    assert clips == [
        Clip(sample_id(path), str(tmp_path / path), text, split == "held-out")
        for path, text, split in rows
    ]
    assert all(0 <= clip.sample_id < 2**63 for clip in clips)


def test_a_folder_elsewhere_changes_paths_and_not_ids(tmp_path: Path) -> None:
    videos = _table(tmp_path, "path,text\na.mp4,x\n/abs/b.mp4,y\n")
    (tmp_path / "v").mkdir()
    clips = read_table(Videos(videos.table, folder=str(tmp_path / "v")))
    assert [clip.path for clip in clips] == [str(tmp_path / "v" / "a.mp4"), "/abs/b.mp4"]
    assert [c.sample_id for c in clips] == [c.sample_id for c in read_table(videos)]


def test_without_a_split_the_hash_holds_out_about_one_in_n(tmp_path: Path) -> None:
    videos = _table(tmp_path, "path,text\n" + "".join(f"{k}.mp4,x\n" for k in range(4000)))
    clips = read_table(videos.replace(held_out_every=8))
    assert 400 < sum(clip.held_out for clip in clips) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,caption\na,b\n", r"no column 'text', it has 'path', 'caption'"),
        ("Path,text\na,b\n", r"no column 'path'.*nearest is 'Path'"),
        ("", "is an empty file"),
        ("path,text\n", "has no rows"),
        ("path,text\na.mp4,x\na.mp4,y\n", r"row 2: path 'a.mp4' is there already, in row 1"),
        ("path,text\nb/../../a.mp4,x\n", "leads out of the folder"),
        ("path,text\n,x\n", "row 1: path is ''"),
        ("path,text,split\na.mp4,x,held_out\n", "split is 'held_out'.*nearest is 'held-out'"),
        ("path,text\na.mp4,x,y\n", "cannot be read as csv"),
    ],
)
def test_a_bad_table_is_refused_with_one_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_table(_table(tmp_path, text))


def test_a_table_that_is_refused_leaves_nothing_beside_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for text in ("path,text,split\na.mp4,x,trian\n", "path,text\n/a\0b.mp4,x\n"):
        with pytest.raises(InputError, match=r"trian|NUL character"):
            read_table(_table(tmp_path, text), tmp_path / "run" / ".table.arrow")
        assert list((tmp_path / "run").iterdir()) == []


def test_missing_table_folder_and_odd_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv' does not exist"):
        read_table(Videos(str(tmp_path / "none.csv")))
    videos = _table(tmp_path, "path,text\na.mp4,x\n")
    with pytest.raises(InputError, match=r"gone' does not exist"):
        read_table(videos.replace(folder=str(tmp_path / "gone")))
    with pytest.raises(InputError, match=r"must end in \.csv or \.parquet"):
        read_table(_table(tmp_path, "path,text\na.mp4,x\n", "clips.txt"))


def _levels(path: Path, frames: int, rate: Fraction) -> list[int]:
    x_CTHW = decode_clip(str(path), frames, rate, 32, 48)
    return [int(v) for v in x_CTHW.float().mean(dim=(0, 2, 3)).round()]


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    frames=st.integers(1, 12),
    rate=st.sampled_from([Fraction(8), Fraction(24), Fraction(30000, 1001), Fraction(7, 3)]),
)
def test_pictures_are_chosen_by_presentation_time(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], frames: int, rate: Fraction
) -> None:
    path = tmp_path_factory.mktemp("v") / "v.mp4"
    ticks = [0, *np.cumsum(gaps).tolist()]
    levels = [20 + 16 * k for k in range(len(ticks))]
    level_video(path, levels, ticks, Fraction(1, 60))
    known = probe(str(path))
    assert known.frames == len(ticks)
    wanted = []
    for k in range(frames):
        shown = [v for v, tick in zip(levels, ticks, strict=True) if Fraction(tick, 60) <= k / rate]
        wanted.append(shown[-1])
    if not can_fill(known, frames, rate):
        assert (frames - 1) / rate > Fraction(ticks[-1], 60)
        with pytest.raises(BadVideo, match="too short"):
            decode_clip(str(path), frames, rate, 32, 48)
        return
    got = _levels(path, frames, rate)
    assert np.abs(np.subtract(got, wanted)).max() <= 3


def test_a_clip_of_17_frames_at_8_fills_17_frames_and_not_18(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    level_video(path, list(range(20, 224, 12)), list(range(17)), Fraction(1, 8))
    known = probe(str(path))
    assert (known.frames, known.rate, known.duration_s) == (17, Fraction(8), 17 / 8)
    assert can_fill(known, 17, 8)
    assert not can_fill(known, 18, 8)
    assert decode_clip(str(path), 17, Fraction(8), 32, 32).shape == (3, 17, 32, 32)


def _quarters() -> np.ndarray:
    picture_HWC = np.zeros((64, 96, 3), np.uint8)
    picture_HWC[:32, :48] = (230, 30, 30)  # red top left
    picture_HWC[:32, 48:] = (30, 190, 50)
    picture_HWC[32:, :48] = (40, 60, 240)
    picture_HWC[32:, 48:] = (240, 240, 240)
    return picture_HWC


def test_rotation_is_honoured(tmp_path: Path) -> None:
    plain, turned = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    still_video(plain, _quarters())
    turned.write_bytes(turn_mp4(plain.read_bytes()))
    known = probe(str(turned))
    assert (known.width, known.height) == (64, 96)
    x_CHW = decode_clip(str(turned), 1, 8, 96, 64)[:, 0]
    upright_CHW = decode_clip(str(plain), 1, 8, 64, 96)[:, 0]
    # Clockwise: what was at the bottom left comes to the top left.
    assert torch.equal(x_CHW, torch.rot90(upright_CHW, -1, dims=(1, 2)))
    assert (x_CHW[:, 10, 10].int() - torch.tensor([40, 60, 240])).abs().max() < 10


def test_the_picture_covers_the_target_and_is_cropped_at_the_centre(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    still_video(path, _quarters())
    x_CTHW = decode_clip(str(path), 3, 8, 32, 32)
    assert x_CTHW.shape == (3, 3, 32, 32)
    assert x_CTHW.dtype == torch.uint8
    picture_CHW = torch.from_numpy(_quarters()).permute(2, 0, 1)
    wanted_CHW = picture_CHW[:, :, 16:80].float().unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))
    inside = torch.ones(32, dtype=torch.bool)
    inside[14:18] = False  # chroma bleeds over the edges between the quarters
    away = (x_CTHW[:, 0] - wanted_CHW).abs()[:, inside][:, :, inside]
    assert away.max() < 8


def test_unit_range_is_exact_at_both_ends() -> None:
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_ten_bits_are_read_and_hdr_is_refused(tmp_path: Path) -> None:
    tagged_video(tmp_path / "ten.mp4", "yuv420p10le", 1)
    x_CTHW = decode_clip(str(tmp_path / "ten.mp4"), 1, 8, 64, 64)
    assert (x_CTHW.int() - 128).abs().max() <= 2
    for curve, name in ((16, "PQ"), (18, "HLG")):
        path = tmp_path / f"{name}.mp4"
        tagged_video(path, "yuv420p10le", curve)
        for use in (probe, lambda p: decode_clip(p, 1, 8, 64, 64)):
            with pytest.raises(BadVideo, match=name):
                use(str(path))


def _bad_files(folder: Path) -> dict[str, str]:
    frames_THWC = render("circle", "red", "left", "slowly", (64, 64), 20, Fraction(8), 0)
    still_video(folder / "good.mp4", frames_THWC[0])
    whole = (folder / "good.mp4").read_bytes()
    files = {
        "cut.mp4": (whole[: len(whole) // 2], "cannot be read"),
        "empty.mp4": (b"", "cannot be read"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "cannot be read"),
        "sound.mp4": (tone_mp4(1.0), "no video stream"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.mp4").mkdir()
    reasons = {name: reason for name, (_, reason) in files.items()}
    return {**reasons, "folder.mp4": "a folder, not", "gone.mp4": "cannot be|does not exist"}


def test_bad_files_say_why_when_probed_and_when_decoded(tmp_path: Path) -> None:
    for name, reason in _bad_files(tmp_path).items():
        with pytest.raises(BadVideo, match=reason):
            probe(str(tmp_path / name))
        with pytest.raises(BadVideo, match=reason):
            decode_clip(str(tmp_path / name), 1, 8, 32, 32)


def test_a_file_that_cannot_be_reached_is_not_called_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    frames_THWC = render("circle", "red", "left", "slowly", (64, 64), 20, Fraction(8), 0)
    still_video(mount / "a.mp4", frames_THWC[0])
    clip = Clip(1, str(mount / "a.mp4"), "a circle", held_out=False)
    cache = tmp_path / "probes.parquet"

    def refuse(self: object, paths: Iterable[str]) -> Iterator[Unreachable]:
        return (Unreachable(f"{path}: Too many open files") for path in paths)

    with monkeypatch.context() as patch:
        patch.setattr(decoders.Decoders, "probe", refuse)
        ((_, reason),) = probe_all([clip], cache, workers=1).quarantined()
    assert "Too many open files" in reason
    assert good(probe_all([clip], cache, workers=1)) == [1], "it is looked at again"

    (mount / "a.mp4").unlink()
    for attempt in (probe, lambda path: decode_clip(path, 1, 8, 32, 32)):
        with pytest.raises(Unreachable, match="still mounted"):
            attempt(clip.path)  # an empty folder: the files are not deleted, the mount is gone
    lost = probe_all([clip], cache, workers=1)
    assert lost.unreachable == [0], "nor is it taken for one that was deleted"
    (mount / "b.mp4").touch()
    assert probe_all([clip], cache, workers=1).unreachable == []
    with pytest.raises(BadVideo, match="does not exist"):
        decode_clip(clip.path, 1, 8, 32, 32)


def _faststart(mp4: bytes) -> bytes:
    """The index moved to the front, as for streaming, with the chunk offsets corrected."""
    boxes, at = {}, 0
    while at < len(mp4):
        size = int.from_bytes(mp4[at : at + 4], "big")
        boxes[mp4[at + 4 : at + 8]] = mp4[at : at + size]
        at += size
    moov = bytearray(boxes[b"moov"])
    table = moov.index(b"stco") + 8
    for entry in range(int.from_bytes(moov[table : table + 4], "big")):
        place = table + 4 + 4 * entry
        offset = int.from_bytes(moov[place : place + 4], "big") + len(moov)
        moov[place : place + 4] = offset.to_bytes(4, "big")
    order = [boxes[b"ftyp"], bytes(moov), *(boxes[k] for k in boxes if k not in (b"ftyp", b"moov"))]
    return b"".join(order)


def test_a_cut_download_with_its_index_in_front_is_not_believed(tmp_path: Path) -> None:
    frames_THWC = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    path = tmp_path / "v.mp4"
    still_video(path, frames_THWC[0])
    whole = _faststart(path.read_bytes())
    path.write_bytes(whole)
    assert probe(str(path)).frames == 24
    path.write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(BadVideo):
        probe(str(path))


def test_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.mp4"
    still_video(path, _quarters())
    monkeypatch.setattr(probe_module, "MAX_FRAMES", 10)
    with pytest.raises(BadVideo, match="more than 10 frames"):
        probe(str(path))
    monkeypatch.setattr("elastic.data.decode.MAX_PIXELS", 64 * 95)
    with pytest.raises(BadVideo, match="96x64 is more than"):
        decode_clip(str(path), 1, 8, 64, 64)
    monkeypatch.undo()
    monkeypatch.setattr("elastic.data.decode.DEADLINE_S", -1.0)
    with pytest.raises(BadVideo, match="took more than"):
        decode_clip(str(path), 1, 8, 64, 64)


def test_probing_is_cached_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["good.mp4", *_bad_files(tmp_path)]
    clips = [Clip(sample_id(n), str(tmp_path / n), "x", held_out=False) for n in names]
    probed: list[str] = []
    asked = decoders.Decoders.probe

    def counting(self: decoders.Decoders, paths: Iterable[str]) -> Iterator[Any]:
        wanted = list(paths)
        probed.extend(map(os.path.basename, wanted))
        return asked(self, wanted)

    monkeypatch.setattr(decoders.Decoders, "probe", counting)
    cache = tmp_path / "cache" / "probes.parquet"
    first = probe_all(clips, cache, workers=3)
    assert good(first) == [sample_id("good.mp4")]
    assert [os.path.basename(clip.path) for clip, _ in first.quarantined()] == names[1:]
    assert sorted(probed) == sorted(set(names) - {"gone.mp4"})
    probed.clear()
    assert same(probe_all(clips, cache, workers=3), first)
    assert probed == []
    (tmp_path / "empty.mp4").write_bytes((tmp_path / "good.mp4").read_bytes())
    second = probe_all(clips, cache, workers=3)
    assert probed == ["empty.mp4"]
    assert good(second) == [sample_id("good.mp4"), sample_id("empty.mp4")]
    assert same(probe_all(clips[:2], cache, workers=3), first, 2)
    probed.clear()
    assert same(probe_all(clips, cache, workers=3), second)
    assert probed == [], "what only part of the clips needed is kept for all"
    cache.write_bytes(cache.read_bytes()[:-20])
    assert same(probe_all(clips, cache, workers=3), second)
    assert len(probed) == len(names) - 1


def can_fill(known: Probe, frames: int, rate: Fraction | float) -> bool:
    """The rule of `Probed.can_fill`, in exact numbers."""
    return (frames - 1) / Fraction(rate) < known.duration_s


def good(probed: Probed) -> list[int]:
    return [clip.sample_id for clip, fits in zip(probed.clips, probed.is_good, strict=True) if fits]


def same(one: Probed, other: Probed, num: int | None = None) -> bool:
    rows = range(len(one.clips) if num is None else num)
    return all(one.at(row) == other.at(row) for row in rows)


@given(
    frames=st.integers(1, 400),
    over=st.integers(1, 240_000),
    under=st.sampled_from([1, 2, 1001]),
    near=st.integers(-3, 3),
)
def test_whether_many_clips_fill_a_bucket_is_decided_as_for_one(
    frames: int, over: int, under: int, near: int
) -> None:
    rate = Fraction(over, under)
    length_s = float((frames - 1) / rate)
    for _ in range(abs(near)):
        length_s = float(np.nextafter(length_s, np.inf if near > 0 else -np.inf))
    found = Probe(10, Fraction(8), 64, 64, 0, length_s)
    probed = Probed.of([Clip(1, "v", "", False)], {1: found})
    assert probed.at(0) == found
    assert probed.can_fill(frames, rate).tolist() == [can_fill(found, frames, rate)]
