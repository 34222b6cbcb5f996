"""Whether a plan fits the devices it is meant for: what `plan` says of memory, and what to do."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from elastic.errors import InputError
from elastic.memory import (
    HEADROOM,
    Memory,
    activations,
    as_dealt,
    codec_layers,
    dit_layers,
    kept_by_codec,
    kept_by_judges,
    peak_memory,
    state_memory,
)
from elastic.moments import Layer
from models.codec import CodecModule
from models.dit import MMDiT
from models.recompute import RECOMPUTE, Recompute
from stages.layout import multiple, rounded
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
    """What one worker always has, part by part, then what each bucket takes under each policy."""
    workers = workers_on(stage, gpus)
    state = state_memory(stage, module, workers)
    precision = stage.precision if isinstance(stage, DiffusionStage) else "fp32"
    yield (
        f"memory      on each of {workers}, {precision}: {_parts(state)}; "
        f"{shown(state.total)} at all times"
    )
    for bucket in stage.buckets:
        needs = []
        for policy in policies(stage):
            need = needed(stage, module, bucket, workers, policy)
            chosen = f" (chosen: {_parts(need, beside=state)})" if policy == stage.recompute else ""
            needs.append(f"{shown(need.total)} with recompute={policy!r}{chosen}")
        micro = as_dealt(stage, bucket, workers).micro
        yield f"  {bucket.name:<12}  micro {micro} takes {', '.join(needs)}"


def _parts(need: Memory, beside: Memory | None = None) -> str:
    """Its parts, without those that are as in the other."""
    others = {} if beside is None else vars(beside)
    parts = {part: size for part, size in vars(need).items() if size and others.get(part) != size}
    return ", ".join(f"{part} {shown(size)}" for part, size in parts.items())


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
    return min(rounded(gpus, stage.multiple), high)


def policies(stage: Stage) -> tuple[Recompute, ...]:
    """The recompute policies that the stage can choose from."""
    if isinstance(stage, DiffusionStage):
        return RECOMPUTE
    return ("none", "full") if stage.vae.can_recompute else ("none",)


def needed(
    stage: Stage, module: nn.Module, bucket: Bucket, workers: int, policy: Recompute
) -> Memory:
    """The most that one of some workers holds at once in an update of a bucket."""
    layers = sample_layers(stage, module, bucket, policy)
    return peak_memory(stage, module, bucket, workers, layers)


def sample_layers(
    stage: Stage, module: nn.Module, bucket: Bucket, policy: Recompute
) -> list[Layer]:
    """What computes in turn, and what one sample of a bucket takes there."""
    if isinstance(stage, DiffusionStage):
        assert isinstance(module, MMDiT), type(module)
        return dit_layers(stage, module, bucket, stage.text.most_tokens(()), policy)
    assert isinstance(module, CodecModule), type(module)
    return codec_layers(module, kept_for(stage, module, bucket.replace(micro=1), policy))


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
    for bucket in stage.buckets:
        need = needed(stage, module, bucket, workers, stage.recompute)
        if need.total <= HEADROOM * device_bytes:
            continue
        dealt = as_dealt(stage, bucket, workers)
        remedies = list(_remedies(stage, module, bucket, HEADROOM * device_bytes))
        model = need.total - need.activations
        raise InputError(
            f"stage {stage.name!r}: bucket {bucket.name!r} with micro={dealt.micro} needs "
            f"{shown(need.total)} on each of {workers} workers ({shown(model)} of it for "
            f"the model), and {shown(HEADROOM * device_bytes)} of a device of "
            f"{shown(device_bytes)} can be planned for; {'; or '.join(remedies) or _NOTHING}"
        )


_NOTHING = (
    "nothing fits, whatever micro, recompute and the number of workers: choose a smaller bucket, a "
    "smaller model, or a codec of deeper compression"
)


def _remedies(stage: Stage, module: nn.Module, bucket: Bucket, room: float) -> Iterator[str]:
    """The largest micro-batch on the fewest workers; then, for the one asked, more workers.

    As few more as hold the model, or else as share the tokens of a sample.
    """
    low, high = stage.workers
    samples = {policy: sample_layers(stage, module, bucket, policy) for policy in policies(stage)}

    def need(policy: Recompute, micro: int, workers: int) -> float:
        asked = bucket.replace(micro=micro)
        return peak_memory(stage, module, asked, workers, samples[policy]).total

    for policy in sorted(samples, key=lambda p: (p != stage.recompute, need(p, 1, low))):
        for micro in range(as_dealt(stage, bucket, low).micro, 0, -1):
            if (size := need(policy, micro, low)) <= room:
                yield f"{_how(stage, policy)}micro={micro} fits ({shown(size)})"
                break
    more = range(low + stage.multiple, high + 1, stage.multiple)
    fewest = {
        policy: _fewest(more, partial(need, policy, bucket.micro), room) for policy in samples
    }
    policy = min(fewest, key=lambda p: (fewest[p], p != stage.recompute))
    if fewest[policy] <= high:
        yield f"{_how(stage, policy)}workers=({fewest[policy]}, {high}) fits as it is"
        return
    for wider in _sharing_more(stage):
        if needed(wider, module, bucket, wider.workers[0], wider.recompute).total <= room:
            yield f"context={wider.context} and workers={wider.workers} fits as it is"
            return


def _fewest(more: range, need: Callable[[int], float], room: float) -> float:
    """The fewest of these workers that fit, as more never need more; infinite where none do."""
    index = bisect_left(more, True, key=lambda workers: need(workers) <= room)
    return more[index] if index < len(more) else math.inf


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
