"""Clips that come to a stage after it has begun: what was seen stays, and nothing is seen twice."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adversarial import STAGE as WITH_CRITIC
from tiny import CLIP, STAGE, STILL
from videos_fixture import still_video

from elastic.checkpoint_place import Register
from elastic.course import pin_members
from elastic.data.assign import load_members
from elastic.data.decoders import Decoders
from elastic.data.growth import GROWTHS, load_growths, starts_after
from elastic.data.order import BatchPlan, Later, Layout, batch_at, layout_of
from elastic.data.sources import VideoSource
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.grow import grow_stage
from stages import Bucket, DiffusionStage, Mix, Phase, Videos, Windows

PIXELS = WITH_CRITIC.replace(
    adversarial=None,
    schedule=[Phase(until=60, buckets=[Bucket("32px", frames=4, batch=3)])],
)
MIXED = STAGE.replace(data=Mix((Videos("a.csv"), 2), (Videos("b.csv"), 1)))
POSITIONS = []
_at = 0
while _at < STAGE.budget:
    POSITIONS.append(_at)
    _at += batch_at(STAGE, _at, {CLIP: 1, STILL: 1}).bucket.batch


class Grown(NamedTuple):
    """A stage that grew some times: where its samples lay before, and after the last one."""

    stage: DiffusionStage
    before: list[tuple[int, dict[str, Layout]]]  # position of a growth, and what there was then
    after: dict[str, Layout]


@st.composite
def grown(draw: st.DrawFn) -> Grown:
    stage = draw(st.sampled_from([STAGE, MIXED]))
    stage = stage.replace(order=draw(st.sampled_from([None, Windows(run=8, mixed=8)])))
    num = len(stage.data.sources)
    began = {name: draw(_sizes(num, 1)) for name in (CLIP, STILL)}
    if num > 1 and draw(st.booleans()):
        began[STILL][0] = 0  # it takes no part in the bucket
    later: dict[str, list[Later]] = {CLIP: [], STILL: []}
    before = []
    for position in sorted(draw(st.lists(st.sampled_from(POSITIONS), min_size=1, max_size=3))):
        layouts = {name: layout_of(sizes, later[name]) for name, sizes in began.items()}
        before.append((position, layouts))
        starts = starts_after(stage, position, layouts)
        for name in began:
            more = draw(_sizes(num, 0))
            more = [new if had else 0 for new, had in zip(more, began[name], strict=True)]
            later[name].append(Later(more, starts[name]))
    return Grown(stage, before, {n: layout_of(sizes, later[n]) for n, sizes in began.items()})


def _sizes(num: int, least: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, 30), min_size=num, max_size=num)


def _walk(stage: DiffusionStage, layouts: dict[str, Layout], end: int) -> list[BatchPlan]:
    return [batch_at(stage, position, layouts) for position in POSITIONS if position < end]


def _same(one: list[BatchPlan], other: list[BatchPlan]) -> bool:
    return all(
        np.array_equal(a.indices, b.indices) and np.array_equal(a.epochs, b.epochs)
        for a, b in zip(one, other, strict=True)
    )


@settings(deadline=None, max_examples=40)
@given(case=grown())
def test_what_was_seen_before_a_growth_stays_as_it_was(case: Grown) -> None:
    for position, layouts in case.before:
        assert _same(_walk(case.stage, case.after, position), _walk(case.stage, layouts, position))


def _by_source(case: Grown) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """Of each source of each bucket, in order: the index of each of its samples, and its epoch."""
    seen: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for plan in _walk(case.stage, case.after, case.stage.budget):
        for index, epoch in zip(plan.indices.tolist(), plan.epochs.tolist(), strict=True):
            layout = case.after[plan.bucket.name]
            (source,) = [
                number
                for number, extents in enumerate(layout)
                if any(e.first <= index < e.first + e.size for e in extents)
            ]
            seen.setdefault((plan.bucket.name, source), []).append((index, epoch))
    return seen


@settings(deadline=None, max_examples=40)
@given(case=grown())
def test_every_sample_that_is_there_comes_once_an_epoch_of_its_source(case: Grown) -> None:
    for (bucket, source), seen in _by_source(case).items():
        extents = case.after[bucket][source]
        at, epoch = 0, 0
        while at < len(seen):
            there = [e for e in extents if e.start <= at]
            whole = {e.first + k for e in there for k in range(e.size)}
            some = seen[at : at + len(whole)]
            assert {number for _, number in some} == {epoch}
            drawn = [index for index, _ in some]
            assert len(set(drawn)) == len(drawn)
            assert set(drawn) <= whole
            if len(some) == len(whole):
                assert set(drawn) == whole
            at, epoch = at + len(whole), epoch + 1


@settings(deadline=None, max_examples=40)
@given(case=grown())
def test_new_samples_come_at_the_next_epoch_and_not_before_what_was_seen(case: Grown) -> None:
    for number, (position, layouts) in enumerate(case.before):
        seen = Counter[tuple[str, int]]()
        for plan in _walk(case.stage, layouts, position):
            for source, extents in enumerate(layouts[plan.bucket.name]):
                held = [
                    (plan.indices >= e.first) & (plan.indices < e.first + e.size) for e in extents
                ]
                seen[plan.bucket.name, source] += int(np.sum(held))
        for bucket, layout in case.after.items():
            for source, extents in enumerate(layout):
                if not extents[0].size:
                    continue
                used, start = seen[bucket, source], extents[number + 1].start
                size = sum(extent.size for extent in extents[: number + 1])
                assert start >= used
                assert start - used < size or start == extents[number].start


def test_a_stage_that_has_seen_nothing_takes_all_in_at_once() -> None:
    layouts = {CLIP: layout_of([11]), STILL: layout_of([5])}
    assert starts_after(STAGE, 0, layouts) == {CLIP: [0], STILL: [0]}


def test_a_growth_at_ten_thousand_million_samples_is_found_without_a_walk() -> None:
    size = 10**9
    cycle = STAGE.schedule[0].cycle
    until = cycle * 10**9
    stage = STAGE.replace(schedule=[STAGE.schedule[0].replace(until=until)])
    layouts = {CLIP: layout_of([size]), STILL: layout_of([7])}
    starts = starts_after(stage, cycle * 900_000_001, layouts)
    used = 5 * 900_000_001
    assert starts[CLIP] == [-(-used // size) * size]
    later = [Later([size], starts[CLIP])]
    layouts[CLIP] = layout_of([size], later)
    plans = []
    position = cycle * 999_999_990
    while len(plans) < 8:
        plans.append(batch_at(stage, position, layouts))
        position += plans[-1].bucket.batch
    drawn = np.concatenate([plan.indices for plan in plans if plan.bucket.name == CLIP])
    assert (drawn < size).all(), "the epoch that was under way has its own samples alone"
    assert starts[CLIP][0] == 5 * size


# What follows drives a stage on pixels: it needs no latents, and so no cluster.


@pytest.fixture
def course(tmp_path: Path) -> Any:
    told: list[tuple[str, dict[str, Any]]] = []
    tracker = SimpleNamespace(
        event=lambda kind, stage, *_, **more: told.append((kind, more)),
    )
    return SimpleNamespace(folder=RunFolder(tmp_path / "run"), tracker=tracker, told=told)


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    found = Decoders(1)
    yield found
    found.close()


def _film(path: Path, frames: int = 24) -> None:
    path.parent.mkdir(exist_ok=True)
    still_video(path, np.full((48, 48, 3), 90, np.uint8), frames, rate=24)


def _write(folder: Path, rows: list[tuple[str, str, str]]) -> Videos:
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "split"))
        writer.writerows(rows)
    for path, _, _ in rows:
        if "gone" not in path and not (folder / path).exists():
            _film(folder / path)
    return Videos(f"{folder}/t.csv")


ROWS = [(f"{number}.mp4", f"clip {number}", "train") for number in range(5)]
HELD = [("h.mp4", "held", "held-out")]


def test_a_stage_takes_in_what_its_table_has_more_and_all_else_stays(
    course: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], decoders: Decoders
) -> None:
    stage = PIXELS.replace(data=_write(tmp_path, ROWS + HELD))
    own = course.folder.stage(stage.name)
    members = pin_members(course, stage)
    pinned = (own / "clips.arrow").read_bytes()
    (bucket,) = stage.buckets
    grow_stage(course, stage)
    assert "nothing to train on is new" in capsys.readouterr().out
    assert load_growths(own) == ()

    # One is gone, one has another caption, one is held out, one cannot be used, two are new.
    more = [ROWS[1], ("2.mp4", "another", "train"), *ROWS[3:], *HELD]
    more += [("h2.mp4", "", "held-out"), ("gone.mp4", "", "train")]
    more += [("n1.mp4", "new 1", "train"), ("n2.mp4", "new 2", "train")]
    stage_at = 7 * bucket.batch
    Register(own).add(stage_at)
    _write(tmp_path, more)
    grow_stage(course, stage)
    (growth,) = load_growths(own)
    assert growth.position == stage_at
    assert growth.starts == {bucket.name: [-(-stage_at // 5) * 5]}
    assert [clip.text for clip in growth.members.clips[bucket.name]] == ["new 1", "new 2"]
    assert list(growth.members.clips) == [bucket.name], "what is measured on stays as it was"
    assert (own / "clips.arrow").read_bytes() == pinned
    assert ("grow", {"clips": {bucket.name: 2}, "starts": growth.starts}) in course.told
    out = capsys.readouterr().out
    assert "with 2 more clips" in out
    assert "what is held out is left out" in out
    assert not list(own.glob(".table*")), "nothing is left half done"
    source = VideoSource(stage, members, held_out=False, decoders=decoders, growths=[growth])
    assert source.counts() == {bucket.name: 7}
    (samples,) = source.fetch_all([(bucket, np.array([6]))])
    assert samples.ids.tolist() == [growth.members.clips[bucket.name][1].sample_id]
    held_out = VideoSource(stage, members, held_out=True, decoders=decoders, growths=[growth])
    assert held_out.counts() == {bucket.name: 1}

    grow_stage(course, stage)
    assert len(load_growths(own)) == 1, "to ask again takes nothing in again"
    _write(tmp_path, [*more, ("n3.mp4", "", "train")])
    Register(own).add(stage.budget - bucket.batch)
    grow_stage(course, stage)
    first, second = load_growths(own)
    assert first == growth
    assert second.starts[bucket.name][0] >= stage.budget - bucket.batch
    assert (second.starts[bucket.name][0] - growth.starts[bucket.name][0]) % 7 == 0
    assert second.members == load_members(own / "clips-2.arrow")


def test_a_folder_grows_by_its_files(course: Any, tmp_path: Path) -> None:
    for number in range(40):
        _film(tmp_path / "clips" / f"{number}.mp4")
    stage = PIXELS.replace(data=Videos(f"{tmp_path}/clips/", held_out_every=2))
    members = pin_members(course, stage)
    for number in range(40, 50):
        _film(tmp_path / "clips" / f"{number}.mp4")
    grow_stage(course, stage)
    (growth,) = load_growths(course.folder.stage(stage.name))
    (bucket,) = stage.buckets
    assert growth.starts == {bucket.name: [0]}, "nothing has been seen"
    names = {Path(clip.path).stem for clip in growth.members.clips[bucket.name]}
    assert names
    assert all(int(name) >= 40 for name in names)
    assert not names & {Path(clip.path).stem for clip in members.clips[bucket.name]}


def test_a_mix_grows_source_by_source(course: Any, tmp_path: Path, decoders: Decoders) -> None:
    parts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        parts.append((_write(tmp_path / name, ROWS + HELD), 1.0))
    stage = PIXELS.replace(data=Mix(*parts))
    members = pin_members(course, stage)
    (bucket,) = stage.buckets
    own = course.folder.stage(stage.name)
    Register(own).add(bucket.batch)
    _write(tmp_path / "b", [*ROWS, *HELD, ("5.mp4", "new", "train")])
    grow_stage(course, stage)
    (growth,) = load_growths(own)
    assert growth.members.sizes(bucket.name) == [0, 1]
    source = VideoSource(stage, members, held_out=False, decoders=decoders, growths=[growth])
    old, new = source.layouts()[bucket.name]
    assert [extent.size for extent in old] == [5, 0]
    assert [(extent.first, extent.size) for extent in new] == [(5, 5), (10, 1)]
    for position in range(0, stage.budget, bucket.batch):
        batch_at(stage, position, source.layouts())


def test_a_source_that_took_no_part_in_a_bucket_takes_none_later(
    course: Any, tmp_path: Path, decoders: Decoders
) -> None:
    """Its share of the bucket would change amid the stream."""
    parts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        parts.append((_write(tmp_path / name, ROWS + HELD), 1.0))
    long = [Bucket("32px", frames=frames, batch=3) for frames in (4, 40)]  # films of 24 frames
    stage = PIXELS.replace(data=Mix(*parts), rate=24.0, schedule=[Phase(until=60, buckets=long)])
    for number in (0, 1):
        _film(tmp_path / "a" / f"{number}.mp4", frames=48)
    _film(tmp_path / "a" / "h.mp4", frames=48)
    members = pin_members(course, stage)
    assert members.sizes(long[1].name) == [2, 0]
    _film(tmp_path / "b" / "n.mp4", frames=48)
    _write(tmp_path / "b", [*ROWS, *HELD, ("n.mp4", "new", "train")])
    grow_stage(course, stage)
    (growth,) = load_growths(course.folder.stage(stage.name))
    assert growth.members.sizes(long[0].name) == [0, 1]
    assert growth.members.sizes(long[1].name) == [0, 0]
    source = VideoSource(stage, members, held_out=False, decoders=decoders, growths=[growth])
    for position in range(0, stage.budget, 3):
        plan = batch_at(stage, position, source.layouts())
        assert (plan.indices < source.counts()[plan.bucket.name]).all()


def test_a_stage_that_has_seen_all_is_left_alone(
    course: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = PIXELS.replace(data=_write(tmp_path, ROWS + HELD))
    pin_members(course, stage)
    own = course.folder.stage(stage.name)
    Register(own).add(stage.budget)
    _write(tmp_path, [*ROWS, *HELD, ("5.mp4", "new", "train")])
    grow_stage(course, stage)
    assert "has seen all of its samples" in capsys.readouterr().out
    assert load_growths(own) == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace("clips-1.arrow", "clips-9.arrow"),
        lambda text: text.replace('"starts"', '"strats"'),
    ],
)
def test_a_damaged_record_of_growths_is_named(
    course: Any, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    """A start that took it for none would see another order."""
    stage = PIXELS.replace(data=_write(tmp_path, ROWS + HELD))
    pin_members(course, stage)
    _write(tmp_path, [*ROWS, *HELD, ("5.mp4", "new", "train")])
    grow_stage(course, stage)
    own = course.folder.stage(stage.name)
    text = (own / GROWTHS).read_text()
    assert json.loads(text)["growths"]
    (own / GROWTHS).write_text(damage(text))
    with pytest.raises(InputError, match=r"growths\.json cannot be read"):
        load_growths(own)
