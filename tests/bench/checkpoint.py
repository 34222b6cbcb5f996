"""What a checkpoint costs the training: its stall, and the slow-down of the updates after it.

Two gloo ranks train a model whose state (parameters, average, two moments) has 350 MB. Between
undisturbed updates the state is saved in one of these ways, taking turns: ours beside the training
(with its copies in the node's memory), `dcp.save`, torch's `dcp.async_save` in a thread, and
`torch.save` of the gathered state on rank 0. Seconds lost are those from the call until the save
is done and at least four updates were made, less what so many undisturbed updates take. Ours also
hashes and flushes what it writes; `torch.save` does neither. `cpu_s` is the processor's time of the
first rank for the save, threads included, which other work on the machine disturbs least.

With `--gpu GB` one NCCL rank trains a model whose state has about so many gigabytes on a GPU.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import DTensor

# What lies beside this script is measured, whatever is installed; worlds.py is in tests/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import worlds
from figure import record
from tiny import STAGE

from elastic.checkpoint import Checkpoints, Fence
from elastic.checkpoint_ram import RamCopies
from elastic.ema import EmaWeights, local
from elastic.loop import build_optimizer
from elastic.shard import initialise, shard
from elastic.state import Progress, TrainState
from elastic.world import World

WIDTH, DEPTH, TOKENS = 832, 4, 192
FOLLOWING = 4  # updates after a save that are counted in, at least
SHARE_ALLOWED = 0.6
WAYS = ("ours", "dcp_save", "dcp_async_save", "torch_save")
PEERS = ("dcp_save", "torch_save")  # those that the goal names
Poll = Callable[[], bool]  # once an update; whether the save is done


class Blocks(nn.Module):
    """Feed-forward blocks: as many parameters as wanted, and an update that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(DEPTH)
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        for block in self.blocks:
            x_ND = x_ND + block(x_ND)
        return x_ND


class Training:
    """A state, and updates of it."""

    def __init__(self, world: World) -> None:
        with torch.device("meta"):
            model = Blocks()
        self.model = shard(model, world)
        initialise(self.model, 0, "bench")
        optimizer = build_optimizer(STAGE.optimizer, self.model)
        self._ema = EmaWeights(self.model, STAGE.ema)
        progress = Progress(STAGE.name)
        self.state = TrainState(STAGE, self.model, optimizer, self._ema, progress)
        made = torch.Generator().manual_seed(world.rank)
        self._x_ND = torch.randn(TOKENS, WIDTH, generator=made).to(world.device)
        self._done: torch.cuda.Event | None = None  # when the last update is, on a GPU

    def update(self) -> None:
        """One update of parameters, moments and average."""
        self.model(self._x_ND).square().mean().backward()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.progress.samples += 64
        self._ema.update(self.state.progress.samples, 64)
        if self._x_ND.is_cuda:  # as the loop waits for the update before
            before, self._done = self._done, torch.cuda.Event()
            self._done.record()
            if before is not None:
                before.synchronize()


