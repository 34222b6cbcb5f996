"""Model FLOPs utilisation of a train step of a 2.2 B MMDiT on one GPU: ours and its peers.

A step is forward pass, loss, backward pass, clipping and AdamW on latents and text that lie on the
GPU already: everything but the loader, from the modules that the training loop calls; as in the
loop, the host runs ahead of the device. Counted are
the matrix products and attention of one forward and two backward passes over real tokens, from
the shapes (`DiT.forward_flops`; a test holds it to torch's FlopCounterMode); what is computed again
is not counted again. The same count is used for the peers. Utilisation is of the dense bf16 peak of
the data sheet.

Cells run one after the other until the time is up, the first once more at the end, so that a drift
of clocks would show. A cell fails if another attention backend ran than the one it asked for.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from figure import record

from elastic.ema import local
from elastic.kernels import Backend, attention, attention_order, compile_blocks
from elastic.loop import build_optimizer, clip_gradients
from elastic.shard import shard
from elastic.world import World
from models.dit import DiT
from models.flow import flow_loss_B
from models.recompute import RECOMPUTE, Recompute
from models.text import TextBatch
from stages.optimizer import AdamW

SHAPE = DiT(depth=8, depth_single=16, width=2048, heads=16, patch=1)
CHANNELS, TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = 64, 256, 4096, 768
PEAK = 989.4e12  # dense bf16 FLOP/s of an H100 or H200 SXM, by the data sheet
GRIDS = {3072: (12, 16, 16), 4096: (16, 16, 16), 8192: (32, 16, 16), 16384: (64, 16, 16)}
WARM_UPS, STEPS = 3, 10
FLOOR, COMPILED_GOAL, LONG_GOAL = 0.45, 1.25, 0.42
OPTIMIZER = AdamW(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)
KERNELS: dict[Backend, tuple[str, ...]] = {  # words in the names of a backend's kernels
    "cudnn": ("cudnn",),
    "flash": ("flash_fwd", "flash_bwd"),
    "efficient": ("fmha_cutlass",),
}


class Cell(NamedTuple):
    """What is measured: whose model, how it is run, on what."""

    whose: str
    tokens: int
    batch: int
    compiled: bool
    backend: Backend | None  # None: ours by our order, a peer's by its own choice
    recompute: Recompute = "none"
    masked: bool = False  # captions of many lengths, as a training batch has them

    @property
    def name(self) -> str:
        """In words."""
        how = "compiled" if self.compiled else "eager"
        return (
            f"{self.whose} {self.tokens}x{self.batch} {how} {self.backend or 'own attention'} "
            f"recompute={self.recompute}{' masked' if self.masked else ''}"
        )


def cells(peers: list[str]) -> Iterator[Cell]:
    """The cells, what matters most first."""
    batches = {3072: 8, 4096: 6, 8192: 3, 16384: 2}

    def cell(whose: str, tokens: int, compiled: bool, recompute: Recompute = "none") -> Cell:
        backend: Backend | None = "cudnn" if whose == "ours" else None
        return Cell(whose, tokens, batches[tokens], compiled, backend, recompute)

    yield cell("ours", 4096, True)
    yield cell("ours", 4096, False)
    for peer in peers:
        yield cell(peer, 4096, True)
    yield cell("ours", 8192, True)
    yield cell("ours", 8192, True)._replace(backend="flash")
    yield cell("ours", 4096, True)._replace(masked=True, backend=None)
    yield cell("ours", 3072, True)
    yield cell("ours", 16384, True)
    yield cell("ours", 4096, True, "selective")
    yield cell("ours", 4096, True, "full")
    yield cell("torchtitan", 4096, True, "full")
    for peer in peers:
        yield cell(peer, 8192, True)
    yield cell("ours", 8192, False)
    for tokens in (3072, 16384):
        for peer in peers:
            yield cell(peer, tokens, True)
        yield cell("ours", tokens, False)
    for peer in peers:
        yield cell(peer, 4096, False)


def text_lengths(cell: Cell) -> list[int]:
    """Real text tokens of each clip: all of them, or from a quarter to all."""
    if not cell.masked:
        return [TEXT_TOKENS] * cell.batch
    return (TEXT_TOKENS * torch.linspace(0.25, 1, cell.batch)).long().tolist()


class Inputs(NamedTuple):
    """One batch on the device."""

    z_BCTHW: Tensor
    noise_BCTHW: Tensor
    t_B: Tensor
    text: TextBatch

    @classmethod
    def random(cls, cell: Cell, device: torch.device) -> "Inputs":
        """Fresh random numbers."""
        made, batch = torch.Generator(device).manual_seed(cell.tokens), cell.batch

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made, device=device)

        z_BCTHW = normal(batch, CHANNELS, *GRIDS[cell.tokens])
        t_B = torch.rand(batch, generator=made, device=device)
        mask_BL = None
        if cell.masked:
            length_B = torch.tensor(text_lengths(cell), device=device)
            mask_BL = torch.arange(TEXT_TOKENS, device=device) < length_B[:, None]
        text = TextBatch(
            normal(batch, TEXT_TOKENS, TEXT_WIDTH).bfloat16(), mask_BL, normal(batch, POOLED_WIDTH)
        )
        return cls(z_BCTHW, torch.randn_like(z_BCTHW), t_B, text)


def ours(cell: Cell, shape: DiT, world: World) -> tuple[nn.Module, Callable[[Inputs], Tensor]]:
    """The model as the loop builds it, and its loss."""
    built = shape.build(CHANNELS, TEXT_WIDTH, POOLED_WIDTH, "meta")
    model = shard(built.recompute(cell.recompute), world, "bf16")
    fill(model, world.device)
    if cell.compiled:
        compile_blocks(model)
    return model, lambda x: flow_loss_B(model, x.z_BCTHW, x.noise_BCTHW, x.t_B, x.text).mean()


def peer(cell: Cell, shape: DiT, world: World) -> tuple[nn.Module, Callable[[Inputs], Tensor]]:
    """A peer's model as it sets itself up, and the loss on the same numbers."""
    from mfu_peers import PEERS, Setup, Shape

    assert cell.recompute != "selective", "no peer has it"
    built = PEERS[cell.whose](
        Shape(
            width=shape.width,
            heads=shape.heads,
            depth=shape.depth,
            depth_single=shape.depth_single,
            channels=CHANNELS,
            text_width=TEXT_WIDTH,
            pooled_width=POOLED_WIDTH,
        ),
        Setup(device=world.device, compiled=cell.compiled, recompute=cell.recompute),
    )

    def loss(x: Inputs) -> Tensor:
        mixed_BCTHW = torch.lerp(x.z_BCTHW, x.noise_BCTHW, x.t_B[:, None, None, None, None])
        target_BCTHW = x.noise_BCTHW - x.z_BCTHW
        return built.step_loss(
            mixed_BCTHW.flatten(2).mT.contiguous(),
            x.t_B,
            x.text.text_BLD,
            x.text.pooled_BD,
            target_BCTHW.flatten(2).mT.contiguous(),
            GRIDS[cell.tokens],
        )

    return built.module, loss


