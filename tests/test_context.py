"""Ranks that share a sample's tokens, and models held several times: the losses of one rank."""

import re
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from test_adversarial import STAGE as JUDGED
from test_loop import TOLERANCE
from test_muon import MUON
from tiny import CLIP, STAGE, STILL, Attempt, Turn, attempt, in_turn, losses_of, objective, train
from torch._dynamo.testing import CompileCounterWithBackend
from wire import SameCaption, Wire, total
from worlds import run_world

from elastic import shard as sharding
from elastic.data.load import held_out_rounds
from elastic.ema import local
from elastic.errors import InputError
from elastic.fit import check_fit, needed, workers_on
from elastic.forecast import forecast
from elastic.inputs import Inputs
from elastic.loop import clip_gradients
from elastic.memory import HEADROOM, activations, state_memory
from elastic.shard import initialise, shard
from elastic.traffic import update_traffic
from elastic.world import World
from models.blocks import Block
from models.context import Context
from stages import Bucket, DiffusionStage, Given, Phase, Plan
from stages.identity import description

# 1 to 3 tokens of text and 4 or 8 of video: few of these sums are multiples of 2 or 3, some ranks
# have no text, and in stills some have nothing but text.
WIDE = STAGE.replace(
    model=STAGE.model.replace(heads=6, width=48, image_condition=True),
    given=Given(),
    evaluate_every=44,
)
WHOLE, UPDATES = 44, 8  # positions with a line of the log, and the updates before them
HALF, HALF_UPDATES = 22, 4


def shared(
    context: int, shard_within: int | None = None, stage: DiffusionStage = WIDE, **more: Any
) -> DiffusionStage:
    """A stage whose ranks share tokens, whose model is held by groups, or both."""
    return stage.replace(context=context, shard_within=shard_within, workers=(12, 24), **more)


WITH_MUON = WIDE.replace(optimizer=MUON.optimizer)
# Name: ranks, stage.
ONES = {"plain": (1, WIDE), "muon": (1, WITH_MUON)}
LAYOUTS = {
    "plain, context 3": (3, shared(3)),
    "plain, 2 x context 2, recomputed": (4, shared(2, recompute="selective")),
    "plain, HSDP 2 x 2": (4, shared(1, 2)),
    "plain, replicas": (2, shared(1, 1)),
    "muon, HSDP 2 x 2, context 2": (4, shared(2, 2, WITH_MUON)),
}
COUNTED = shared(2, 2, WITH_MUON, text_dropout=0.0)
EXCHANGED = {"two ranks": (2, WIDE.replace(workers=(2, 2))), "pairs": (4, shared(1, 2))}
RESTS = {"alone": (1, WIDE), "HSDP 2 x 2": (4, shared(1, 2))}


def _copied(world: World, source: Path, folder: Path, stage: DiffusionStage) -> Attempt:
    """Go on from another layout's checkpoint, for a few updates."""
    if world.is_first:
        shutil.copytree(source, folder)
    world.barrier()
    return train(world, folder, UPDATES - HALF_UPDATES, stage)


def _each_round(
    world: World, folder: Path, updates: int, stage: DiffusionStage
) -> tuple[Attempt, int]:
    """Train as a model does that is too large to keep whole gradients; and the most that it kept.

    What it kept is in values, of all parameters together, while a round ends that is not the last.
    """
    most = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MOST_WHOLE", 0)
        goal = objective(stage)
        inner = goal.losses

        def losses(model: Any, inputs: Inputs) -> Any:
            nonlocal most
            values = [getattr(p, "grad", None) for p in model.parameters()]
            most = max(most, sum(local(g).numel() for g in values if g is not None))
            return inner(model, inputs)

        patch.setattr(goal, "losses", losses)
        return attempt(world, folder, stage, goal, stop_after=updates), most


