"""Which bucket has which clip: no side is blown up, and of several shapes the nearest one."""

import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_videos import pattern, video
from test_growth import PIXELS
from tiny import STAGE
from videos_fixture import still_video

from elastic.course import pin_members
from elastic.data.assign import Assignment, assign, fitting, held_out_name, load_members
from elastic.data.clips import Clip, Clips, write_parts
from elastic.data.decode import _cover
from elastic.data.growth import load_growths
from elastic.data.moving_shapes import turn_mp4
from elastic.data.probe import Probe, probe
from elastic.data.probes import Probed, probe_all
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.grow import grow_stage
from elastic.latent_pins import forget_stale, note_ahead
from elastic.record import check_unchanged, start_stage
from stages import AdamW, Bucket, DiffusionStage, Phase, Plan, Videos
from stages.identity import description

WIDE, TALL, SQUARE = "256x448", "448x256", "256px"


def _stage(*phases: list[str], **changes: object) -> DiffusionStage:
    """Phases of buckets of these sizes."""
    schedule, until = [], 0
    for sizes in phases:
        until += len(sizes)
        buckets = [Bucket(size, frames=1, batch=1) for size in sizes]
        schedule.append(Phase(until=until, buckets=buckets))
    return STAGE.replace(schedule=schedule, optimizer=AdamW(lr=1e-3), **changes)


def _probed(*sides: tuple[int, int], stretch: Fraction = Fraction(1)) -> Probed:
    """Clips so high and wide; every second one is held out."""
    clips = [Clip(n, f"{n}.mp4", "", held_out=n % 2 == 1) for n in range(len(sides))]
    found = {
        n: Probe(9, Fraction(8), width, height, 0, 9 / 8, stretch)
        for n, (height, width) in enumerate(sides)
    }
    return Probed.of(clips, found)


def _of(assigned: Assignment, size: str) -> list[int]:
    bucket = Bucket(size, frames=1, batch=1)
    parts = [assigned.rows[name].tolist() for name in (bucket.name, held_out_name(bucket))]
    return sorted([*parts[0], *parts[1]])


def test_landscape_and_portrait_part_and_a_strip_is_in_neither() -> None:
    probed = _probed((1080, 1920), (1920, 1080), (60, 4000), (1000, 1000))
    assigned = fitting(_stage([WIDE, TALL]), probed)
    assert _of(assigned, WIDE) == [0, 3], "a square is as near to both"
    assert _of(assigned, TALL) == [1, 3]
    assigned = fitting(_stage([WIDE, TALL, SQUARE]), probed)
    assert [_of(assigned, size) for size in (WIDE, TALL, SQUARE)] == [[0], [1], [3]]
    alone = fitting(_stage([WIDE]), probed)
    assert _of(alone, WIDE) == [0, 1, 3], "the one shape there is has every clip"


def test_what_is_in_no_bucket_is_said_with_its_reason() -> None:
    probed = _probed((1080, 1920), (1920, 1080), (60, 4000), (1920, 1080))
    stage = _stage([WIDE, TALL])
    lines = list(fitting(stage, probed).lines(stage, probed))
    assert lines[0].startswith("256x448-1f: 1 clips, 0 held out; of 4 are 0 too short, 1 too small")
    assert lines[0].endswith("2 nearer to another bucket's shape, 0 cannot be used")
    assert lines[1].startswith("448x256-1f: 0 clips, 2 held out; of 4")
    assert lines[2:] == [
        "in no bucket: 1 of 4 clips: 0 too short, 1 too small where they are long enough, "
        "0 cannot be used"
    ]
    everywhere = stage.replace(match="any")
    lines = list(fitting(everywhere, probed).lines(everywhere, probed))
    assert len(lines) == 2
    assert "nearer" not in lines[0]


def test_a_shape_that_no_clip_is_nearest_to_is_named_with_what_to_do() -> None:
    probed = _probed((1080, 1920), (1080, 1920))
    with pytest.raises(InputError, match=r"'448x256-1f' has no train clip: of 2 clips 0 .*nearer"):
        assign(_stage([WIDE, TALL]), probed)
    with pytest.raises(InputError, match=r"no train clip: of 2 clips 0 .* large enough; ask"):
        assign(_stage(["1088x1920", "2176x3840"]), probed)
    assign(_stage([WIDE, TALL], match="any"), probed)