def fill(model: nn.Module, device: torch.device) -> None:
    """Random values everywhere, the layers that start at zero too: zeros would run faster."""
    made = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = local(parameter)
            values.normal_(std=0.02, generator=made) if values.ndim > 1 else values.fill_(1.0)


def measure(cell: Cell, shape: DiT, world: World, steps: int) -> dict[str, Any]:
    """Seconds a step, utilisation, memory, the attention that ran."""
    cuda = world.device.type == "cuda"
    began = time.monotonic()
    model, loss_of = (ours if cell.whose == "ours" else peer)(cell, shape, world)
    optimizer = build_optimizer(OPTIMIZER, model)
    inputs = Inputs.random(cell, world.device)
    chosen: Any = contextlib.nullcontext()
    if cell.whose == "ours" and cuda:
        usual = attention_order(world.device)
        first = cell.backend or usual[0]
        chosen = attention((first, *(name for name in usual if name != first)))

    def step() -> Tensor:
        loss = loss_of(inputs)
        loss.backward()
        clip_gradients(model, OPTIMIZER.max_norm, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    seconds, losses = [], []
    with chosen, compiled_anew(cell):
        losses.append(step())  # compiles
        wait(world)
        first_s = time.monotonic() - began
        for _ in range(WARM_UPS - 1):
            losses.append(step())
        wait(world)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds, more = timed(step, steps, world)
        losses += more
        ran, busiest = kernels(step, world) if cuda else (None, [])
    if cell.backend is not None and cuda and ran != cell.backend:
        raise RuntimeError(f"{cell.name}: attention ran on {ran}")
    flops = 3 * sum(
        shape.forward_flops(cell.tokens, real, CHANNELS, TEXT_WIDTH, POOLED_WIDTH)
        for real in text_lengths(cell)
    )
    median = statistics.median(seconds)
    assert all(torch.isfinite(value) for value in losses), f"{cell.name}: {losses}"
    return {
        **cell._asdict(),
        "mfu": round(flops / median / PEAK, 4),
        "tflops": round(flops / median / 1e12, 1),
        "step_s": round(median, 5),
        "step_s_range": [round(min(seconds), 5), round(max(seconds), 5)],
        "tokens_per_s": round(cell.tokens * cell.batch / median),
        "first_step_s": round(first_s, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "attention": ran,
        "loss": [round(float(losses[0]), 4), round(float(losses[-1]), 4)],
        "busiest": busiest,
    }


def timed(step: Callable[[], Tensor], steps: int, world: World) -> tuple[list[float], list[Tensor]]:
    """Seconds of each step, and its loss; the host does not wait for the device in between."""
    if world.device.type != "cuda":
        began = time.perf_counter()
        losses = [step() for _ in range(steps)]
        return [(time.perf_counter() - began) / steps] * steps, losses
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    losses = [step()]  # the device is at work when the first mark is set
    marks[0].record()
    for mark in marks[1:]:
        losses.append(step())
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)], losses


