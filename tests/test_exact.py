"""With exact=True the world leaves no trace: the same bits of losses, parameters and moments."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from test_adversarial import STAGE as JUDGED
from test_adversarial import DrawnClips
from test_exact_sums import bits, drawn
from tiny import (
    CLIP,
    STAGE,
    STILL,
    Attempt,
    Turn,
    attempt,
    in_turn,
    objective,
    restored,
    train,
    whole_bytes,
    world_of_one,
)
from torch import Tensor
from worlds import run_world

from elastic import shard
from elastic.data.order import batch_at
from elastic.exact import (
    ChangedLayout,
    OrderedGradients,
    square_sum,
)
from elastic.fit import sample_layers
from elastic.memory import peak_memory
from elastic.meter import OF_THE_MACHINES, NonFiniteLoss
from elastic.objective import Objective, Reconstructing
from elastic.weights import WEIGHTS
from elastic.world import World
from stages import AdamW, AutoencoderStage, Bucket, Muon, Phase, Stage
from stages.identity import description

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
    goal = _goal(stage)
    smallest, shard.SMALLEST_GROUP = shard.SMALLEST_GROUP, 0
    try:
        return attempt(world, folder, stage, goal, stop_after)
    finally:
        shard.SMALLEST_GROUP = smallest


def _goal(stage: Stage) -> Objective:
    if isinstance(stage, AutoencoderStage):
        return Reconstructing(stage, DrawnClips(23, 100), DrawnClips(5, 5000))
    return objective(stage)


def _states(world: World, runs: list[tuple[Path, str]]) -> dict[str, dict[str, str]]:
    """A digest of each tensor of each run's last checkpoint, read by one rank whoever wrote it."""
    states = {}
    for folder, name in runs:
        state = restored(world, folder, STAGES[name], _goal(STAGES[name]))
        assert state.progress.samples == STAGES[name].budget
        states[folder.name] = {
            tensor: hashlib.sha256(data).hexdigest() for tensor, data in whole_bytes(state).items()
        }
    return states


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
        turns[f"squares-{size}"] = Turn(size, _spread, (drawn(5, 1000),))
    ended = [turn.arguments for name, turn in turns.items() if turn.function is _trained]
    runs = {folder: name for folder, name, *_ in ended}  # those that were resized have two turns
    turns["refused"] = Turn(2, _refused, ())
    turns["states"] = Turn(1, _states, (list(runs.items()),))
    results = run_world(in_turn, max(WORLDS), folder, list(turns.values()))[0]
    return Course(dict(zip(turns, results, strict=True)), folder)


def _said(attempt: Attempt) -> list[tuple[int, dict[str, str], dict[str, float], str]]:
    """What the lines say that is no time or speed."""
    return [
        (
            line["position"],
            line["context"],
            {k: v for k, v in line["values"].items() if k not in OF_THE_MACHINES},
            line["order_digest"],
        )
        for line in attempt.lines
    ]


def _differing(course: Course, one: str, other: str) -> int:
    """How many values of the finished weights differ in their bits."""
    weights = [load_file(course.folder / name / WEIGHTS) for name in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    return sum(int((bits(w) != bits(weights[1][name])).sum()) for name, w in weights[0].items())


def _same_state(course: Course, one: str, other: str) -> bool:
    """Whether every tensor of the last checkpoints has the same bits."""
    return bool(course.results["states"][one] == course.results["states"][other])


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
    assert _same_state(course, "adamw-1", f"adamw-{size}")


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
    assert _same_state(course, f"{name}-1", f"{name}-resized")
    kinds = {tensor.partition("/")[0] for tensor in course.results["states"][f"{name}-1"]}
    assert {"model", "ema", "exp_avg", "exp_avg_sq"} <= kinds
    assert ({"critic", "critic_exp_avg", "critic_exp_avg_sq"} <= kinds) == (name == "judged")


def test_without_exact_the_world_shows_in_the_lastbits(course: Course) -> None:
    """The control: what the comparison of worlds must be able to see."""
    one, two = (course.results[f"plain-{size}"] for size in (1, 2))
    assert _said(one) != _said(two)
    assert _differing(course, "plain-1", "plain-2") > 100
    assert not _same_state(course, "plain-1", "plain-2")
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


class Changing(torch.nn.Module):
    """Moves one of two layers of one size: sums of their gradients have the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, number: int) -> Tensor:
        return self.layers[number](torch.ones(4)).sum()


def _refused(world: World) -> list[str]:
    """What is said where rounds move the same layer, where they do not, and what follows that."""
    said = []
    for numbers in ([0, 0], [0, 1], [1, 1]):
        model = shard.shard(Changing(), world)
        ordered = OrderedGradients(model, world)
        try:
            for turn, number in enumerate(numbers):
                ordered.begin_round(turn + 1 == len(numbers))
                model(number).backward()
            ordered.finish()
            said.append("")
        except ChangedLayout as error:
            said.append(str(error))
    return said


def test_rounds_that_move_other_parameters_are_refused(course: Course) -> None:
    same, changed, again = course.results["refused"]
    assert same == again == ""
    assert "only some rounds move layers.0.weight, layers.1.weight" in changed


def test_layers_computed_again_have_the_samebits(world: World, tmp_path: Path) -> None:
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
def test_what_exact_sums_take_is_planned(kind: str) -> None:
    stage = STAGES[kind].replace(workers=(2, 2))
    bucket = stage.buckets[0].replace(micro=stage.buckets[0].batch)  # one round, whatever is exact
    module = stage.build()
    layers = [layer.of(0) for layer in sample_layers(stage, module, bucket, "none")]
    plain, exact = (
        peak_memory(one, module, bucket, 2, layers).total
        for one in (stage, stage.replace(exact=True))
    )
    assert plain < exact
