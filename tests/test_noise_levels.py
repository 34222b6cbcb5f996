"""Losses by level of noise: found on any world, without a change to what is trained."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    CLIP,
    STAGE,
    STILL,
    Attempt,
    DrawnLatents,
    Turn,
    attempt,
    in_turn,
    losses_of,
    objective,
    world_of_one,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import run_world

from elastic.data.load import Samples, rounds_of
from elastic.data.order import BatchPlan
from elastic.level_names import CENTRES, NUM_LEVELS, level_counts, level_means
from elastic.meter import OF_THE_MACHINES, Meter
from elastic.noise_levels import by_level, level_rounds
from elastic.objective import FlowMatching, Losses
from elastic.state import Progress
from elastic.weights import WEIGHTS
from elastic.world import World
from stages import AdamW, Bucket, DiffusionStage, Phase

SHORT = STAGE.replace(
    schedule=[Phase(until=33, buckets=STAGE.schedule[0].buckets)],
    optimizer=AdamW(lr=3e-3),
    evaluate_every=20,
    log_every=11,
)
WORLDS = (1, 2, 3)


@given(
    samples=st.lists(
        st.tuples(st.floats(0, 1, width=32), st.floats(0, 9, width=32), st.sampled_from([0.0, 1.0]))
    )
)
def test_each_sample_is_in_the_level_that_its_time_lies_in(
    samples: list[tuple[float, float, float]],
) -> None:
    t_N, loss_N, weight_N = torch.tensor(samples).reshape(-1, 3).unbind(1)
    sums = by_level(t_N, loss_N, weight_N).sum(0).tolist()
    means, counts = level_means(sums), level_counts(sums)
    for level in range(NUM_LEVELS):
        low, high = level / 8, (level + 1) / 8 + (level == 7)  # pure noise is in the last one
        mine = [loss for t, loss, weight in samples if weight and low <= t < high]
        assert counts.get(f"samples_t{level}", 0) == len(mine)
        assert means.get(f"loss_t{level}") == (pytest.approx(np.mean(mine)) if mine else None)


def test_a_loss_that_is_no_number_is_one_in_its_own_level_alone() -> None:
    rows = by_level(torch.tensor([0.1, 0.9]), torch.tensor([1.0, torch.nan]), torch.ones(2))
    assert rows.sum(0)[:NUM_LEVELS].isnan().tolist() == [False] * 7 + [True]


class Empty(DrawnLatents):
    """Latents of zeros: a point on the path is t times the noise."""

    def fetch(self, bucket: Bucket, indices: Any) -> Samples:
        found = super().fetch(bucket, indices)
        found.x_BCTHW.zero_()
        return found


class WrongWhereNoisy(nn.Module):
    """Knows the velocity of latents of zeros, and is off by one from t = 3/4 on."""

    def forward(self, z: Tensor, t: Tensor, *rest: Tensor | None) -> Tensor:
        t_B1111 = t[:, None, None, None, None]
        return z / t_B1111 + (t_B1111 >= 0.75)


def _empty(stage: DiffusionStage) -> FlowMatching:
    sources = (Empty(stage, dict.fromkeys((CLIP, STILL), n), n) for n in (400, 20))
    return FlowMatching(stage, *sources, stage.text.null())


def test_a_model_that_is_wrong_where_it_is_noisy_is_found_there_on_held_out_clips() -> None:
    with world_of_one() as world:
        found = _empty(STAGE).evaluate(WrongWhereNoisy(), world)
    levels = [found[f"loss_t{level}"] for level in range(NUM_LEVELS)]
    assert levels == pytest.approx([0] * 6 + [1] * 2, abs=1e-5)
    assert 0 < found["loss"] < 1, "the mean over all times does not say where"


def test_a_model_that_is_wrong_where_it_is_noisy_is_found_there_in_training() -> None:
    goal, lines = _empty(STAGE), list[dict[str, Any]]()
    bucket = STAGE.buckets[0].replace(batch=400, micro=50)
    plan = BatchPlan(0, bucket, np.arange(400), np.zeros(400, dtype=int))
    with world_of_one() as world:
        meter = Meter(STAGE, world, 1, lines.append)
        micros = list(rounds_of([plan], goal.source, 0, 1))
        for micro in micros:
            losses = losses_of(goal, WrongWhereNoisy(), micro)
            meter.add_losses(micro, losses, micro.samples.weight_B)
        inputs = [goal.inputs(micro, torch.device("cpu")) for micro in micros]
        meter._counts = {bucket.name: 400}
        meter.flush(Progress(STAGE.name, 400))
    values = lines[-1]["values"]
    levels = [values[f"loss_t{level}"] for level in range(NUM_LEVELS)]
    assert levels == pytest.approx([0] * 6 + [1] * 2, abs=1e-5)
    times = np.concatenate([each.t_B.numpy() for each in inputs if each.t_B is not None])
    counts = np.histogram(times, bins=NUM_LEVELS, range=(0, 1))[0]
    assert [values[f"samples_t{level}"] for level in range(NUM_LEVELS)] == counts.tolist()


class Refusing(TorchDispatchMode):
    """Nothing may bring a value to the host."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function not in (torch.ops.aten._local_scalar_dense.default,), function
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_when_a_micro_batch_is_counted() -> None:
    micro = next(rounds_of([BatchPlan(0, STAGE.buckets[0], np.arange(2), np.zeros(2, dtype=int))],
                           objective().source, 0, 1))  # fmt: skip
    losses = losses_of(objective(), WrongWhereNoisy(), micro)
    with world_of_one() as world:
        meter = Meter(STAGE, world, 1, lambda line: None)
        with Refusing():
            meter.add_losses(micro, losses, micro.samples.weight_B)
        with Refusing(), pytest.raises(AssertionError, match="_local_scalar_dense"):
            losses.model_B.sum().item()  # the control


