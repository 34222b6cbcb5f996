"""Sums that stay on the device between log points, and the lines that are made of them."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic.data.load import Micro, Step
from elastic.device_peaks import memory_peak, peak_flops
from elastic.errors import StageBlocked
from elastic.exact import column_totals, totals
from elastic.inputs import Inputs
from elastic.kernels import num_graphs
from elastic.level_names import level_counts, level_means
from elastic.noise_levels import by_level
from elastic.objective import Losses
from elastic.state import Progress
from elastic.workload import model_flops, useful_tokens, video_tokens
from elastic.world import World
from stages.stage import DiffusionStage, Stage

OF_THE_MACHINES = frozenset(
    {
        "samples_per_s",
        "tokens_per_s",
        "tokens_per_s_per_worker",
        "data_wait",
        "useful_tokens",
        "flops_per_device",
        "mfu",
        "memory_peak",
        "graphs",
    }
)
"""Values of a line that differ with the machines and the time of day; all others may not."""

Sum = tuple[float, int]  # of the losses of so many samples
Sink = Callable[[dict[str, Any]], None]  # one metrics.jsonl line


class NonFiniteLoss(StageBlocked):
    """The gradient has no finite norm; nothing that is kept was changed by it."""


@dataclass(frozen=True)
class _Norms:
    """The gradient norms of one update, on their way to the host."""

    values: dict[str, Tensor]
    position: int  # samples, before the update
    arrived: torch.cuda.Event | None  # None: they are there

    @classmethod
    def of(cls, norms: dict[str, Tensor], position: int) -> "_Norms":
        if not any(norm.is_cuda for norm in norms.values()):
            return cls(norms, position, None)
        there = {
            name: torch.empty(norm.shape, dtype=norm.dtype, pin_memory=True).copy_(
                norm, non_blocking=True
            )
            for name, norm in norms.items()
        }
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(there, position, arrived)

    def check(self, stage: Stage) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        for name, norm in self.values.items():
            if not torch.isfinite(norm):
                whose, rate = _NORMS[name]
                raise NonFiniteLoss(
                    f"stage {stage.name!r}: {whose} {norm.item()} at {self.position:,} samples. "
                    "The same command meets the same batch again, and a stage that has begun may "
                    f"not change: lower {rate} or optimizer.max_norm and give the stage another "
                    "name, under which it begins anew, or branches from a checkpoint before that "
                    "with init=Continue(STAGE, at=POSITION); `status RUN` names the positions"
                    + (_LATENTS if isinstance(stage, DiffusionStage) else "")
                )


_NORMS = {
    "grad_norm": ("gradient norm", "optimizer.lr"),
    "critic_grad_norm": ("gradient norm of the critic", "adversarial.lr"),
}
_LATENTS = (
    ". Where `verify RUN` finds its latents damaged, `repair FILE` mends them, and this stage goes "
    "on from its last checkpoint"
)


def is_due(every: int, samples: int, last: int) -> bool:
    """Whether a multiple of `every` has been passed since `last` (both in samples)."""
    return samples // every > last // every


class Meter:
    """Collects what happened since the last log point; the ranks add up when it is written."""

    def __init__(self, stage: Stage, world: World, attempt: int, sink: Sink) -> None:
        self._stage = stage
        self._world = world
        self._attempt = attempt
        self._sink = sink
        self._norms: deque[_Norms] = deque()
        self._buckets = {bucket.name: bucket for bucket in stage.buckets}
        self._peak_flops = peak_flops(world.device)
        self._restart(0)

    def _restart(self, samples: int) -> None:
        self._since = samples
        self._began = time.monotonic()
        self._waited_s = 0.0
        self._num_tokens = 0
        self._num_computed = 0
        self._lengths: dict[str, Counter[int]] = {}  # of real text, by bucket
        self._loss: dict[str, list[Tensor]] = {}
        self._parts: dict[str, list[Tensor]] = {}
        self._parts_since: dict[str, int] = {}
        self._timed: list[tuple[Tensor, Tensor, Tensor]] = []  # time, loss, weight of samples
        self._counts: dict[str, int] = {}
        self._latest: dict[str, float | Tensor] = {}

    def begin(self, samples: int) -> None:
        """Start counting at this position."""
        self._restart(samples)

    def waiting(self, wait: Callable[[int], Step[Inputs]], position: int) -> Step[Inputs]:
        """Take the next step from `wait`, and count the time until it was there."""
        began = time.monotonic()
        step = wait(position)
        self._waited_s += time.monotonic() - began
        return step

    @torch.no_grad()
    def add_losses(self, micro: Micro, losses: Losses, weight_B: Tensor) -> None:
        """Add the losses of one micro-batch; every rank has parts of the same names."""
        bucket = micro.bucket.name
        self._num_computed += losses.work.computed
        self._lengths.setdefault(bucket, Counter()).update(losses.work.lengths)
        self._loss.setdefault(bucket, []).append((losses.model_B * weight_B).sum())
        if losses.t_B is not None:
            self._timed.append((losses.t_B, losses.model_B.detach(), weight_B))
        for name, part_B in losses.parts_B.items():
            self._parts.setdefault(name, []).append((part_B * weight_B).sum())
            self._parts_since.setdefault(name, micro.position)  # a part may begin in between

    def require_finite(self, norms: dict[str, Tensor], progress: Progress) -> None:
        """Raise NonFiniteLoss unless every gradient norm is a number.

        The norms of a GPU are looked at when the next update has been given to it, so that it is
        never without work, and by `settle`: nothing is measured or kept before.
        """
        self._norms.append(_Norms.of(norms, progress.samples))
        if self._norms[-1].arrived is None:
            return self.settle()
        while len(self._norms) > 1:
            self._norms.popleft().check(self._stage)

    def settle(self) -> None:
        """Wait until the norms of every update so far are known, and found to be numbers."""
        while self._norms:
            self._norms.popleft().check(self._stage)

    def stepped(
        self, progress: Progress, step: Step[Inputs], rate: float, norms: dict[str, Tensor]
    ) -> dict[str, Sum]:
        """Count one update; when a log point is passed, write the lines.

        Returns what the lines written add up for each bucket, the same on every rank.
        """
        bucket = step.plan.bucket
        self._counts[bucket.name] = self._counts.get(bucket.name, 0) + bucket.batch
        self._num_tokens += video_tokens(self._stage, bucket) * bucket.batch
        self._latest = {"lr": rate, **norms}
        if is_due(self._stage.log_every, progress.samples, self._since):
            return self.flush(progress)
        return {}

    def flush(self, progress: Progress) -> dict[str, Sum]:
        """Write what was collected since the last line; every rank calls it.

        Returns what it adds up for each bucket.
        """
        self.settle()
        if not self._counts:
            return {}
        names, parts = sorted(self._counts), sorted(self._parts)
        collected = [self._loss[name] for name in names] + [self._parts[name] for name in parts]
        sums = self._sums(collected)  # waits for the device
        sums, part_sums = sums[: len(names)], sums[len(names) :]
        elapsed = time.monotonic() - self._began
        num_samples = progress.samples - self._since
        by_bucket = {n: (total, self._counts[n]) for n, total in zip(names, sums, strict=True)}
        for name, (total, count) in by_bucket.items():
            self._write(progress, {"bucket": name}, {"loss": total / count})
        self._write(
            progress,
            {},
            {
                "loss": math.fsum(sums) / num_samples,
                **{
                    name: total / (progress.samples - self._parts_since[name])
                    for name, total in zip(parts, part_sums, strict=True)
                },
                **self._levels(),
                **{name: float(value) for name, value in self._latest.items()},
                "samples_per_s": num_samples / elapsed,
                **self._speed(elapsed),
            },
        )
        self._restart(progress.samples)
        return by_bucket

    def _speed(self, elapsed: float) -> dict[str, float]:
        """How fast the devices of all ranks train, and what of it is of use."""
        # Ranks of one context compute the same samples together: they are counted once.
        counted = self._lengths if self._world.counts else {}
        done = [(self._buckets[name], lengths) for name, lengths in counted.items()]
        mine = [
            self._num_computed if self._world.counts else 0,
            sum(useful_tokens(self._stage, bucket, lengths) for bucket, lengths in done),
            sum(model_flops(self._stage, bucket, lengths) for bucket, lengths in done),
            self._peak_flops or math.nan,
            self._waited_s,
            memory_peak(self._world.device),
        ]
        ranks = self._world.stack(
            torch.tensor(mine, dtype=torch.float64, device=self._world.device)
        )
        computed, useful, flops, peaks, *_ = ranks.sum(0).tolist()
        *_, waited, memory = ranks.amax(0).tolist()  # the others wait for the slowest
        speed = {
            "tokens_per_s": self._num_tokens / elapsed,
            "tokens_per_s_per_worker": self._num_tokens / elapsed / self._world.size,
            "data_wait": waited / elapsed,
            "useful_tokens": useful / computed,
            "flops_per_device": flops / elapsed / self._world.size,
            "memory_peak": memory,
        }
        if graphs := num_graphs():
            speed["graphs"] = graphs
        if math.isfinite(peaks):  # of every device
            speed["mfu"] = flops / elapsed / peaks
        return speed

    def _levels(self) -> dict[str, float]:
        """Losses by level of noise, and how many samples each had; every rank calls it."""
        if not self._timed:
            return {}
        t_N, loss_N, weight_N = (torch.cat(values) for values in zip(*self._timed, strict=True))
        rows_NK = by_level(t_N, loss_N, weight_N)
        # A sum of its own: its length may not change the order in which ranks add up the losses.
        if self._stage.exact:
            sums = column_totals(rows_NK, self._world)
        else:
            sums = self._world.sum(rows_NK.sum(0)).tolist()
        return {**level_means(sums), **level_counts(sums)}

    def _sums(self, collected: list[list[Tensor]]) -> list[float]:
        """The sum of each list over all ranks."""
        if self._stage.exact:
            return totals(collected, self._world)
        sums = torch.stack([torch.stack(values).double().sum() for values in collected])
        return self._world.sum(sums).tolist()

    def evaluated(self, progress: Progress, measure: Callable[[], dict[str, float]]) -> None:
        """Measure on the held-out clips, and write what came out and how long it took."""
        self.settle()
        began = time.monotonic()
        values = measure()
        seconds = round(time.monotonic() - began, 3)
        self._write(progress, {"subset": "held_out"}, values, seconds=seconds)

    def _write(
        self,
        progress: Progress,
        context: dict[str, str],
        values: dict[str, float],
        **more: float,  # the fields of Metric that belong to this line alone
    ) -> None:
        if not self._world.is_first:
            return
        self._sink(
            {
                "wall": time.time(),
                "stage": progress.stage,
                "attempt": self._attempt,
                "position": progress.samples,
                "world": self._world.size,
                "context": context,
                "values": {k: v if math.isfinite(v) else None for k, v in values.items()},
                "order_digest": progress.order_digest,
                **more,
            }
        )