def test_a_phase_that_has_one_of_two_shapes_trains_it_on_the_clips_of_both() -> None:
    probed = _probed((1080, 1920), (1920, 1080))
    assigned = fitting(_stage([WIDE], [WIDE, TALL]), probed)
    assert _of(assigned, WIDE) == [0, 1]
    assert _of(assigned, TALL) == [1], "where it is, the other one is too"


def test_two_resolutions_have_a_clip_both() -> None:
    probed = _probed((1080, 1920), (1920, 1080))
    assigned = fitting(_stage(["256x448", "448x256", "512x896", "512px"]), probed)
    assert _of(assigned, "256x448") == [0]
    assert _of(assigned, "512x896") == [0]
    assert _of(assigned, "512px") == [1]
    # Of 16 to 9 both, in whole strides of 32 and of 16.
    assigned = fitting(_stage(["288x512", "336x592"]), probed)
    assert _of(assigned, "288x512") == _of(assigned, "336x592") == [0, 1]


sides = st.integers(32, 600)
sizes = st.tuples(st.integers(2, 16), st.integers(2, 16)).map(
    lambda s: f"{32 * s[0]}x{32 * s[1]}"
)  # fmt: skip


class Case(NamedTuple):
    stage: DiffusionStage
    probed: Probed


@st.composite
def cases(draw: st.DrawFn) -> Case:
    phases = draw(st.lists(st.lists(sizes, min_size=1, max_size=4, unique=True), min_size=1,
                           max_size=3))  # fmt: skip
    stretch = draw(st.sampled_from([Fraction(1), Fraction(1), Fraction(64, 45), Fraction(2, 3)]))
    clips = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=8))
    return Case(_stage(*phases), _probed(*clips, stretch=stretch))


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_a_clip_that_fits_a_bucket_of_a_phase_is_in_one_of_them(case: Case) -> None:
    assigned, least = fitting(case.stage, case.probed), 0.8
    for row in range(len(case.probed.clips)):
        found = case.probed.at(row)
        assert isinstance(found, Probe)
        for phase in case.stage.schedule:
            fits = [b for b in phase.buckets if _share(found, b) >= least]
            has = [b for b in phase.buckets if row in _of(assigned, b.size)]
            assert set(has) <= set(fits)
            assert bool(has) == bool(fits)
            if fits:
                nearest = min(fits, key=lambda b: _away(found, b))
                assert min(_away(found, b) for b in has) <= _away(found, nearest) + 0.02


def _share(found: Probe, bucket: Bucket) -> float:
    """How many pixels of the file a bucket shows, of its own: from what decoding really cuts."""
    shown = Fraction(found.height), found.width * found.stretch
    scale = max(bucket.height / shown[0], bucket.width / shown[1])
    high, wide = bucket.height / scale, bucket.width / scale / found.stretch
    return float(high * wide / (bucket.height * bucket.width))


def _away(found: Probe, bucket: Bucket) -> float:
    shape = math.log(found.height / float(found.width * found.stretch))
    return abs(shape - math.log(bucket.height / bucket.width))


@settings(deadline=None, max_examples=60)
@given(size=sizes, clips=st.lists(st.tuples(sides, sides), min_size=1, max_size=8))
def test_any_is_the_rule_by_area_and_aspect_keeps_all_of_it_that_is_not_blown_up(
    size: str, clips: list[tuple[int, int]]
) -> None:
    stage, probed = _stage([size]), _probed(*clips)
    (bucket,) = stage.buckets
    by_area = [
        n for n, (h, w) in enumerate(clips) if h * w >= 0.8 * bucket.height * bucket.width
    ]  # fmt: skip
    sharp = [n for n in by_area if min(clips[n][0] / bucket.height, clips[n][1] / bucket.width)
             >= math.sqrt(0.8)]  # fmt: skip
    assert _of(fitting(stage.replace(match="any"), probed), size) == by_area
    assert _of(fitting(stage, probed), size) == sharp