class Blind(FlowMatching):
    """As it was before losses were told apart by their times."""

    def losses(self, model: nn.Module, inputs: Any) -> Losses:
        return super().losses(model, inputs)._replace(t_B=None)

    def _level_losses(self, model: nn.Module, world: World) -> dict[str, float]:
        return {}


def _trained(world: World, folder: Path, blind: bool) -> Attempt:
    goal = objective(SHORT)
    if blind:
        goal = Blind(SHORT, goal.source, goal.held_out, goal.null)
    return attempt(world, folder, SHORT, goal)


def _rounds(world: World, micro: int, held_out: int) -> list[tuple[int, int, int]]:
    """What this rank measures that counts: sample, level, and the time in sixteenths."""
    stage = STAGE.replace(held_out=held_out)
    source = DrawnLatents(stage, dict.fromkeys((CLIP, STILL), 80), 5000)
    goal = FlowMatching(stage, source, source, stage.text.null())
    bucket, found = stage.buckets[0].replace(batch=64, micro=micro), []
    for each in level_rounds(source, stage, bucket, world):
        t_B = goal._inputs(each, torch.device("cpu"), "level", "none").t_B
        assert t_B is not None
        rows = zip(each.samples.ids, each.epochs, t_B, each.samples.weight_B, strict=True)
        found += [(int(i), int(level), int(16 * t)) for i, level, t, w in rows if w]
    return found


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Any]], Path]:
    """Each rank's results by the name of the turn, and the folder."""
    folder = tmp_path_factory.mktemp("course")
    turns = {
        f"{name}-{size}": Turn(size, _trained, (folder / f"{name}-{size}", name == "blind"))
        for name, size in (("sees", 1), ("sees", 2), ("sees", 3), ("blind", 1), ("blind", 3))
    }
    turns |= {f"rounds-{n}": Turn(n, _rounds, (micro, 64)) for n, micro in ((1, 64), (3, 5))}
    ranks = run_world(in_turn, max(WORLDS), folder, list(turns.values()))
    return {
        name: [results[number] for results in ranks] for number, name in enumerate(turns)
    }, folder