def _refused(world: World, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        train(world, folder, 1, shared(2))
    return str(caught.value)


def _compiled(world: World) -> tuple[list[tuple[float, float]], int]:
    """Loss and gradient norm of some clips before blocks are compiled and after; the graphs."""
    world = world.arranged(2, None)
    goal = objective(WIDE)
    model = shard(goal.build(), world)
    initialise(model, 0, "any")
    for parameter in model.parameters():
        local(parameter.detach()).add_(0.02)  # or the layers that start at zero hide the others
    micro = next(held_out_rounds(goal.source, WIDE.replace(held_out=2), WIDE.buckets[0], world))
    counter = CompileCounterWithBackend("aot_eager")  # what is traced; no compiler is needed
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            for block in model.modules():
                if isinstance(block, Block):
                    block._run = torch.compile(  # type: ignore[method-assign]
                        block._run, fullgraph=True, dynamic=False, backend=counter
                    )
        weighted_B = losses_of(goal, model, micro).both_B * micro.samples.weight_B
        weighted_B.sum().backward()
        norm = clip_gradients(model, 1.0, world)
        model.zero_grad()
        found.append((float(world.sum(weighted_B.detach().sum())), float(norm)))
    return found, counter.frame_count


def _counted(world: World, folder: Path, stage: DiffusionStage) -> tuple[float, set[str]]:
    """Bytes that all ranks together send in the third update, which is one of clips."""
    goal = objective(stage)
    goal.source = SameCaption(stage, {CLIP: 23, STILL: 17}, 100)
    with Wire() as wire:
        attempt(world, folder, stage, goal, stop_after=4, beat=wire.beat)
    return total(wire.at_updates[3] - wire.at_updates[2]), wire.unknown


class Course(NamedTuple):
    """What the first rank got of each turn, and the folder."""

    attempts: dict[str, Attempt]
    exchanged: dict[str, tuple[Attempt, int]]
    refused: str
    counted: tuple[float, set[str]]
    folder: Path


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Everything that needs several ranks, played by four processes that start once."""
    folder = tmp_path_factory.mktemp("course")
    half = folder / "half"
    turns = {
        name: Turn(size, train, (folder / name, UPDATES, stage))
        for name, (size, stage) in (ONES | LAYOUTS).items()
    }
    turns["half"] = Turn(4, train, (half, HALF_UPDATES, shared(2, 2)))
    for name, (size, stage) in RESTS.items():
        turns[name] = Turn(size, _copied, (half, folder / name, stage))
    for name, (size, stage) in EXCHANGED.items():
        turns[name] = Turn(size, _each_round, (folder / name, HALF_UPDATES, stage))
    turns["refused"] = Turn(3, _refused, (folder / "refused",))
    turns["counted"] = Turn(4, _counted, (folder / "counted", COUNTED))
    results = dict(zip(turns, run_world(in_turn, 4, folder, list(turns.values()))[0], strict=True))
    attempts = {name: value for name, value in results.items() if isinstance(value, Attempt)}
    exchanged = {name: results[name] for name in EXCHANGED}
    return Course(attempts, exchanged, results["refused"], results["counted"], folder)


def require_equal(attempt: Attempt, reference: Attempt) -> None:
    """Same positions, order and losses, wherever both have a line."""
    found = {(line["position"], *line["context"].values()): line for line in reference.lines}
    assert attempt.lines
    for mine in attempt.lines:
        theirs = found[mine["position"], *mine["context"].values()]
        assert mine["order_digest"] == theirs["order_digest"]
        by_level = {name for name in mine["values"] if name.startswith(("loss_t", "samples_t"))}
        for name in {"loss", "loss_head", "grad_norm", "lr"} & mine["values"].keys() | by_level:
            # AdamW hides a wrong scale of the gradient; its norm does not.
            slack = 10 * TOLERANCE if name == "grad_norm" else TOLERANCE
            assert mine["values"][name] == pytest.approx(theirs["values"][name], rel=slack, abs=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_sees_the_same_samples_and_loses_the_same(course: Course, name: str) -> None:
    one = course.attempts[name.partition(",")[0]]
    assert {"loss_head", "grad_norm", "loss_t4", "samples_t4"} <= {
        key for line in one.lines for key in line["values"]
    }
    require_equal(course.attempts[name], one)
    assert len(course.attempts[name].lines) == len(one.lines)


@pytest.mark.parametrize("name", RESTS)
def test_saved_by_one_layout_any_other_goes_on(course: Course, name: str) -> None:
    rest = course.attempts[name]
    assert rest.events[0] == ("start", HALF, "resumed")
    assert max(line["position"] for line in rest.lines) == WHOLE
    require_equal(rest, course.attempts["plain"])


@pytest.mark.parametrize("name", EXCHANGED)
def test_gradients_that_do_not_wait_whole_train_the_same(course: Course, name: str) -> None:
    """Held by two: what is left of a round is at most half of the values, and padding."""
    found, most = course.exchanged[name]
    require_equal(found, course.attempts["plain"])
    count = sum(parameter.numel() for parameter in WIDE.build().parameters())
    assert most <= 0.51 * count
    if name == "two ranks":  # replicas' sums wait where FSDP has them
        assert most > 0.49 * count


def test_replicas_write_each_value_once(course: Course) -> None:
    files = sorted((course.folder / "half" / "checkpoints" / str(HALF)).glob("*.safetensors"))
    assert len(files) > 2, "the second replica writes nothing"
    rows: Counter[str] = Counter()
    for path in files:
        with safe_open(path, "pt") as file:
            rows.update({name: file.get_slice(name).get_shape()[0] for name in file.keys()})  # noqa: SIM118  # no dict
    for name, parameter in WIDE.build().named_parameters():
        assert rows[f"model/{name}"] == rows[f"ema/{name}"] == len(parameter), name


def test_a_world_that_cannot_be_cut_is_refused(course: Course) -> None:
    assert (
        course.refused == "a world of 3 with context=2: it must be a multiple of that; nearest: 2"
    )


def test_compiled_blocks_exchange_within_one_graph() -> None:
    (plain, compiled), num_graphs = run_world(_compiled, 2)[0]
    assert num_graphs == 2, "one for each kind of block"
    assert compiled == pytest.approx(plain, rel=TOLERANCE, abs=0)


def test_what_an_update_sends_is_what_the_formula_says(course: Course) -> None:
    sent, unknown = course.counted
    assert not unknown
    expected = update_traffic(COUNTED, COUNTED.build(), COUNTED.buckets[0], 3, 4)
    assert min(vars(expected).values()) > 0
    # Beside it go a few numbers, and what fills up rows that two ranks cannot halve.
    assert sent == pytest.approx(expected.total, rel=0.01)


@given(text=st.integers(0, 40), video=st.integers(1, 200), size=st.integers(1, 9))
def test_ranks_hold_runs_of_the_joint_sequence(text: int, video: int, size: int) -> None:
    shares = [Context(cast(Any, None), rank, size).share(text, video) for rank in range(size)]
    tokens = [("text", n) for n in range(text)] + [("video", n) for n in range(video)]
    held = [
        [("text", n) for n in range(text)[share.text]]
        + [("video", n) for n in range(video)[share.video]]
        for share in shares
    ]
    assert list(chain(*held)) == tokens
    assert [tokens[share.joint] for share in shares] == held
    assert max(map(len, held)) - min(map(len, held)) <= 1


WRONG = {
    "context 4: .* share of the 6 heads, .* nearest: 3": {"context": 4, "workers": (4, 8)},
    r"workers \(1, 64\) with context=2, .* multiples of 2; nearest: workers=\(2, 64\)": {
        "context": 2
    },
    r"multiples of 6; nearest: workers=\(6, 6\)": {
        "context": 2, "shard_within": 3, "workers": (2, 5)
    },
    "exact True with context=2": {"context": 2, "exact": True, "workers": (2, 2)},
    "exact True with context=1, shard_within=1": {"shard_within": 1, "exact": True},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_cut_is_refused_with_the_nearest_that_can(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WIDE.replace(**WRONG[message])


def test_an_autoencoder_has_no_tokens_to_share() -> None:
    with pytest.raises(ValueError, match="context 2: the tokens of a DiT can be shared"):
        JUDGED.replace(context=2, workers=(2, 2))
    assert JUDGED.replace(shard_within=2, workers=(2, 2)).multiple == 2


def test_a_stage_may_go_on_in_another_layout() -> None:
    assert description(shared(3, 2)) == description(WIDE)


def test_the_plan_says_who_holds_and_who_shares(tmp_path: Path) -> None:
    said = forecast(Plan("p", [shared(3, 2)]), tmp_path, gpus=20)
    assert (
        "workers     12 to 24, in multiples of 6; of 18, 9 x 2 hold the model and 6 x 3 share the "
        "tokens of a sample"
    ) in said
    assert re.search(r"memory +on each of 18", said)
    assert workers_on(shared(3, 2), 20) == 18
    assert "workers     1 to 64\n" in forecast(Plan("p", [WIDE]), tmp_path)


def test_memory_is_planned_by_who_holds_and_who_shares() -> None:
    long = WIDE.replace(
        schedule=[Phase(until=288, buckets=[Bucket("256px", frames=33, batch=96, micro=4)])]
    )
    module, bucket = long.build(), long.buckets[0]
    split, held = shared(3, stage=long), shared(1, 2, stage=long)
    kept = [activations(stage, bucket, 2, "none") for stage in (long, split)]
    assert kept[1] == pytest.approx(kept[0] / 3, rel=1e-3)
    states = [state_memory(stage, module, n) for stage, n in ((long, 2), (held, 12), (long, 12))]
    assert states[0] == states[1]
    assert states[2].parameters == states[0].parameters / 6
    room = needed(split, module, bucket, 12, split.recompute).total / HEADROOM * 1.001
    check_fit(split, room)
    with pytest.raises(InputError, match=r"; or context=3 and workers=\(12, 24\) fits as it is$"):
        check_fit(long.replace(workers=(11, 24)), room)
