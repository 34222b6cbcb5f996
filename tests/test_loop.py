"""The training loop: the same result on any world, stopped and resumed anywhere."""

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    CLIP,
    HALF,
    HALF_UPDATES,
    NUM_UPDATES,
    ODD,
    ODD_UPDATES,
    STAGE,
    STILL,
    Attempt,
    DrawnLatents,
    Turn,
    attempt,
    blank_state,
    files_of,
    in_turn,
    objective,
    train,
    whole_bytes,
    world_of_one,
)
from worlds import run_world

import elastic.objective
from elastic.checkpoint import published
from elastic.data.load import Samples, Step
from elastic.data.order import batch_at, updates_before
from elastic.data.permutation import Indices
from elastic.ema import EmaWeights, local
from elastic.loop import Outcome
from elastic.meter import OF_THE_MACHINES, NonFiniteLoss
from elastic.randomness import normals, sample_generator
from elastic.shard import initialise
from elastic.weights import FINISHED, WEIGHTS
from elastic.world import World
from stages import Bucket, Ema

TOLERANCE = 1e-5  # relative, on losses; the sums of a batch are taken in another order


def _copied(world: World, source: Path, folder: Path) -> Attempt:
    """Go on from the checkpoints of another folder, to the end."""
    if world.is_first:
        shutil.copytree(source, folder)
    world.barrier()
    return train(world, folder)


def _fresh(world: World, seed: int, name: str) -> tuple[dict[str, str], list[int]]:
    """Digests of fresh parameters, and how many values this rank holds of each."""
    state = blank_state(world)
    initialise(state.model, seed, name)
    whole = {k: v for k, v in whole_bytes(state).items() if k.startswith("model/")}
    parts = [p.to_local().numel() for p in state.model.parameters()]  # type: ignore[attr-defined]  # DTensors after fully_shard
    return {name: hashlib.sha256(data).hexdigest() for name, data in whole.items()}, parts


def _poisoned(world: World, folder: Path) -> tuple[str, dict[str, bytes], dict[str, bytes]]:
    """Go on with a batch in which one latent is infinite: the message, files before and after."""
    train(world, folder, stop_after=ODD_UPDATES)
    before = files_of(folder / "checkpoints")
    world.barrier()  # every rank has looked before any goes on
    plan = batch_at(STAGE, ODD, {CLIP: 23, STILL: 17})
    bad = int(objective().source.sample_ids(plan.bucket, plan.indices[:1])[0])
    with pytest.raises(NonFiniteLoss) as caught:
        train(world, folder, poisoned=bad)
    return str(caught.value), before, files_of(folder / "checkpoints")


def _stopped_twice(world: World, folder: Path) -> tuple[Attempt, list[int], Attempt]:
    """Stop where nothing is due, go on, and stop at the half; what was published in between."""
    first = train(world, folder, stop_after=ODD_UPDATES)
    positions = published(folder / "checkpoints")
    world.barrier()
    return first, positions, train(world, folder, stop_after=HALF_UPDATES - ODD_UPDATES)


def _average_in_place(world: World) -> tuple[bool, bool, bool]:
    """What the model computes and holds before, inside and after the average's block."""
    state = blank_state(world)
    initialise(state.model, 0, "a")
    for parameter in state.model.parameters():
        local(parameter.detach()).add_(0.02)  # or the layers that start at zero hide the others
    state.ema.reset()
    initialise(state.model, 0, "b")
    before = whole_bytes(state)
    swapped = {
        name: before[name.replace("model/", "ema/")] for name in before if name.startswith("model/")
    }
    probe = objective()
    outside = probe.evaluate(state.model, world)
    with state.ema.in_place():
        inside = probe.evaluate(state.model, world)
        held = whole_bytes(state)
    again = probe.evaluate(state.model, world)
    return (
        all(held[name] == value for name, value in swapped.items()),
        whole_bytes(state) == before,
        outside == again != inside,
    )