class Ways:
    """Each way to save: called, it blocks for its stall and gives what is asked once an update."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._group = dist.new_group(backend="gloo")
        fence = world.from_first(Fence.take(folder) if world.is_first else None)
        self.told: list[str] = []
        self._checkpoints = Checkpoints(
            folder, world, fence, lambda kind, *_, **__: self.told.append(kind),
            ram=RamCopies(folder, os.getppid()),
        )  # fmt: skip

    def ours(self, state: TrainState) -> Poll:
        before = len(self.told)
        self._checkpoints.save(state, "due")

        def poll() -> bool:
            self._checkpoints.poll()
            return len(self.told) > before

        return poll

    def dcp_save(self, state: TrainState) -> Poll:
        dcp.save(cast(dict[str, Any], state.tensors()), checkpoint_id=self._folder / "dcp")
        return lambda: True

    def dcp_async_save(self, state: TrainState) -> Poll:
        future = dcp.async_save(
            cast(dict[str, Any], state.tensors()),
            checkpoint_id=self._folder / "dcp-async",
            process_group=self._group,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
        )
        return lambda: not self._world.most(int(not cast(Any, future).done()))

    def torch_save(self, state: TrainState) -> Poll:
        whole = {}
        for name, tensor in state.tensors().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._world.is_first:
                whole[name] = full
        if self._world.is_first:
            torch.save(whole, self._folder / "whole.pt")
        self._world.barrier()
        return lambda: True

    def clean(self) -> None:
        """Nothing of one save is left to be written back during the next."""
        if self._world.is_first:
            for name in ("dcp", "dcp-async"):
                shutil.rmtree(self._folder / name, ignore_errors=True)
            (self._folder / "whole.pt").unlink(missing_ok=True)
            os.sync()
        self._world.barrier()

    def close(self) -> None:
        """Free the memory of the copies."""
        RamCopies(self._folder, os.getppid()).remove()


def one_save(training: Training, ways: Ways, way: str, undisturbed: int) -> dict[str, float]:
    """Undisturbed updates, then a save by one way and the updates until it is done."""
    ways.clean()
    training.update()
    began, cpu = time.monotonic(), time.process_time()
    for _ in range(undisturbed):
        training.update()
    update_s = (time.monotonic() - began) / undisturbed
    update_cpu_s = (time.process_time() - cpu) / undisturbed
    began, cpu = time.monotonic(), time.process_time()
    poll = getattr(ways, way)(training.state)
    stall_s = time.monotonic() - began
    done_s, updates = (0.0, 0) if poll() else (None, 0)
    while done_s is None or updates < FOLLOWING:
        training.update()
        updates += 1
        if done_s is None and poll():
            done_s = time.monotonic() - began - stall_s
    return {
        "update_s": update_s,
        "stall_s": stall_s,
        "background_s": done_s,
        "lost_s": time.monotonic() - began - updates * update_s,
        "cpu_s": time.process_time() - cpu - updates * update_cpu_s,
        "updates": updates,
    }


def measure(world: World, folder: Path, rounds: int, undisturbed: int) -> dict[str, Any]:
    """All rounds of all ways; the first of each is not counted: memory and files are new then."""
    training, ways = Training(world), Ways(world, folder)
    for _ in range(2):
        training.update()
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            result = one_save(training, ways, way, undisturbed)
            if world.is_first:
                print(f"round {number}, {way}: {json.dumps(result)}", file=sys.stderr, flush=True)
            if number:
                results[way].append(result)
    ways.close()
    tensors = training.state.tensors().values()
    assert ways.told == ["publish"] * (rounds + 1), ways.told
    mine = [local(tensor) for tensor in tensors]
    return {
        "state_mb": sum(t.numel() * t.itemsize for t in tensors) / 1e6,
        "state_bytes": sum(t.numel() * t.itemsize for t in mine),
        "saves": results,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def figures_of(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gave on all ranks, as the figures that are kept; times of the first one."""
    figures: dict[str, Any] = {
        "state_mb": round(ranks[0]["state_mb"], 1),
        "state_bytes": max(rank["state_bytes"] for rank in ranks),  # of one worker
        "ranks": len(ranks),
    }
    medians = {}
    for way, saves in ranks[0]["saves"].items():
        of_way = {key: spread([save[key] for save in saves]) for key in saves[0]}
        print(json.dumps({way: of_way}), file=sys.stderr, flush=True)
        figures |= of_way if way == "ours" else {way: of_way}
        medians[way] = {key: values["median"] for key, values in of_way.items()}
    for key in ("stall_s", "lost_s"):
        for peer in WAYS[1:]:
            ratio = medians["ours"][key] / medians[peer][key]
            figures[f"{key[:-2]}_vs_{peer}"] = round(ratio, 3)
    return figures


def measure_on_gpu(gigabytes: float, folder: Path, rounds: int, undisturbed: int) -> dict[str, Any]:
    """What `measure` gives for one rank and a state of about so many gigabytes on a GPU."""
    global WIDTH, DEPTH, TOKENS
    WIDTH, TOKENS = 2048, 4096  # an update of a tenth of a second for each gigabyte or two
    DEPTH = max(1, round(gigabytes * 1e9 / (16 * 8 * WIDTH**2)))  # 16 bytes a parameter
    dist.init_process_group(
        "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0),
    )
    try:
        return measure(World.current(), folder / "stage", rounds, undisturbed)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of seven")
    parser.add_argument("--gpu", type=float, metavar="GB", help="one rank on a GPU")
    flags = parser.parse_args()
    quick = flags.quick
    rounds, undisturbed = (2, 3) if quick else (7, 6)
    worlds.DEADLINE_S = 1800.0
    with tempfile.TemporaryDirectory() as folder:
        if flags.gpu:
            ranks = [measure_on_gpu(flags.gpu, Path(folder), rounds, undisturbed)]
        else:
            ranks = worlds.run_world(measure, 2, Path(folder), rounds, undisturbed)
    figures = figures_of(ranks)
    record(
        "checkpoint-gpu" if flags.gpu else "checkpoint",
        figures=figures,
        goal=f"seconds lost, slow-down counted in, at most {SHARE_ALLOWED} x those of dcp.save and "
        "of torch.save on rank 0",
        holds=all(figures[f"lost_vs_{peer}"] <= SHARE_ALLOWED for peer in PEERS),
        keep=not quick,
    )


if __name__ == "__main__":
    main()
