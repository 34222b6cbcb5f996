"""What the verb `plan` prints: the forecast, and on request what micro-batches take here."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from elastic.branch import check_branches
from elastic.checkpoint_store import Keep
from elastic.data.deal import num_rounds
from elastic.errors import InputError
from elastic.fit import GIB, check_fit, local_device_bytes, shown, workers_on
from elastic.folders import RunFolder
from elastic.forecast import forecast
from elastic.forecast_json import forecast_json
from elastic.measure import Found, Tried, dealt, fastest, measured, seconds_of
from elastic.outlook import Faults
from elastic.record import check_unchanged
from elastic.settings import Settings
from elastic.workload import video_tokens
from stages.plan import Plan
from stages.schedule import Bucket
from stages.stage import Stage

MEASURED = ".measured"  # folder beside the runs


def print_plan(plan: Plan, flags: argparse.Namespace, settings: Settings) -> None:
    """Print the plan; InputError for what does not fit the device that is named, or is here.

    So for a stage that has started and is another now, and for a branch from a checkpoint that is
    not there: they would not be trained either.
    """
    folder = RunFolder.of(settings.storage_path, plan)
    check_unchanged(folder, plan)
    check_branches(plan, folder)
    faults = _faults(flags)
    keep = Keep(settings.keep_last, settings.keep_every)
    if flags.json and flags.measure:
        raise InputError("--measure prints tables and --json one object; give one of them")
    asked = (plan, settings.storage_path, flags.gpus, faults, keep)
    print(json.dumps(forecast_json(*asked)) if flags.json else forecast(*asked))
    if flags.measure:
        for stage in plan.stages:
            for line in measured_lines(stage, flags.gpus, settings.storage_path / MEASURED):
                print(line, flush=True)
    device_bytes = flags.gpu_memory * GIB if flags.gpu_memory else local_device_bytes()
    if device_bytes:
        for stage in plan.stages:
            check_fit(stage, device_bytes)


def _faults(flags: argparse.Namespace) -> Faults | None:
    """What is said about faults; InputError where it is said of none."""
    if flags.failure_rate is not None:
        return Faults(flags.failure_rate, flags.announced or 0.0, flags.spares or 0)
    for name in ("announced", "spares"):
        if getattr(flags, name) is not None:
            raise InputError(f"--{name} was given without --failure-rate; give both or neither")
    return None


def measured_lines(stage: Stage, gpus: int | None, folder: Path) -> Iterator[str]:
    """A table for each bucket of a stage, and the values to write into the stage file."""
    if stage.context > 1:
        yield f"\n{stage.name}: not measured: {stage.context} workers share the tokens of a sample"
        return
    workers = workers_on(stage, gpus)
    found, path, is_kept = measured(stage, workers, folder, _show)
    yield ""
    yield (
        f"{stage.name}: micro-batches on this device, batches dealt to {workers}"
        + (f" (measured before; delete {path} to measure again)" if is_kept else f" ({path})")
    )
    for one, bucket in zip(found, stage.buckets, strict=True):
        best = fastest(one, bucket.batch)
        yield f"  {bucket.name}, batch {bucket.batch}"
        yield "    micro  rounds  s a sample  tokens/s a worker      memory"
        for tried in one.tried:
            yield "    " + _row(stage, bucket, one, tried, tried is best)
        yield "    " + _advice(stage, bucket, best, workers)


def _row(stage: Stage, bucket: Bucket, found: Found, tried: Tried, is_best: bool) -> str:
    rounds = num_rounds(bucket.batch, tried.micro, found.workers)
    memory = shown(tried.said) + " said" if tried.peak is None else shown(tried.peak)
    seconds = seconds_of(found, tried, bucket.batch)
    if seconds is None:
        return f"{tried.micro:>5}  {rounds:>6}  {tried.problem}, {memory}"
    samples = bucket.batch / found.workers
    tokens = video_tokens(stage, bucket) * samples / seconds
    row = f"{tried.micro:>5}  {rounds:>6}  {seconds / samples:>10.4g}  {tokens:>17,.0f}  {memory}"
    return row + "  fastest" * is_best


def _advice(stage: Stage, bucket: Bucket, best: Tried | None, workers: int) -> str:
    if best is None:
        return "nothing fits here: choose a smaller bucket, or recompute"
    if best.micro == dealt(bucket, bucket.micro, workers, stage.exact):
        return f"micro={bucket.micro}, as the stage file has it"
    text = f"write micro={best.micro} into the stage file, which has micro={bucket.micro}"
    # In an exact stage the size decides how sums are rounded.
    return text + (", before the stage begins: it is exact" if stage.exact else "")


def _show(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr, flush=True)
