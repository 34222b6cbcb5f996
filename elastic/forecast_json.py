"""The figures of `plan`, for programs; names and units as docs/json.md has them."""

from pathlib import Path
from typing import Any

from torch import nn

from elastic.branch import left_because
from elastic.checkpoint_store import Keep
from elastic.fit import kept_for, needed, policies, workers_on
from elastic.folders import RunFolder
from elastic.forecast import (
    BYTES_A_WEIGHT,
    count_parameters,
    latent_bytes,
    most_held,
    most_latent_bytes,
    most_text_bytes,
    saved_bytes,
)
from elastic.memory import as_dealt, state_memory
from elastic.outlook import Faults, sample_flops, seconds_a_sample, stage_outlook
from elastic.shares import computed, real_share, worlds
from elastic.traffic import update_traffic
from elastic.weights import finished
from elastic.worth_a_look import worth_a_look
from stages.plan import Plan
from stages.schedule import Bucket
from stages.stage import DiffusionStage, Stage

# Any: these are JSON trees.


def forecast_json(
    plan: Plan, storage: Path, gpus: int | None, faults: Faults | None, keep: Keep
) -> dict[str, Any]:
    """As `forecast`; InputError where a stage cannot run on so few GPUs."""
    folder = RunFolder.of(storage, plan)
    saved = {stage.name: saved_bytes(stage) for stage in plan.stages}
    weights = sum(count_parameters(stage) for stage in plan.stages) * BYTES_A_WEIGHT
    return {
        "plan": plan.name,
        "folder": str(folder.root),
        "stages": [
            {
                **_stage(stage, folder, gpus, faults),
                "left": left_because(plan, folder, stage) is not None,
            }
            for stage in plan.stages
        ],
        "disk": {
            "weights_bytes": weights,
            "checkpoints_bytes": sum(most_held(plan, s, keep) * saved[s.name] for s in plan.stages),
            "checkpoint_under_way_bytes": max(saved.values()),
            "latents_bytes_at_most": most_latent_bytes(plan),
        },
        "worth_a_look": [said for stage in plan.stages for said in worth_a_look(stage)],
    }


def _stage(
    stage: Stage, folder: RunFolder, gpus: int | None, faults: Faults | None
) -> dict[str, Any]:
    (fewest, most), workers, start = stage.workers, workers_on(stage, gpus), 0
    module, phases = stage.build(), []
    state = state_memory(stage, module, workers)
    for phase in stage.schedule:
        phases.append(
            {
                "from": start,
                "until": phase.until,
                "rounds": (phase.until - start) // phase.cycle,
                "buckets": [_bucket(stage, module, bucket, gpus) for bucket in phase.buckets],
            }
        )
        start = phase.until
    return {
        "stage": stage.name,
        "kind": type(stage).__name__,
        "finished": finished(folder.stage(stage.name)) is not None,
        "budget": stage.budget,
        "parameters": count_parameters(stage),
        "workers": {"fewest": fewest, "most": most, "planned": workers},
        "checkpoint_bytes": saved_bytes(stage),
        "save_every": stage.save_every,
        "memory_bytes": {
            "state": {part: size for part, size in vars(state).items() if size},
            "needed": {
                bucket.name: {
                    policy: needed(stage, module, bucket, workers, policy).total
                    for policy in policies(stage)
                }
                for bucket in stage.buckets
            },
            "kept": {
                bucket.name: {p: kept_for(stage, module, dealt, p) for p in policies(stage)}
                for bucket in stage.buckets
                for dealt in (as_dealt(stage, bucket, workers),)
            },
            "recompute": stage.recompute,
        },
        "phases": phases,
        "goodput": None if faults is None else _goodput(stage, workers, faults),
    }


def _bucket(stage: Stage, module: nn.Module, bucket: Bucket, gpus: int | None) -> dict[str, Any]:
    sizes = worlds(stage, gpus)
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    found: dict[str, Any] = {
        "bucket": bucket.name,
        "batch": bucket.batch,
        "micro": bucket.micro,
        "frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
        "latent": [stage.codec.channels, *grid],
        "real_share": {name: real_share(stage, bucket, size) for name, size in sizes.items()},
    }
    if not isinstance(stage, DiffusionStage):
        return found
    frames, height, width = stage.model.token_grid(grid)
    flops, text = sample_flops(stage, bucket), stage.text.most_tokens(())
    workers = workers_on(stage, gpus)
    sent = update_traffic(stage, module, bucket, text, workers).total
    return found | {
        "tokens": frames * height * width,
        "time_shift": stage.times(bucket).alpha,
        "flops_a_sample": flops,
        "flops_an_update_a_worker": flops * computed(stage, bucket, workers) / stage.context,
        "sent_bytes_an_update_a_worker": sent / workers,
        "latent_bytes_a_clip": latent_bytes(stage, bucket),
        "text_bytes_a_clip_at_most": most_text_bytes(stage),
    }


def _goodput(stage: Stage, workers: int, faults: Faults) -> dict[str, Any]:
    """What is expected with the best interval between saves, and that interval."""
    best = stage_outlook(stage, workers, faults, saved_bytes(stage))
    seconds, interval = seconds_a_sample(stage, workers), best.costs.interval_s
    is_known = interval != float("inf")  # nothing fails: the fewer saves the better
    return {
        "expected": best.expected.goodput,
        "standard_error": best.expected.standard_error,
        "low": best.expected.low,
        "high": best.expected.high,
        "best_interval_s": interval if is_known else None,
        "seconds_a_sample": seconds,
    }
