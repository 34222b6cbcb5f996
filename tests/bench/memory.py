"""The most memory that training takes, against what `plan` says: shapes, recompute, codecs.

On CPU two ranks run the real loop for a few updates under torch's memory profiler, which sees every
tensor come and go: what `torch.cuda.max_memory_allocated` counts on a GPU. Gloo's own tensors and
what malloc keeps are not in it, as they are not in the prediction; the process's resident peak over
what it had after its imports stands beside it. On a GPU one rank trains larger shapes.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.distributed as dist
import worlds
from figure import record
from tiny import DrawnLatents
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from worlds import run_world

from elastic.checkpoint import Checkpoints, Fence
from elastic.fit import needed, shown
from elastic.loop import Run, train_stage
from elastic.meter import Meter
from elastic.objective import FlowMatching
from elastic.world import World
from models import DiT, HunyuanVAE, WordHash
from models.recompute import RECOMPUTE, Recompute
from stages import AdamW, Bucket, DiffusionStage, Ema, Phase, Videos

UPDATES = 3
GOAL = 0.10
CLIPS = 8
# By name: the DiT, and the bucket with the micro-batch.
Case = tuple[DiT, Bucket]
ON_CPU: dict[str, Case] = {
    "activations": (
        DiT(depth=2, depth_single=4, width=256, heads=4, patch=2),
        Bucket("128px", frames=17, batch=8, micro=4),
    ),
    "large blocks": (
        DiT(depth=2, depth_single=4, width=512, heads=8, patch=2),
        Bucket("64px", frames=17, batch=4, micro=2),
    ),
    "two streams": (
        DiT(depth=4, depth_single=0, width=384, heads=6, patch=2),
        Bucket("64px", frames=33, batch=4, micro=2),
    ),
    "one stream": (
        DiT(depth=0, depth_single=6, width=640, heads=10, patch=2),
        Bucket("64px", frames=17, batch=4, micro=2),
    ),
    "two rounds": (
        DiT(depth=2, depth_single=3, width=640, heads=10, patch=2),
        Bucket("64px", frames=17, batch=8, micro=2),
    ),
}
ON_GPU: dict[str, Case] = {
    "1 B": (
        DiT(depth=8, depth_single=16, width=1408, heads=11, patch=2),
        Bucket("256px", frames=33, batch=4, micro=4),
    ),
    "0.3 B": (
        DiT(depth=6, depth_single=12, width=1024, heads=8, patch=2),
        Bucket("256px", frames=65, batch=2, micro=2),
    ),
}


def stage_of(case: Case, recompute: Recompute, workers: int) -> DiffusionStage:
    """A stage that stops long before its end."""
    model, bucket = case
    many = bucket.batch * 1000
    return DiffusionStage(
        name="memory",
        data=Videos("none.csv"),
        vae=HunyuanVAE(channels=16, weights="none.safetensors"),
        model=model,
        text=WordHash(width=64),
        schedule=[Phase(until=many, buckets=[bucket])],
        optimizer=AdamW(lr=1e-4),
        ema=Ema(halflife=1000),
        recompute=recompute,
        workers=(workers, workers),
        precision="bf16" if torch.cuda.is_available() else "fp32",
        save_every=many,
        log_every=many,
        evaluate_every=many,
        held_out=1,
    )


def status_bytes(name: str) -> int:
    """A line of /proc/self/status: VmRSS is what is resident, VmHWM the most since the reset."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{name}:")[2].split()[0])


def train_few(world: World, stage: DiffusionStage, until_save: Any) -> None:
    """A few updates of the real loop; `until_save` is called before the last state is saved."""
    folder = Path(world.from_first(tempfile.mkdtemp() if world.is_first else None))
    fence = world.from_first(Fence.take(folder) if world.is_first else None)
    source = DrawnLatents(stage, {stage.buckets[0].name: CLIPS}, 0)
    begun: set[int] = set()

    def beat(phase: str, position: int) -> None:
        if phase in ("read", "compile", "train"):
            begun.add(position)
        if phase == "save":
            until_save()

    def ignored(*said: Any, **more: Any) -> None:
        pass

    run = Run(
        folder=folder,
        world=world,
        checkpoints=Checkpoints(folder, world, fence, ignored),
        meter=Meter(stage, world, fence.attempt, lambda line: None),
        stop_wanted=lambda: len(begun) >= UPDATES,
        event=ignored,
        beat=beat,
    )
    train_stage(stage, FlowMatching(stage, source, source, stage.text.null()), run)
    world.barrier()
    if world.is_first:
        shutil.rmtree(folder)


