"""Whether a plan fits the devices it is meant for: what `plan` says of memory, and what to do."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from elastic.errors import InputError
from elastic.memory import (
    HEADROOM,
    RECOMPUTE,
    Recompute,
    activations,
    kept_by_autograd,
    state_memory,
)
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
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in vars(state).items() if size)
    precision = stage.precision if isinstance(stage, DiffusionStage) else "fp32"
    yield f"memory      on each of {workers}, {precision}: {parts}; {_gib(state.total)} in all"
    for bucket in stage.buckets:
        kept = [
            f"{_gib(kept_for(stage, module, bucket, policy))} with recompute={policy!r}"
            + (" (chosen)" if policy == chosen_policy(stage) else "")
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
    return min(gpus, high)


def policies(stage: Stage) -> tuple[Recompute, ...]:
    """The recompute policies that the stage can choose from."""
    return RECOMPUTE if isinstance(stage, DiffusionStage) else ("none",)


def chosen_policy(stage: Stage) -> Recompute:
    """The recompute policy that the stage asks for."""
    return stage.recompute if isinstance(stage, DiffusionStage) else "none"


def kept_for(stage: Stage, module: nn.Module, bucket: Bucket, policy: Recompute) -> float:
    """Bytes that one micro-batch keeps for the backward pass."""
    if isinstance(stage, DiffusionStage):
        return activations(stage, bucket, stage.text.most_tokens(()), policy)
    shape = (1, 3, bucket.frames, bucket.height, bucket.width)
    return bucket.micro * kept_by_autograd(module, torch.empty(shape, device="meta"))


def check_fit(stage: Stage, gpus: int | None, device_bytes: float) -> None:
    """InputError, with what would fit, if a bucket of the stage does not fit the device."""
    module, workers = stage.build(), workers_on(stage, gpus)
    state = state_memory(stage, module, workers)
    for bucket in stage.buckets:
        need = replace(state, activations=kept_for(stage, module, bucket, chosen_policy(stage)))
        if need.total <= HEADROOM * device_bytes:
            continue
        remedies = list(_remedies(stage, module, bucket, workers, device_bytes))
        raise InputError(
            f"stage {stage.name!r}: bucket {bucket.name!r} with micro={bucket.micro} needs "
            f"{_gib(need.total)} on each of {workers} workers ({_gib(state.total)} of it for the "
            f"model), and {_gib(HEADROOM * device_bytes)} of a device of {_gib(device_bytes)} can "
            f"be planned for; {'; or '.join(remedies) or _NOTHING}"
        )


_NOTHING = (
    "no micro-batch fits on any number of workers that the stage allows: raise workers, choose a "
    "smaller bucket, or a codec of deeper compression"
)


def _remedies(
    stage: Stage, module: nn.Module, bucket: Bucket, workers: int, device_bytes: float
) -> Iterator[str]:
    room = HEADROOM * device_bytes
    for policy in policies(stage):
        each = kept_for(stage, module, bucket, policy) / bucket.micro
        state = state_memory(stage, module, workers).total
        micro = min(int((room - state) // each), bucket.micro) if room > state else 0
        if micro:
            yield f"{_how(stage, policy)}micro={micro} fits ({_gib(state + micro * each)})"
            if micro == bucket.micro:
                return
    for more in range(workers + 1, stage.workers[1] + 1):
        state = state_memory(stage, module, more).total
        for policy in policies(stage):
            each = kept_for(stage, module, bucket, policy) / bucket.micro
            if state + each <= room:
                yield f"{more} workers fit with {_how(stage, policy)}micro=1"
                return


def _how(stage: Stage, policy: Recompute) -> str:
    return f"recompute={policy!r} and " if len(policies(stage)) > 1 else ""


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