def test_pixels_that_are_not_square_count_as_they_are_shown(tmp_path: Path) -> None:
    """Upright in its pixels, which are twice as wide as high: a landscape on the screen."""
    ratio = Fraction(2)
    (tmp_path / "wide.mp4").write_bytes(
        video("libx264", "mp4", x_THWC=pattern(64, 48), sample_aspect_ratio=ratio)
    )
    found = probe(str(tmp_path / "wide.mp4"))
    assert (found.height, found.width, found.stretch) == (64, 48, ratio)
    assert _cover(pattern(64, 48)[0], ratio, 0, 64, 96).shape == (3, 64, 96), "shown whole"
    clips = [Clip(0, str(tmp_path / "wide.mp4"), "", held_out=False)]
    for _ in range(2):  # the second time from the cache
        probed = probe_all(clips, tmp_path / "probes.parquet", workers=1)
        assert probed.at(0) == found
        stage = _stage(["32x48", "48x32"])
        assert [_of(fitting(stage, probed), size) for size in ("32x48", "48x32")] == [[0], []]


def test_what_is_turned_has_its_pixels_turned(tmp_path: Path) -> None:
    content = video("libx264", "mp4", x_THWC=pattern(64, 48), sample_aspect_ratio=Fraction(2))
    (tmp_path / "v.mp4").write_bytes(turn_mp4(content))
    found = probe(str(tmp_path / "v.mp4"))
    assert (found.height, found.width, found.stretch) == (48, 64, Fraction(1, 2))
    probed = Probed.of([Clip(0, "v", "", held_out=False)], {0: found})
    high, wide = probed.shown()
    assert wide[0] / high[0] == pytest.approx(64 / 96)


def test_a_stage_that_began_before_goes_on_and_one_that_says_any_is_another(tmp_path: Path) -> None:
    folder, stage = RunFolder(tmp_path), _stage([WIDE, TALL])
    start_stage(folder, stage)
    assert "match" not in description(stage), "as in the runs of before there were two"
    check_unchanged(folder, Plan("p", [stage]))
    with pytest.raises(InputError, match="match: None -> 'any'"):
        check_unchanged(folder, Plan("p", [stage.replace(match="any")]))


def test_clips_that_were_chosen_ahead_by_another_rule_are_chosen_again(tmp_path: Path) -> None:
    folder, stage = RunFolder(tmp_path), _stage([WIDE, TALL])
    own = folder.stage(stage.name)
    note_ahead(folder, stage)
    (own / "clips.arrow").write_bytes(b"clips")
    forget_stale(folder, stage)
    assert (own / "clips.arrow").exists()
    note = json.loads((own / "ahead.json").read_text())
    del note["stage"]["match"]  # as an earlier version wrote it
    (own / "ahead.json").write_text(json.dumps(note))
    forget_stale(folder, stage)
    assert not (own / "clips.arrow").exists()


@pytest.mark.parametrize("match", ["any", "aspect"])
def test_what_comes_to_a_stage_is_chosen_by_the_rule_that_it_began_with(
    match: str, tmp_path: Path
) -> None:
    course: Any = SimpleNamespace(
        folder=RunFolder(tmp_path / "run"),
        tracker=SimpleNamespace(event=lambda *_, **__: None),
    )
    sides = {"w": (40, 70), "t": (70, 40), "w2": (40, 70), "t2": (70, 40)}
    for name, (height, width) in sides.items():
        still_video(tmp_path / f"{name}.mp4", np.zeros((height, width, 3), np.uint8))
    rows = ["w.mp4,x,train", "t.mp4,x,train"]
    held = ["w2.mp4,x,held-out", "t2.mp4,x,held-out"]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["path,text,split", *rows, *held, ""]))
    phases = [Phase(until=8, buckets=[Bucket("32x64", frames=4, batch=1, micro=1),
                                      Bucket("64x32", frames=4, batch=1, micro=1)])]  # fmt: skip
    stage = PIXELS.replace(data=Videos(str(table)), schedule=phases)
    members = pin_members(course, stage.replace(match=match))
    assert members.match == match
    own = course.folder.stage(stage.name)
    if match == "any":  # as an earlier version wrote it: no note of a rule
        parts = [(n, Clips.of(c).batches()) for n, c in members.clips.items()]
        write_parts(own / "clips.arrow", parts)
        assert load_members(own / "clips.arrow") == members
    still_video(tmp_path / "n.mp4", np.zeros((70, 40, 3), np.uint8))
    table.write_text("\n".join(["path,text,split", *rows, *held, "n.mp4,x,train", ""]))
    grow_stage(course, stage)
    (growth,) = load_growths(own)
    assert growth.members.match == match
    came = {name for name, clips in growth.members.clips.items() if len(clips)}
    assert came == ({"32x64-4f", "64x32-4f"} if match == "any" else {"64x32-4f"})
