"""With exact=True the world leaves no trace: the same bits of losses, parameters and moments."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_adversarial import STAGE as JUDGED
from test_adversarial import DrawnClips
from tiny import (
    CLIP,
    STAGE,
    STILL,
    Attempt,
    Turn,
    attempt,
    in_turn,
    objective,
    train,
    world_of_one,
)
from torch import Tensor
from worlds import run_world

from elastic import shard
from elastic.data.load import deal
from elastic.data.order import batch_at
from elastic.ema import EmaWeights
from elastic.exact import fold, square_sum, totals
from elastic.fit import memory_lines
from elastic.loop import build_optimizer
from elastic.memory import state_memory
from elastic.meter import NonFiniteLoss
from elastic.objective import Reconstructing
from elastic.weights import WEIGHTS
from elastic.world import World
from stages import AdamW, AutoencoderStage, Bucket, Ema, Muon, Phase, Stage
from stages.stage import description

WORLDS = (1, 2, 3)
STOP_AFTER = 2  # updates

# Batches of 5 and 6 in micro-batches of 2 and 4: idle rounds on 2 ranks and on 3.
SHORT = STAGE.replace(
    schedule=[Phase(until=33, buckets=STAGE.schedule[0].buckets)],
    optimizer=AdamW(lr=3e-3, warmup=20, weight_decay=0.01),
    log_every=1,
)
STAGES: dict[str, Stage] = {
    "adamw": SHORT,
    "muon-bf16": SHORT.replace(
        precision="bf16", optimizer=Muon(lr=1e-3, matrix_lr=2e-2, weight_decay=0.01)
    ),
    "judged": JUDGED.replace(
        schedule=[
            Phase(until=5, buckets=[Bucket("32px", frames=4, batch=5, micro=2)]),
            Phase(until=19, buckets=[Bucket("32px", frames=4, batch=7, micro=3)]),
        ],
        adversarial=JUDGED.adversarial.replace(start=5),
    ),
}

RESIZED = ("muon-bf16", "judged")  # begun on 2 ranks, ended on 3


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def _trained(
    world: World, folder: Path, name: str, exact: bool, stop_after: int | None = None
) -> Attempt:
    """One attempt, its layers sharded in groups of their own as those of a large model are."""
    stage = STAGES[name].replace(exact=exact)
    smallest, shard.SMALLEST_GROUP = shard.SMALLEST_GROUP, 0
    try:
        if isinstance(stage, AutoencoderStage):
            goal = Reconstructing(stage, DrawnClips(23, 100), DrawnClips(5, 5000))
            return attempt(world, folder, stage, goal, stop_after)
        return train(world, folder, stop_after, stage)
    finally:
        shard.SMALLEST_GROUP = smallest


def _values(seed: int, count: int) -> Tensor:
    """Values of both signs over 80 powers of two, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-60, 20, (count,), generator=generator)
    values = torch.randn(count, generator=generator).double() * 2.0 ** exponents.double()
    values[torch.rand(count, generator=generator) < 0.1] = -0.0
    return values.float()


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def _folded(gradients_MN: Tensor, world: int) -> Tensor:
    """The sum that a world of this size makes of the gradients of M micro-batches."""
    dealt = [deal(len(gradients_MN), 1, rank, world) for rank in range(world)]
    total_N = None
    for turn in range(len(dealt[0])):
        rounds = [dealt[rank][turn] for rank in range(world)]
        rows_WN = torch.stack([gradients_MN[offset] * real for [offset], real in rounds])
        into_N = torch.empty_like(rows_WN[0])
        fold(total_N, rows_WN, into_N)
        total_N = into_N
    assert total_N is not None
    return total_N