def peak_on_cpu(world: World, stage: DiffusionStage) -> dict[str, float]:
    """The most bytes of tensors at once in this rank, and of the process over its beginning."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    resident = 0.0
    seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    seen.start()

    def until_save() -> None:
        nonlocal resident
        resident = float(status_bytes("VmHWM") - before)
        seen.stop()

    train_few(world, stage, until_save)
    tree = seen.profiler.kineto_results.experimental_event_tree()
    return {"peak": float(most_at_once(allocations(tree))), "resident": resident}


def allocations(tree: Sequence[Any]) -> list[tuple[int, int]]:
    """Address and bytes of what came, bytes below 0 of what went, in the order of time.

    Without what a collective of gloo takes for itself: it clones what it is given, NCCL does not.
    """
    found: list[tuple[int, int, int]] = []
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        if event.tag == _EventType.Allocation:
            told = event.typed[1]
            found.append((event.start_time_ns, told.ptr, told.alloc_size))
        if event.name.startswith(("c10d::", "gloo:")):
            continue
        waiting += event.children
    return [(address, size) for _, address, size in sorted(found, key=lambda one: one[0])]


def most_at_once(changes: Iterable[tuple[int, int]]) -> int:
    """The most bytes that were there at once.

    A thread of gloo may be the last that lets go of a tensor, and nobody is told. So whatever lies
    where another tensor is put has gone before.
    """
    starts: list[int] = []  # in order
    sizes: dict[int, int] = {}
    live = most = 0

    def drop(start: int) -> None:
        nonlocal live
        live -= sizes.pop(start)
        del starts[bisect_left(starts, start)]

    for start, size in changes:
        if size < 0:
            if start in sizes:
                drop(start)
            continue
        first = max(bisect_right(starts, start) - 1, 0)
        behind = bisect_left(starts, start + size)
        for other in [s for s in starts[first:behind] if s + sizes[s] > start]:
            drop(other)
        insort(starts, start)
        sizes[start] = size
        live += size
        most = max(most, live)
    return most


def peak_on_gpu(stage: DiffusionStage) -> dict[str, float]:
    """The most bytes of tensors at once on the GPU, with one rank."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/r", rank=0, world_size=1)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = 0

        def until_save() -> None:
            nonlocal found
            found = torch.cuda.max_memory_allocated()

        train_few(World.current(), stage, until_save)
        dist.destroy_process_group()
    return {"peak": float(found)}


def measure(case: Case, recompute: Recompute) -> dict[str, Any]:
    """The peak of the rank that takes most, what was said of it, and their ratio."""
    cuda = torch.cuda.is_available()
    stage = stage_of(case, recompute, 1 if cuda else 2)
    module, bucket = stage.build(), stage.buckets[0]
    need = needed(stage, module, bucket, stage.workers[0], recompute)
    ranks = [peak_on_gpu(stage)] if cuda else run_world(peak_on_cpu, 2, stage, is_fresh=True)
    most = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    return {
        "said": shown(need.total),
        **{name: shown(value) for name, value in most.items()},
        "said_of_peak": round(need.total / most["peak"], 3),
        "parts": {name: shown(value) for name, value in vars(need).items() if value},
    }


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two cases")
    asked = parser.parse_args()
    worlds.DEADLINE_S = 1200.0
    # Of the ranks' malloc: a tensor that has gone leaves its address to the next one of its size.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    cases = ON_GPU if torch.cuda.is_available() else ON_CPU
    figures: dict[str, Any] = {}
    for name in list(cases)[: 1 if asked.quick else None]:
        for recompute in RECOMPUTE[: 2 if asked.quick else None]:
            figures[f"{name}, {recompute}"] = measure(cases[name], recompute)
            row = {name: figures[f"{name}, {recompute}"]}
            print(recompute, os.getloadavg()[0], json.dumps(row), flush=True)
    ratios = [row["said_of_peak"] for row in figures.values()]
    record(
        "memory",
        figures={"cases": figures, "said_of_peak": [min(ratios), max(ratios)]},
        goal=f"what plan says is within {GOAL:.0%} of the peak",
        holds=all(abs(ratio - 1) <= GOAL for ratio in ratios),
        keep=not asked.quick,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