@contextlib.contextmanager
def compiled_anew(cell: Cell) -> Iterator[None]:
    """Where another backend than the usual is asked for: what is cached names the one it found."""
    with torch._inductor.config.patch(force_disable_caches=cell.backend == "flash"):
        yield


def wait(world: World) -> None:
    """Until the device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def kernels(step: Callable[[], Tensor], world: World) -> tuple[str | None, list[list[Any]]]:
    """The attention backend whose kernels one step ran, and the kernels that took longest (ms)."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        wait(world)
    rows = [(row.key, row.device_time_total / 1e3, row.count) for row in seen.key_averages()]
    rows.sort(key=lambda row: -row[1])
    ran = [
        name
        for name, words in KERNELS.items()
        if any(
            word in key.lower() and ("sdpa" in key.lower() or name != "cudnn")
            for key, _, _ in rows
            for word in words
        )
    ]
    busiest = [[key[:90], round(ms, 2), count] for key, ms, count in rows[:14]]
    return (ran[0] if len(ran) == 1 else ",".join(ran) or "math"), busiest


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device reaches: a large matrix product; a large copy, read and write counted."""

    def median_s(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(13):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[3:])

    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    b = torch.randn_like(a)
    product_s = median_s(lambda: a @ b)
    source = torch.randn(2**30, device=device)
    into = torch.empty_like(source)
    copy_s = median_s(lambda: into.copy_(source))
    return {
        "product_tflops": round(2 * 8192**3 / product_s / 1e12, 1),
        "copy_tb_per_s": round(2 * source.nbytes / copy_s / 1e12, 2),
    }


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """A world of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(os.path.join(folder, "store"), 1),
            rank=0,
            world_size=1,
        )
        try:
            yield World.current()
        finally:
            dist.destroy_process_group()