@given(num_micros=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_gradients_add_up_alike_whoever_computes_which(num_micros: int, seed: int) -> None:
    gradients_MN = _values(seed, num_micros * 17).view(num_micros, 17)
    sums = [_bits(_folded(gradients_MN, world)) for world in range(1, 14)]
    assert all(torch.equal(sums[0], other) for other in sums[1:])


@given(num_micros=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_their_sum_is_off_by_half_an_ulp_an_addition_at_most(num_micros: int, seed: int) -> None:
    gradients_MN = _values(seed, num_micros * 17).view(num_micros, 17)
    error_N = (_folded(gradients_MN, 3).double() - gradients_MN.double().sum(0)).abs()
    size_N = gradients_MN.double().abs().sum(0)
    assert (error_N <= num_micros * 2.0**-24 * size_N).all()


@given(data=st.data(), count=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_squares_add_up_alike_in_any_order_and_any_parts(
    world: World, data: st.DataObject, count: int, seed: int
) -> None:
    values = _values(seed, count)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    ends = itertools.pairwise([0, *cuts, count])
    parts = [values[order][a:b] for a, b in ends if b > a]
    total, whole = square_sum(parts, world), square_sum([values], world)
    assert total.view(torch.int64) == whole.view(torch.int64)
    exact = math.fsum(float(value) ** 2 for value in values)
    largest = float(values.abs().max()) ** 2
    # A unit is 2^-52 of a power of four that is at most four times the largest square.
    assert abs(float(total) - exact) <= count * 2.0**-51 * largest + 2.0**-50 * exact


@pytest.mark.parametrize("size", [2.0**-149, 3e38])
def test_the_smallest_and_the_largest_values_have_squares(world: World, size: float) -> None:
    value = torch.full((3,), size)
    assert float(square_sum([value], world)) == pytest.approx(3 * float(value[0]) ** 2, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_leaves_no_sum(world: World, bad: float) -> None:
    assert math.isnan(float(square_sum([torch.tensor([1.0, bad]), torch.ones(2)], world)))
    assert float(square_sum([torch.zeros(3)], world)) == 0.0


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50))
def test_losses_are_added_with_one_rounding(world: World, values: list[float]) -> None:
    scalars = [torch.tensor(value) for value in values]
    forth, back, nothing = totals([scalars, scalars[::-1], []], world)
    assert forth == back == math.fsum(values)
    assert nothing == 0.0


def test_an_update_does_not_depend_on_where_a_value_lies() -> None:
    """What a fused AdamW on a CPU does not promise: there it depends on the place in a vector."""
    rows = 67

    def updated(first: int, last: int) -> Tensor:
        model = torch.nn.Linear(3, rows, bias=False)
        with torch.no_grad():
            model.weight = torch.nn.Parameter(_whole(0)[first:last].clone())
        average = EmaWeights(model, Ema(halflife=40))
        stepper = build_optimizer(AdamW(lr=3e-3), model, fused=False)
        for update in range(1, 4):
            model.weight.grad = _whole(update)[first:last].clone()
            stepper.step()
            average.update(8 * update, 8)
        return torch.cat([model.weight.detach(), average.tensors["weight"]], dim=1)

    def _whole(seed: int) -> Tensor:
        return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))

    whole = updated(0, rows)
    for length in (1, 2, 3, 5, 8, 11, 13, 32):
        starts = range(0, rows, length)
        parts = torch.cat([updated(at, min(at + length, rows)) for at in starts])
        assert torch.equal(_bits(parts), _bits(whole)), length


def _spread(world: World, values: Tensor) -> tuple[float, float]:
    """The sum of squares where each rank holds some of the values; and with NaN on the last one."""
    mine = values[world.rank :: world.size]
    spoilt = torch.cat([mine, torch.tensor([math.nan] * (world.rank == world.size - 1))])
    return float(square_sum([mine], world)), float(square_sum([spoilt], world))