class Course(NamedTuple):
    """Attempts by name, the other results of the first rank or of both, and the folder."""

    attempts: dict[str, Attempt]
    fresh: dict[int, tuple[dict[str, str], list[int]]]
    poisoned: list[tuple[str, dict[str, bytes], dict[str, bytes]]]
    odd: tuple[Attempt, list[int], Attempt]
    in_place: tuple[bool, bool, bool]
    folder: Path


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Everything that needs several ranks, played by three processes that start once."""
    folder = tmp_path_factory.mktemp("course")
    half = folder / "half"
    turns = {
        **{f"whole-{size}": Turn(size, train, (folder / f"whole-{size}",)) for size in (1, 2, 3)},
        "half": Turn(2, train, (half, HALF_UPDATES)),
        **{f"half-{n}": Turn(n, _copied, (half, folder / f"half-{n}")) for n in (1, 2, 3)},
        "odd": Turn(2, _stopped_twice, (folder / "odd",)),
        "again": Turn(2, _copied, (folder / "whole-2", folder / "again")),
        **{f"fresh-{size}": Turn(size, _fresh, (7, "tiny")) for size in (1, 2, 3)},
        "poisoned": Turn(2, _poisoned, (folder / "poisoned",)),
        "in_place": Turn(3, _average_in_place, ()),
    }
    ranks = run_world(in_turn, 3, folder, list(turns.values()))
    first = dict(zip(turns, ranks[0], strict=True))
    return Course(
        {name: value for name, value in first.items() if isinstance(value, Attempt)},
        {size: first[f"fresh-{size}"] for size in (1, 2, 3)},
        [dict(zip(turns, results, strict=True))["poisoned"] for results in ranks[:2]],
        first["odd"],
        first["in_place"],
        folder,
    )


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def _timeless(attempt: Attempt, after: int = -1) -> list[tuple[object, ...]]:
    """The lines without what may differ between equal runs: time, speed, world, attempt."""
    return [
        (
            line["position"],
            line["context"],
            {k: v for k, v in line["values"].items() if k not in OF_THE_MACHINES},
            line["order_digest"],
        )
        for line in attempt.lines
        if line["position"] > after
    ]


def _require_equal(attempt: Attempt, reference: Attempt, after: int = -1) -> None:
    """Same positions, contexts and digests; losses within the tolerance."""
    mine, theirs = _timeless(attempt, after), _timeless(reference, after)
    assert [(a[0], a[1], a[3]) for a in mine] == [(b[0], b[1], b[3]) for b in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert isinstance(a[2], dict)
        assert isinstance(b[2], dict)
        assert a[2]["loss"] == pytest.approx(b[2]["loss"], rel=TOLERANCE, abs=0)
        assert a[2].get("lr") == b[2].get("lr")
        # AdamW hides a wrong scale of the gradient; its norm does not.
        norms = [values.get("grad_norm", 1.0) for values in (a[2], b[2])]
        assert norms[0] == pytest.approx(norms[1], rel=10 * TOLERANCE, abs=0)


def test_the_stage_makes_fifty_updates_and_learns(course: Course) -> None:
    assert updates_before(STAGE, STAGE.budget) == NUM_UPDATES
    measured = [
        line["values"]["loss"]
        for line in course.attempts["whole-1"].lines
        if line["context"] == {"subset": "held_out"}
    ]
    assert measured[-1] < 0.5 * measured[0], "nothing was learnt, so equal losses would say little"


@pytest.mark.parametrize("size", [2, 3])
def test_any_world_sees_the_same_samples_and_loses_the_same(course: Course, size: int) -> None:
    one, other = course.attempts["whole-1"], course.attempts[f"whole-{size}"]
    assert other.outcome is Outcome.FINISHED
    assert {line["world"] for line in other.lines} == {size}
    _require_equal(other, one)


def test_another_seed_is_another_run(course: Course, world: World, tmp_path: Path) -> None:
    """The control: what the comparison of worlds must be able to see."""
    seeded = train(world, tmp_path, HALF_UPDATES, STAGE.replace(seed=1))
    whole = _timeless(course.attempts["whole-1"])
    for a, b in zip(_timeless(seeded)[1:], whole[1:], strict=False):
        assert isinstance(a[2], dict)
        assert isinstance(b[2], dict)
        assert a[3] != b[3]
        assert a[2]["loss"] != pytest.approx(b[2]["loss"], rel=100 * TOLERANCE)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_half_on_two_ranks_and_the_rest_on_any_is_the_whole(course: Course, size: int) -> None:
    first, rest = course.attempts["half"], course.attempts[f"half-{size}"]
    assert first.outcome is Outcome.STOPPED
    assert first.events[-1] == ("publish", HALF, "stop")
    assert rest.events[0] == ("start", HALF, "resumed")
    assert min(line["position"] for line in rest.lines) > HALF, "nothing may be done twice"
    _require_equal(rest, course.attempts["whole-1"], after=HALF)


def test_resumed_on_an_equal_world_every_bit_is_the_same(course: Course) -> None:
    whole, rest = course.attempts["whole-2"], course.attempts["half-2"]
    assert _timeless(rest) == _timeless(whole, after=HALF)
    weights = [(course.folder / name / WEIGHTS).read_bytes() for name in ("half-2", "whole-2")]
    assert weights[0] == weights[1]


def test_told_to_stop_one_rank_stops_all_where_they_are_and_nothing_is_lost(course: Course) -> None:
    stopped, positions, rest = course.odd
    assert ODD % 11, "the position should lie inside a cycle, where nothing else is due"
    assert stopped.outcome is rest.outcome is Outcome.STOPPED
    assert stopped.events[-1] == ("publish", ODD, "stop")
    assert positions == [ODD]
    assert not (course.folder / "odd" / FINISHED).exists()
    assert rest.events == [("start", ODD, "resumed"), ("publish", HALF, "stop")]
    # Parameters, average and moments: as if the stop had not been.
    twice, once = (_tensors(course.folder / name / "checkpoints") for name in ("odd", "half"))
    assert twice.keys() == once.keys()
    assert all(torch.equal(twice[name], once[name]) for name in once)


def _tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    """The parts of every tensor that the checkpoint at the half holds."""
    files = sorted((checkpoints / str(HALF)).glob("*.safetensors"))
    return {
        f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()
    }


def test_a_finished_stage_trains_nothing_more_and_keeps_its_weights(course: Course) -> None:
    again = course.attempts["again"]
    assert again.outcome is Outcome.FINISHED
    assert again.events == [("start", STAGE.budget, "resumed")]
    assert [line["context"] for line in again.lines] == [{"subset": "held_out"}]
    assert again.lines[0]["seconds"] > 0, "how long measuring took is said"
    before, after = (files_of(course.folder / name) for name in ("whole-2", "again"))
    assert before.pop("attempt.json") != after.pop("attempt.json")
    assert before == after


def test_the_finished_weights_are_the_average_and_carry_their_digest(course: Course) -> None:
    folder = course.folder / "whole-1"
    mark = json.loads((folder / FINISHED).read_text())
    data = (folder / WEIGHTS).read_bytes()
    assert mark["weights_sha256"] == hashlib.sha256(data).hexdigest()
    assert mark["progress"]["samples"] == STAGE.budget
    newest = folder / "checkpoints" / str(STAGE.budget)
    saved = load_file(next(newest.glob("*.safetensors")))
    weights = load_file(folder / WEIGHTS)
    assert all(torch.equal(weights[name], saved[f"ema/{name}"]) for name in weights)
    assert any(not torch.equal(weights[name], saved[f"model/{name}"]) for name in weights)


def test_fresh_parameters_are_the_same_on_any_world(course: Course) -> None:
    one, two, three = (course.fresh[size] for size in (1, 2, 3))
    assert one[0] == two[0] == three[0]
    assert sum(three[1]) < sum(two[1]) < sum(one[1]), "the parameters were not sharded"


@pytest.mark.parametrize(("seed", "name"), [(8, "tiny"), (7, "other")])
def test_fresh_parameters_differ_by_seed_and_by_stage(
    course: Course, world: World, seed: int, name: str
) -> None:
    other, _ = _fresh(world, seed, name)
    one, _ = course.fresh[1]
    assert other.keys() == one.keys()
    differing = [name for name in one if one[name] != other[name]]
    constant = [name for name in one if one[name] == other[name]]
    assert differing
    # Zeros and ones are the same for every seed; the names of what is drawn are not among them.
    assert all(_is_constant(world, name) for name in constant)


def _is_constant(world: World, name: str) -> bool:
    state = blank_state(world)
    initialise(state.model, 0, "any")
    tensor = state.tensors()[name]
    return bool((tensor.full_tensor() == tensor.full_tensor().flatten()[0]).all())  # type: ignore[attr-defined]  # a DTensor


def test_a_gradient_that_is_no_number_is_named_and_changes_nothing(course: Course) -> None:
    for message, before, after in course.poisoned:
        assert "stage 'tiny': gradient norm" in message
        assert f"{ODD:,} samples" in message
        assert before
        assert after == before


def test_a_clip_that_is_in_two_buckets_is_noised_differently_in_each() -> None:
    draws = [
        normals([sample_generator(0, "tiny", "train", bucket, 0, 7)], (4,))
        for bucket in (CLIP, STILL, CLIP)
    ]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_the_average_takes_the_parameters_place_and_gives_it_back(course: Course) -> None:
    holds_average, is_restored, computes_with_it = course.in_place
    assert holds_average
    assert is_restored
    assert computes_with_it


def _slow_to_read(world: World, folder: Path) -> bool:
    """Whether this rank says that it trains only when a slow one has read what it needs."""
    read, too_early = folder / "read", []

    class Slow(DrawnLatents):
        def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
            if world.is_first and not read.exists():
                threading.Event().wait(1.0)
                read.touch()
            return super().fetch(bucket, indices)

    goal = objective()
    goal.source = Slow(STAGE, {CLIP: 23, STILL: 17}, 100)

    def beat(phase: str, position: int) -> None:
        if phase == "train" and not read.exists():
            too_early.append(position)

    attempt(world, folder / "stage", STAGE, goal, stop_after=2, beat=beat)
    return not too_early


def test_nobody_says_that_it_trains_while_another_rank_still_reads(tmp_path: Path) -> None:
    """Silence in training is a hang after a minute; reading may take longer."""
    assert run_world(_slow_to_read, 2, tmp_path) == [True, True]


def _stands_still(world: World, folder: Path) -> Outcome:
    """How a stage ends that is to stop while its first batch cannot be read."""
    goes_on = threading.Event()

    class Stalled(DrawnLatents):
        def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
            assert goes_on.wait(30), "the loop waited for storage before it saved"
            return super().fetch(bucket, indices)

    goal = objective()
    goal.source = Stalled(STAGE, {CLIP: 23, STILL: 17}, 100)

    def beat(phase: str, position: int) -> None:
        if phase == "save":
            goes_on.set()

    return attempt(world, folder, STAGE, goal, stop_after=0, beat=beat).outcome


def test_storage_that_stands_still_keeps_nobody_from_saving_and_stopping(tmp_path: Path) -> None:
    assert run_world(_stands_still, 1, tmp_path) == [Outcome.STOPPED]


def _told_to_compile(world: World, folder: Path) -> tuple[set[int], set[int]]:
    """Positions at which this rank says that something compiles, and those where it does itself."""
    torch.compile = lambda function, **how: function
    elastic.objective.text_room = lambda longest, *_: longest  # every length is one of its own
    stage = STAGE.replace(compile=True)
    goal, told, seen = objective(stage), set[int](), dict[int, frozenset[tuple[str, int]]]()
    graphs = goal.graphs

    def watched(step: Step) -> frozenset[tuple[str, int]]:
        seen[step.plan.position] = graphs(step)
        return seen[step.plan.position]

    goal.graphs = watched  # type: ignore[method-assign]

    def beat(phase: str, position: int) -> None:
        if phase == "compile":
            told.add(position)

    attempt(world, folder, stage, goal, stop_after=20, beat=beat)
    known: set[tuple[str, int]] = set()
    own = set()
    for position in sorted(seen)[:20]:
        if not seen[position] <= known:
            own.add(position)
        known |= seen[position]
    return told, own


def test_what_one_rank_compiles_is_said_by_all(tmp_path: Path) -> None:
    """The others wait for it, and their silence in training would be a hang."""
    (told, one), (told_too, other) = run_world(_told_to_compile, 2, tmp_path)
    assert one != other, "each has lengths that the other has not"
    assert told == told_too == one | other


def test_two_half_batches_move_the_average_as_far_as_one() -> None:
    model = torch.nn.Linear(5, 3)
    torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    # A ramp-up that is over at once leaves the half-life fixed.
    averages = [EmaWeights(model, Ema(halflife=40, rampup=1e9)) for _ in range(2)]
    start = averages[0].tensors["weight"].clone()
    torch.nn.init.ones_(model.weight)
    averages[0].update(16, 16)
    averages[1].update(8, 8)
    averages[1].update(16, 8)
    torch.testing.assert_close(averages[0].tensors, averages[1].tensors)
    expected = 1 + (start - 1) * 0.5 ** (16 / 40)
    torch.testing.assert_close(averages[0].tensors["weight"], expected.detach())


def test_half_the_weight_of_the_average_is_newer_than_the_halflife() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = EmaWeights(model, Ema(halflife=30, rampup=1e9))
    torch.nn.init.ones_(model.weight)
    for samples in range(6, 31, 6):
        average.update(samples, 6)
    assert math.isclose(float(average.tensors["weight"]), 0.5, rel_tol=1e-6)