def release() -> None:
    """Give back the memory of the last cell, and forget what was compiled for it."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first cells; tiny without a GPU")
    parser.add_argument("--seconds", type=float, default=480, help="begin no cell after so long")
    parser.add_argument("--peers", default="torchtitan,diffusers", help="separated by commas")
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    asked = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not asked.quick:
        print("mfu.py measures a GPU and there is none; --quick runs a tiny model on the CPU")
        return 2
    shape = SHAPE if has_gpu else DiT(depth=1, depth_single=1, width=64, heads=2, patch=1)
    wanted = list(cells([name for name in asked.peers.split(",") if name]))
    if not has_gpu:
        wanted = [Cell("ours", 3072, 1, False, "cudnn", policy) for policy in RECOMPUTE]
    elif asked.quick:
        wanted = wanted[:5]
    wanted = [cell for cell in wanted if asked.only in cell.name]
    began = time.monotonic()
    done: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with process_group(torch.device("cuda", 0) if has_gpu else torch.device("cpu")) as world:
        reached = ceilings(world.device) if has_gpu else {}
        print(json.dumps(reached), flush=True)
        for number, cell in enumerate([*wanted, wanted[0]]):
            if time.monotonic() - began > asked.seconds and number < len(wanted):
                left_out[cell.name] = "no time left"
                continue
            try:
                done.append(measure(cell, shape, world, STEPS if has_gpu else 1))
                print(json.dumps(done[-1]), flush=True)
            except Exception as error:  # a cell that fails must not cost the others
                left_out[cell.name] = f"{type(error).__name__}: {error}"[:600]
                print(cell.name, left_out[cell.name], flush=True)
            release()
    figures = {
        "parameters": sum(
            p.numel() for p in shape.build(CHANNELS, TEXT_WIDTH, POOLED_WIDTH, "meta").parameters()
        ),
        "peak_tflops": PEAK / 1e12,
        "reached": reached,
        "cells": done,
        "left_out": left_out,
    }
    record(
        "mfu",
        figures=figures,
        goal=(
            f"compiled, without recompute: at least {FLOOR} of the peak at 3k to 8k tokens and "
            f"{LONG_GOAL} at 16k; at least {COMPILED_GOAL} x eager; more than each peer"
        ),
        holds=has_gpu and holds(done),
        keep=has_gpu and not asked.quick and not asked.only,
    )
    return 0


def holds(done: list[dict[str, Any]]) -> bool:
    """Whether the goal is met by what was measured; all of it must be there."""
    runs: dict[tuple[str, int, bool], list[float]] = {}
    for each in done:
        if each["recompute"] == "none" and not each["masked"] and each["backend"] != "flash":
            key = (each["whose"], each["tokens"], each["compiled"])
            runs.setdefault(key, []).append(each["mfu"])
    means = {key: statistics.mean(found) for key, found in runs.items()}
    compiled = {tokens: means.get(("ours", tokens, True), 0.0) for tokens in GRIDS}
    eager = means.get(("ours", 4096, False))
    others = [(tokens, mfu) for (whose, tokens, _), mfu in means.items() if whose != "ours"]
    return (
        {whose for whose, _, _ in means} >= {"ours", "torchtitan", "diffusers"}
        and all(compiled[tokens] >= FLOOR for tokens in (3072, 4096, 8192))
        and compiled[16384] >= LONG_GOAL
        and eager is not None
        and compiled[4096] >= COMPILED_GOAL * eager
        and all(compiled[tokens] > mfu for tokens, mfu in others)
    )


if __name__ == "__main__":
    sys.exit(main())
