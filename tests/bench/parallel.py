"""Whether ranks that share a sample's tokens, or hold a model in groups, lose what one rank does.

A DiT is trained on gloo by 1 to 4 ranks in every layout: FSDP, HSDP, context parallelism and both.
Compared are the losses of every update and of the held-out clips, with texts of many lengths,
dropped text, given frames, stills and clips. Then what the ranks send in an update is counted and
compared with elastic/traffic.py. Last, one clip of 129 frames of 768 x 768 px (76,032 tokens) is
computed by one rank and by several: its loss, and the norm of its gradient.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

# What lies beside this script is measured, whatever is installed; the others are in tests/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny
import worlds
from figure import record
from wire import SameCaption, Wire, total
from worlds import run_world

from elastic import shard
from elastic.data.load import held_out_rounds
from elastic.ema import local
from elastic.loop import clip_gradients
from elastic.objective import FlowMatching
from elastic.traffic import update_traffic
from elastic.world import World
from stages import AdamW, Bucket, DiffusionStage, Given, Muon, Phase

TOLERANCE = 1e-5
ALONE = "1 rank"


class Layout(NamedTuple):
    """So many ranks, and how they share the work."""

    ranks: int
    context: int = 1
    shard_within: int | None = None

    def of(self, stage: DiffusionStage, **more: Any) -> DiffusionStage:
        """The stage in this layout; Any: the types of its fields."""
        return stage.replace(
            context=self.context,
            shard_within=self.shard_within,
            workers=(self.ranks, self.ranks),
            **more,
        )


LAYOUTS = {
    ALONE: Layout(1),
    "FSDP 4": Layout(4),
    "HSDP 2 x 2": Layout(4, 1, 2),
    "context 2": Layout(2, 2),
    "context 3": Layout(3, 3),
    "context 2 x 2": Layout(4, 2),
    "context 4": Layout(4, 4),
    "context 2, HSDP 2 x 2": Layout(4, 2, 2),
}
# Of what is counted: further settings, and the layouts that they are counted in.
COUNTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ("FSDP 4", "HSDP 2 x 2", "context 2", "context 2 x 2", "context 2, HSDP 2 x 2")),
    "bf16": ({"precision": "bf16"}, ("context 2, HSDP 2 x 2",)),
    "recompute": ({"recompute": "full"}, ("context 2",)),
    "selective": ({"recompute": "selective"}, ("context 2",)),
    "muon": ({"optimizer": Muon(lr=1e-3, matrix_lr=1e-2)}, ("FSDP 4", "HSDP 2 x 2")),
    "exact": ({"exact": True}, ("FSDP 4",)),
}

LEARNT = tiny.STAGE.replace(
    model=tiny.STAGE.model.replace(
        depth=2, depth_single=2, heads=12, width=96, image_condition=True
    ),
    given=Given(),
    log_every=1,
)
SENT = LEARNT.replace(
    schedule=[Phase(until=240, buckets=[Bucket("64px", frames=9, batch=8, micro=2)])],
    text_dropout=0.0,
    optimizer=AdamW(lr=1e-3),
    evaluate_every=1000,
    save_every=1000,
)
LONG = SENT.replace(
    model=tiny.STAGE.model.replace(depth=1, depth_single=0, heads=4, width=24),
    given=None,
    schedule=[Phase(until=1, buckets=[Bucket("768px", frames=129, batch=1, micro=1)])],
)


def learn(world: World, folder: Path, stage: DiffusionStage, updates: int) -> tiny.Attempt:
    """Train for so many updates; layers are groups of their own, as those of a large model are."""
    shard.SMALLEST_GROUP = 0
    return tiny.train(world, folder, updates, stage)


def send(world: World, folder: Path, stage: DiffusionStage) -> float:
    """Bytes that all ranks together send in the third update."""
    shard.SMALLEST_GROUP = 0
    goal = tiny.objective(stage)
    goal.source = SameCaption(stage, {bucket.name: 23 for bucket in stage.buckets}, 100)
    with Wire() as wire:
        tiny.attempt(world, folder, stage, goal, stop_after=4, beat=wire.beat)
    assert not wire.unknown, f"not counted: {wire.unknown}"
    return total(wire.at_updates[3] - wire.at_updates[2])


def compute_one(world: World, stage: DiffusionStage) -> tuple[float, float, float]:
    """Loss of a clip, norm of its gradient, and seconds."""
    shard.SMALLEST_GROUP = 0
    world = world.arranged(stage.context, stage.shard_within)
    bucket = stage.buckets[0]
    source = SameCaption(stage, {bucket.name: 1}, 100)
    goal = FlowMatching(stage, source, source, stage.text.null())
    model = shard.shard(goal.build(), world)
    shard.initialise(model, 0, "long")
    for parameter in model.parameters():
        local(parameter.detach()).add_(0.02)  # or the layers that start at zero hide the others
    began = time.monotonic()
    (micro,) = held_out_rounds(source, stage.replace(held_out=1), bucket, world)
    weighted_B = tiny.losses_of(goal, model, micro).both_B * micro.samples.weight_B
    (weighted_B.sum() * world.size).backward()
    norm = clip_gradients(model, 1.0, world)
    return float(world.sum(weighted_B.detach().sum())), float(norm), time.monotonic() - began


def losses(attempt: tiny.Attempt) -> dict[tuple[Any, ...], float]:
    """Every loss and gradient norm of the log, by where it stands."""
    return {
        (line["position"], *line["context"].values(), name): value
        for line in attempt.lines
        for name, value in line["values"].items()
        if name in ("loss", "loss_head", "grad_norm")
    }


def apart(one: dict[Any, float], other: dict[Any, float], names: tuple[str, ...]) -> float:
    """The largest relative difference of the values of these names."""
    assert one.keys() == other.keys(), "other lines"
    return max(abs(other[k] / one[k] - 1) for k in one if k[-1] in names)


def played(turns: dict[str, tiny.Turn], folder: Path) -> dict[str, Any]:
    """What the first rank gets of each turn; worlds of one size are played by the same ranks."""
    results: dict[str, Any] = {}
    for size in sorted({turn.size for turn in turns.values()}):
        mine = {name: turn for name, turn in turns.items() if turn.size == size}
        own = folder / f"ranks-{size}"
        own.mkdir()
        results |= zip(
            mine, run_world(tiny.in_turn, size, own, list(mine.values()))[0], strict=True
        )
    return {name: results[name] for name in turns}


def accuracy(folder: Path, updates: int) -> dict[str, dict[str, float]]:
    """How far each layout is from one rank."""
    turns = {
        name: tiny.Turn(layout.ranks, learn, (folder / name, layout.of(LEARNT), updates))
        for name, layout in LAYOUTS.items()
    }
    said = {name: losses(attempt) for name, attempt in played(turns, folder).items()}
    return {
        name: {
            "loss": apart(said[ALONE], values, ("loss", "loss_head")),
            "grad_norm": apart(said[ALONE], values, ("grad_norm",)),
        }
        for name, values in said.items()
        if name != ALONE
    }


def traffic(folder: Path) -> dict[str, dict[str, float]]:
    """What an update sends, counted and by the formula."""
    cases = {
        f"{kind}, {name}": (LAYOUTS[name], LAYOUTS[name].of(SENT, **more))
        for kind, (more, names) in COUNTED.items()
        for name in names
    }
    turns = {
        name: tiny.Turn(layout.ranks, send, (folder / name, stage))
        for name, (layout, stage) in cases.items()
    }
    counted = played(turns, folder)
    shard.SMALLEST_GROUP = 0  # here too, for the formula
    figures = {}
    for name, (layout, stage) in cases.items():
        formula = update_traffic(stage, stage.build(), stage.buckets[0], 3, layout.ranks)
        figures[name] = {
            "counted": counted[name], "formula": formula.total, **vars(formula),
            "counted_over_formula": counted[name] / formula.total,
        }  # fmt: skip
    return figures


def long_clip(frames: int) -> dict[str, Any]:
    """A clip of 768 px on one rank and on several."""
    bucket = Bucket("768px", frames=frames, batch=1, micro=1)
    stage = LONG.replace(schedule=[Phase(until=1000, buckets=[bucket])])
    names = (ALONE, "context 2", "context 4")
    results = [
        run_world(compute_one, LAYOUTS[name].ranks, LAYOUTS[name].of(stage))[0] for name in names
    ]
    grid = stage.codec.grid(frames, bucket.height, bucket.width)
    return {
        "tokens": stage.model.tokens(grid),
        "layouts": {
            name: {
                "loss": abs(loss / results[0][0] - 1),
                "grad_norm": abs(norm / results[0][1] - 1),
                "seconds": round(seconds, 1),
            }
            for name, (loss, norm, seconds) in zip(names, results, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 updates, a long clip of 5 frames")
    quick = parser.parse_args().quick
    worlds.DEADLINE_S = 3600.0  # one rank alone takes minutes for a long clip
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / part for part in ("learn", "send")]
        for folder in folders:
            folder.mkdir()
        away = accuracy(folders[0], 8 if quick else tiny.NUM_UPDATES)
        sent = traffic(folders[1])
        clip = long_clip(5 if quick else 129)
    worst = max(
        [each["loss"] for each in away.values()]
        + [each["loss"] for each in clip["layouts"].values()]
    )
    off = max(abs(each["counted_over_formula"] - 1) for each in sent.values())
    assert math.isfinite(worst)
    record(
        "parallel",
        figures={"largest_loss_difference": worst, "traffic_off_by": off,
                 "relative_differences": away, "bytes_an_update": sent, "long_clip": clip},
        goal=f"every loss within {TOLERANCE:g} of one rank's, bytes within 1 % of the formula",
        holds=worst <= TOLERANCE and off <= 0.01,
        keep=not quick,
    )  # fmt: skip


if __name__ == "__main__":
    main()