class Course(NamedTuple):
    """Results of the first rank by the name of the turn, and the folder."""

    results: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Everything that needs several ranks, played by three processes that start once."""
    folder = tmp_path_factory.mktemp("course")
    whole = [("adamw", size) for size in WORLDS] + [(name, 1) for name in RESIZED]
    turns = {
        f"{name}-{size}": Turn(size, _trained, (folder / f"{name}-{size}", name, True))
        for name, size in whole
    }
    for name in RESIZED:
        resized = folder / f"{name}-resized"
        turns[f"{name}-stopped"] = Turn(2, _trained, (resized, name, True, STOP_AFTER))
        turns[f"{name}-resized"] = Turn(3, _trained, (resized, name, True))
    for size in WORLDS[:2]:
        turns[f"plain-{size}"] = Turn(size, _trained, (folder / f"plain-{size}", "adamw", False))
    for size in WORLDS:
        turns[f"squares-{size}"] = Turn(size, _spread, (_values(5, 1000),))
    results = run_world(in_turn, max(WORLDS), folder, list(turns.values()))[0]
    return Course(dict(zip(turns, results, strict=True)), folder)


def _said(attempt: Attempt) -> list[tuple[int, dict[str, str], dict[str, float], str]]:
    """What the lines say that is no time or speed."""
    timed = {"samples_per_s", "tokens_per_s", "data_wait"}
    return [
        (
            line["position"],
            line["context"],
            {k: v for k, v in line["values"].items() if k not in timed},
            line["order_digest"],
        )
        for line in attempt.lines
    ]


def _differing(course: Course, one: str, other: str) -> int:
    """How many values of the finished weights differ in their bits."""
    weights = [load_file(course.folder / name / WEIGHTS) for name in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    return sum(int((_bits(w) != _bits(weights[1][name])).sum()) for name, w in weights[0].items())


@pytest.mark.parametrize("size", WORLDS[1:])
def test_every_line_and_every_parameter_has_the_same_bits_on_any_world(
    course: Course, size: int
) -> None:
    one, other = (course.results[f"adamw-{n}"] for n in (1, size))
    assert {line["world"] for line in other.lines} == {size}
    contexts = [line["context"] for line in one.lines]
    assert {"subset": "held_out"} in contexts
    assert sum("grad_norm" in line["values"] for line in one.lines) >= 3
    assert _said(other) == _said(one)
    assert _differing(course, "adamw-1", f"adamw-{size}") == 0


@pytest.mark.parametrize("name", RESIZED)
def test_two_ranks_and_then_three_leave_no_trace(course: Course, name: str) -> None:
    stopped, rest = course.results[f"{name}-stopped"], course.results[f"{name}-resized"]
    at = stopped.lines[-1]["position"]
    assert rest.events[0] == ("start", at, "resumed")
    whole = _said(course.results[f"{name}-1"])
    assert len(whole) > len([line for line in whole if line[0] <= at]) + 2
    assert _said(stopped) == [line for line in whole if line[0] <= at]
    assert _said(rest) == [line for line in whole if line[0] > at]
    assert _differing(course, f"{name}-1", f"{name}-resized") == 0


def test_without_exact_the_world_shows_in_the_last_bits(course: Course) -> None:
    """The control: what the comparison of worlds must be able to see."""
    one, two = (course.results[f"plain-{size}"] for size in (1, 2))
    assert _said(one) != _said(two)
    assert _differing(course, "plain-1", "plain-2") > 100
    # And exact sums are no other training: the numbers agree beyond those bits.
    exact = course.results["adamw-1"]
    for plain, line in zip(one.lines, exact.lines, strict=True):
        assert line["values"]["loss"] == pytest.approx(plain["values"]["loss"], rel=1e-5)


def test_the_norm_is_the_same_however_the_values_are_sharded(course: Course) -> None:
    (one, spoilt), *others = [course.results[f"squares-{size}"] for size in WORLDS]
    assert math.isfinite(one)
    assert math.isnan(spoilt)
    for other, spoilt in others:
        assert other == one
        assert math.isnan(spoilt), "the NaN of one rank was lost"


def test_a_gradient_that_is_no_number_is_refused(world: World, tmp_path: Path) -> None:
    first = batch_at(SHORT, 0, {CLIP: 23, STILL: 17})
    source = objective(SHORT).source
    bad = int(source.sample_ids(first.bucket, first.indices[:1])[0])
    with pytest.raises(NonFiniteLoss, match="gradient norm nan at 0 samples"):
        train(world, tmp_path, stage=SHORT.replace(exact=True), poisoned=bad)
    assert not torch.are_deterministic_algorithms_enabled(), "left behind"


def test_layers_computed_again_have_the_same_bits(world: World, tmp_path: Path) -> None:
    """`recompute` may change between attempts, with exact=True too."""
    stage = SHORT.replace(exact=True, recompute="full")
    again = train(world, tmp_path, STOP_AFTER, stage)
    kept = train(world, tmp_path / "kept", STOP_AFTER, stage.replace(recompute="none"))
    assert _said(again) == _said(kept)


def test_the_micro_batch_is_a_part_of_an_exact_result_and_of_no_other() -> None:
    larger = STAGES["adamw"].replace(
        schedule=[Phase(until=33, buckets=[b.replace(micro=5) for b in SHORT.buckets])]
    )
    assert description(larger) == description(SHORT)
    exact = [description(stage.replace(exact=True)) for stage in (larger, SHORT)]
    assert exact[0] != exact[1]
    assert description(SHORT) != exact[1]


@pytest.mark.parametrize("kind", ["adamw", "judged"])
def test_plan_names_what_exact_sums_take(kind: str) -> None:
    stage = STAGES[kind].replace(workers=(2, 2))
    plain, exact = (state_memory(s, s.build(), 2) for s in (stage, stage.replace(exact=True)))
    assert plain.exact == 0
    assert exact.exact == exact.total - plain.total > 0
    lines = list(memory_lines(stage.replace(exact=True), stage.build(), 2))
    assert ", exact " in lines[0]
    assert ", exact " not in next(memory_lines(stage, stage.build(), 2))
