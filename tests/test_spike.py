"""The guard of a switched start: what it ends, what it leaves alone; a save has no say in it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_init import AUTOENCODER, CHILD, NEW_CLIP, PARENT
from tiny import STAGE, restored, train, world_of_one

from elastic.spike import PATIENCE, LossSpike, watch
from elastic.state import Progress
from elastic.weights import WEIGHTS
from stages import AdamW, Adversarial, Fresh, FromFile, KeepTrunk, Phase, Stage


def guarded(losses: list[float], stage: Stage = CHILD) -> Iterator[tuple[int, str]]:
    """Events, and the final error, of a course of losses in one bucket."""
    progress, events = Progress("child"), []
    for line, loss in enumerate(losses, 1):
        progress.samples = line * 6
        # Through JSON, as a checkpoint would keep it.
        progress = Progress(**json.loads(json.dumps(progress.as_json())))
        sums = {NEW_CLIP: (6 * loss, 6)}
        watch(stage, progress, sums, True, lambda k, at, why: events.append((at, why)))
    yield from events


def test_a_loss_that_stays_far_above_its_lowest_ends_the_stage_with_the_reason() -> None:
    assert list(guarded([2.0, 1.0, 0.6, 0.7, 1.1, 0.6])) == []
    spikes = list(guarded([2.0, 0.6, 1.3, 1.4, 0.6, 1.3]))
    assert [at for at, _ in spikes] == [18, 24, 36]
    with pytest.raises(LossSpike, match=r"2.2 times the lowest.*guard_factor"):
        list(guarded([2.0, 0.6, *[1.3] * PATIENCE]))


def test_the_guard_keeps_out_where_there_is_no_lowest_loss_to_compare_with() -> None:
    assert list(guarded([-0.10, -0.12, -0.14, 0.0, 0.1, 0.2])) == []
    judged = AUTOENCODER.replace(
        init=FromFile("w.safetensors"), adversarial=Adversarial(start=0, width=8)
    )
    assert list(guarded([0.04, 0.09, 0.09, 0.09, 0.09], judged)) == []
    assert len(list(guarded([0.04, 0.09, 0.09], judged.replace(adversarial=None)))) == 2


def test_the_guard_leaves_fresh_starts_and_later_samples_alone() -> None:
    course = [0.1] + [9.0] * 5
    assert list(guarded(course, CHILD.replace(init=Fresh()))) == []
    assert list(guarded(course, CHILD.replace(init=KeepTrunk(PARENT, guard_samples=6)))) == []


def test_lines_that_a_save_adds_to_the_log_change_no_verdict() -> None:
    """Two saves between log points split a line in three; a bucket may be in one part alone."""

    def judged(*parts: tuple[dict[str, tuple[float, int]], bool]) -> tuple[Progress, list[str]]:
        progress = Progress("child", samples=16, guard={"a": [0.5, 1], "b": [0.1, 0]})
        told: list[str] = []
        for sums, is_log_point in parts:
            progress = Progress(**json.loads(json.dumps(progress.as_json())))
            watch(CHILD, progress, sums, is_log_point, lambda kind, at, why: told.append(why))
        return progress, told

    progress, told = judged(({"a": (12.0, 6), "b": (5.0, 10)}, True))
    assert progress.guard == {"a": [0.5, 2], "b": [0.1, 1]}
    assert len(told) == 2
    split = judged(
        ({"a": (8.0, 2)}, False), ({"b": (5.0, 10)}, False), ({"a": (4.0, 4)}, True)
    )  # fmt: skip
    assert split == (progress, told)


def test_a_run_that_was_stopped_between_log_points_is_guarded_like_one_that_was_not(
    tmp_path: Path,
) -> None:
    short = STAGE.replace(
        schedule=[Phase(until=66, buckets=STAGE.schedule[0].buckets)], optimizer=AdamW(lr=3e-3)
    )
    with world_of_one() as world:
        train(world, tmp_path / "parent", None, short)
        init = FromFile(str(tmp_path / "parent" / WEIGHTS))
        stage = short.replace(init=init, exact=True, save_every=17)
        train(world, tmp_path / "whole", None, stage.replace(save_every=66))
        for updates in (1, 4, None):
            train(world, tmp_path / "split", updates, stage)
        whole, split = (restored(world, tmp_path / name, stage) for name in ("whole", "split"))
    assert whole.progress.guard == split.progress.guard
    assert whole.progress.guard.keys() == {bucket.name for bucket in short.buckets}
