"""Whether a plan fits the devices it is meant for: what `plan` says of memory, and what to do."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from elastic.errors import InputError
from elastic.memory import (
    HEADROOM,
    activations,
    kept_by_codec,
    kept_by_judges,
    state_memory,
)
from models.codec import CodecModule
from models.recompute import RECOMPUTE, Recompute
from stages.layout import multiple
from stages.schedule import Bucket
from stages.stage import DiffusionStage, Stage

GIB = 2**30


def local_device_bytes() -> float:
    """Memory of the smallest GPU of this machine; 0 where there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min(
        (float(torch.cuda.get_device_properties(i).total_memory) for i in range(count)), default=0.0
    )


def memory_lines(stage: Stage, module: nn.Module, gpus: int | None) -> Iterator[str]:
    """Memory of one worker, part by part, then what each bucket adds under each policy."""
    workers = workers_on(stage, gpus)
    state = state_memory(stage, module, workers)
    parts = ", ".join(f"{part} {shown(size)}" for part, size in vars(state).items() if size)
    precision = stage.precision if isinstance(stage, DiffusionStage) else "fp32"
    yield f"memory      on each of {workers}, {precision}: {parts}; {shown(state.total)} in all"
    for bucket in stage.buckets:
        kept = [
            f"{shown(kept_for(stage, module, bucket, policy))} with recompute={policy!r}"
            + (" (chosen)" if policy == stage.recompute else "")
            for policy in policies(stage)
        ]
        yield f"  {bucket.name:<12}  micro {bucket.micro} keeps {', '.join(kept)}"


def workers_on(stage: Stage, gpus: int | None) -> int:
    """How many workers the stage has on so many GPUs; the fewest if it is not said."""
    low, high = stage.workers
    if gpus is None:
        return low
    if gpus < low:
        raise InputError(
            f"stage {stage.name!r}: workers {stage.workers}: it needs {low} and there are {gpus} "
            "GPUs; lower the first number, or plan for more"
        )
    return min(gpus - gpus % stage.multiple, high)


def policies(stage: Stage) -> tuple[Recompute, ...]:
    """The recompute policies that the stage can choose from."""
    if isinstance(stage, DiffusionStage):
        return RECOMPUTE
    return ("none", "full") if stage.vae.can_recompute else ("none",)


def kept_for(stage: Stage, module: nn.Module, bucket: Bucket, policy: Recompute) -> float:
    """Bytes that one micro-batch keeps for the backward pass."""
    if isinstance(stage, DiffusionStage):
        return activations(stage, bucket, stage.text.most_tokens(()), policy)
    assert isinstance(module, CodecModule), type(module)
    x_BCTHW = torch.empty((1, 3, bucket.frames, bucket.height, bucket.width), device="meta")
    return bucket.micro * (kept_by_codec(module, x_BCTHW, policy) + kept_by_judges(stage, x_BCTHW))


def check_fit(stage: Stage, device_bytes: float) -> None:
    """InputError, with what would fit, for the first bucket that does not fit the device.

    On the fewest workers of the stage: after losses it goes on with so few.
    """
    module, workers = stage.build(), stage.workers[0]
    state = state_memory(stage, module, workers)
    for bucket in stage.buckets:
        need = replace(state, activations=kept_for(stage, module, bucket, stage.recompute))
        if need.total <= HEADROOM * device_bytes:
            continue
        remedies = list(_remedies(stage, module, bucket, device_bytes))
        raise InputError(
            f"stage {stage.name!r}: bucket {bucket.name!r} with micro={bucket.micro} needs "
            f"{shown(need.total)} on each of {workers} workers ({shown(state.total)} of it for "
            f"the model), and {shown(HEADROOM * device_bytes)} of a device of "
            f"{shown(device_bytes)} can be planned for; {'; or '.join(remedies) or _NOTHING}"
        )


_NOTHING = (
    "nothing fits, whatever micro, recompute and the number of workers: choose a smaller bucket, a "
    "smaller model, or a codec of deeper compression"
)


def _remedies(
    stage: Stage, module: nn.Module, bucket: Bucket, device_bytes: float
) -> Iterator[str]:
    """The largest micro-batch on the fewest workers; then, for the one asked, more workers.

    As few more as hold the model, or else as share the tokens of a sample.
    """
    room, (low, high) = HEADROOM * device_bytes, stage.workers
    each = {
        policy: kept_for(stage, module, bucket, policy) / bucket.micro for policy in policies(stage)
    }
    for policy in sorted(each, key=lambda policy: (policy != stage.recompute, each[policy])):
        state = state_memory(stage, module, low).total
        micro = min(int((room - state) // each[policy]), bucket.micro) if room > state else 0
        if micro:
            fits = shown(state + micro * each[policy])
            yield f"{_how(stage, policy)}micro={micro} fits ({fits})"
    for workers in range(low + stage.multiple, high + 1, stage.multiple):
        state = state_memory(stage, module, workers).total
        fitting = [p for p in each if state + bucket.micro * each[p] <= room]
        if fitting:
            policy = min(fitting, key=lambda p: p != stage.recompute)
            yield f"{_how(stage, policy)}workers=({workers}, {high}) fits as it is"
            return
    for wider in _sharing_more(stage):
        need = state_memory(wider, module, wider.workers[0]).total
        if need + kept_for(wider, module, bucket, wider.recompute) <= room:
            yield f"context={wider.context} and workers={wider.workers} fits as it is"
            return


def _sharing_more(stage: Stage) -> Iterator[DiffusionStage]:
    """The stage with more workers a sample, as many as its heads and its most workers allow."""
    if not isinstance(stage, DiffusionStage) or stage.exact:
        return
    low, high = stage.workers
    for context in range(stage.context + 1, stage.model.heads + 1):
        one = multiple(context, stage.shard_within)
        fewest = -(-low // one) * one
        if stage.model.heads % context == 0 and fewest <= high:
            yield stage.replace(context=context, workers=(fewest, high // one * one))


def _how(stage: Stage, policy: Recompute) -> str:
    return f"recompute={policy!r} and " if len(policies(stage)) > 1 else ""


def shown(size: float) -> str:
    """Bytes in the unit that people would choose."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