@pytest.mark.parametrize("size", WORLDS[1:])
def test_any_world_finds_the_same_losses_by_level(
    course: tuple[dict[str, list[Any]], Path], size: int
) -> None:
    one, other = (course[0][f"sees-{n}"][0] for n in (1, size))
    seen = Counter[str]()
    for mine, theirs in zip(one.lines, other.lines, strict=True):
        assert mine["position"] == theirs["position"]
        names = [name for name in mine["values"] if name.startswith(("loss_t", "samples_t"))]
        for name in names:
            assert theirs["values"][name] == pytest.approx(mine["values"][name], rel=1e-4)
        assert sum(mine["values"].get(f"samples_t{k}", 0) for k in range(8)) in (0, 11)
        seen[str(mine["context"])] += len(names)
    assert seen["{'subset': 'held_out'}"] == 3 * NUM_LEVELS  # at the begin, at 20 and at the end
    assert seen["{}"] > 3 * NUM_LEVELS, "of three lines, with losses and counts"


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_trained_and_logged_otherwise_keeps_every_bit(
    course: tuple[dict[str, list[Any]], Path], size: int
) -> None:
    results, folder = course
    sees, blind = (results[f"{name}-{size}"][0] for name in ("sees", "blind"))
    assert len(sees.lines) > 8
    for mine, theirs in zip(sees.lines, blind.lines, strict=True):
        assert mine["order_digest"] == theirs["order_digest"]
        assert (
            mine["values"].items()
            >= {
                name: value
                for name, value in theirs["values"].items()
                if name not in OF_THE_MACHINES
            }.items()
        )
        assert not any(name.startswith("loss_t") for name in theirs["values"])
    weights = [(folder / f"{name}-{size}" / WEIGHTS).read_bytes() for name in ("sees", "blind")]
    assert weights[0] == weights[1]


def test_any_world_measures_the_same_clips_at_the_same_levels(
    course: tuple[dict[str, list[Any]], Path],
) -> None:
    one, three = course[0]["rounds-1"][0], [row for rank in course[0]["rounds-3"] for row in rank]
    assert sorted(one) == sorted(three)
    assert len(one) == 16, "a quarter of the 64 clips that are measured otherwise"
    assert Counter(level for _, level, _ in one) == dict.fromkeys(range(NUM_LEVELS), 2)
    assert all(t == 2 * level + 1 for _, level, t in one)


@pytest.mark.parametrize(("held_out", "expected"), [(1, 8), (5, 8), (31, 8), (64, 16), (80, 16)])
def test_every_level_has_as_many_clips_however_many_are_held_out(
    held_out: int, expected: int
) -> None:
    with world_of_one() as world:
        rows = _rounds(world, 4, held_out)
    assert len(set(rows)) == len(rows) == expected
    assert set(Counter(level for _, level, _ in rows).values()) == {expected // NUM_LEVELS}
    assert len({number for number, *_ in rows}) == min(held_out, expected)


def test_two_stages_are_measured_with_the_same_noise_at_the_same_times() -> None:
    """So that two shifts, or two starts, can be compared clip by clip."""
    stages = (STAGE, STAGE.replace(name="other", seed=9))
    with world_of_one() as world:
        drawn = [
            [
                goal._inputs(micro, torch.device("cpu"), "level", "none")
                for micro in level_rounds(goal.held_out, stage, stage.buckets[0], world)
            ]
            for stage, goal in ((stage, objective(stage)) for stage in stages)
        ]
    for one, other in zip(*drawn, strict=True):
        assert one.noise_BCTHW is not None
        assert other.noise_BCTHW is not None
        assert torch.equal(one.noise_BCTHW, other.noise_BCTHW)
        assert one.t_B is not None
        assert other.t_B is not None
        assert torch.equal(one.t_B, other.t_B)
        assert set(one.t_B.tolist()) <= set(CENTRES)


def test_without_held_out_clips_nothing_is_said() -> None:
    goal = objective()
    nothing = DrawnLatents(STAGE, dict.fromkeys((CLIP, STILL), 0), 5000)
    with world_of_one() as world:
        found = FlowMatching(STAGE, goal.source, nothing, goal.null).evaluate(
            WrongWhereNoisy(), world
        )
    assert found == {}
