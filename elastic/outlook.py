"""What `plan` expects of a plan on machines that fail: goodput, the best interval, what is lost."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from cluster.constants import (
    BACKGROUND_S,
    CRASH_S,
    GPU_FLOPS,
    MACHINE_GPUS,
    MACHINE_SHARE,
    MEASURED,
    MEASURED_ON,
    NODE_S,
    PLANNED_S,
    RESULTS,
    RETURN_S,
    RUN_DAYS,
    SAVE_LOST_S,
    STALL_S,
    STATE_BYTES,
)
from cluster.goodput import DAY_S, Costs, Expected, Fleet, best_interval, expected
from elastic.goodput import duration
from elastic.shares import computed
from elastic.timeline import LOST, SAVING, STARTING
from elastic.workload import dit_flops, video_tokens
from stages.layout import rounded
from stages.schedule import Bucket
from stages.stage import DiffusionStage, Stage

# A stage that saves more often at the speed that is assumed is too small to reach that speed.
_LEAST_TIMED_S = 1.0
SCALES = (1, 10, 100, 1_000, 10_000)


class Faults(NamedTuple):
    """What befalls the GPUs of a run, and what stands by."""

    rate: float  # faults a GPU-day
    announced: float = 0.0  # share of them that take a machine after a notice
    spares: int = 0  # machines that wait to take the place of one that is lost


class Outlook(NamedTuple):
    """A run of one stage on so many GPUs: what is put into the model, and what comes out."""

    fleet: Fleet
    costs: Costs
    expected: Expected


def outlook(
    gpus: int,
    least: int,
    faults: Faults,
    saved_bytes: float,
    interval_s: float | None = None,
    multiple: int = 1,
    speed: Callable[[float], float] = float,
) -> Outlook:
    """Model a run on `gpus`, of which `least` must be there and a `multiple` is used.

    How fast it goes on so many of them is their `speed`.

    Saves `saved_bytes` on all GPUs together, every `interval_s` or as often as is best.
    """
    assert gpus % multiple == 0, f"{gpus} GPUs: not a multiple of {multiple}"
    machines = -(-gpus // round(MACHINE_GPUS.value))
    each = gpus / machines
    fleet = Fleet(
        machines=machines,
        least=min(machines, -(-least * machines // gpus)),
        faults_per_day=faults.rate * each,
        announced_share=faults.announced,
        machine_share=MACHINE_SHARE.value,
        spares=faults.spares,
        return_s=RETURN_S.value,
        gpus=each,
        multiple=multiple,
        speed=speed,
    )
    # What a worker saves may take longer than what was measured; that less takes less is not known.
    scale = max(1.0, saved_bytes / gpus / STATE_BYTES.value)
    lost = scale * max(SAVE_LOST_S.value, STALL_S.value)  # a slow-down may drown in the noise
    written = scale * (STALL_S.value + BACKGROUND_S.value)
    background = max(0.0, written - lost)
    best = max(best_interval(lost, fleet.crash_mean_s), background)
    costs = Costs(
        interval_s=interval_s or best,
        save_s=lost,
        background_s=background,
        planned_s=PLANNED_S.value + written,  # nothing is trained beside a last save
        process_s=CRASH_S.value,
        machine_s=NODE_S.value,
    )
    return Outlook(fleet, costs, expected(fleet, costs, RUN_DAYS.value * DAY_S))


def stage_outlook(
    stage: Stage, gpus: int, faults: Faults, saved_bytes: float, interval_s: float | None = None
) -> Outlook:
    """Model a run of a stage; what worlds compute without need makes them slower."""
    least, multiple, speed = stage.workers[0], stage.multiple, speed_of(stage)
    return outlook(gpus, least, faults, saved_bytes, interval_s, multiple, speed)


def outlook_lines(stage: Stage, gpus: int, faults: Faults, saved_bytes: float) -> Iterator[str]:
    """What is expected of one stage on so many GPUs."""
    best = stage_outlook(stage, gpus, faults, saved_bytes)
    yield f"goodput     {_said(best.expected)} on {gpus:,} GPUs"
    yield f"  {_parts(best)}"
    interval = best.costs.interval_s
    if interval == float("inf"):
        yield "  nothing fails: the fewer saves the better"
        return
    each = seconds_a_sample(stage, gpus)
    if each is None or each * stage.save_every < _LEAST_TIMED_S:
        yield f"  best saved every {duration(interval)} (Daly)"
        return
    every_s = stage.save_every * each
    own = stage_outlook(stage, gpus, faults, saved_bytes, every_s)
    yield (
        f"  best saved every {duration(interval)} (Daly), or {round(interval / each):,} samples; "
        f"save_every={stage.save_every:,} is every {duration(own.costs.interval_s)} at "
        f"{GPU_FLOPS.value / 1e12:.0f} TFLOP/s a GPU (assumed): {_said(own.expected)}"
    )


def scale_lines(
    faults: Faults, saved_bytes: float, gpus: int | None, multiple: int = 1
) -> Iterator[str]:
    """Goodput from one GPU to ten thousand, and what the numbers rest on.

    Every size is a `multiple`, as those of the stage with that checkpoint are.
    """
    announced = f" ({100 * faults.announced:g} % announced)" if faults.announced else ""
    spares = f"{faults.spares:,} spare machines, " if faults.spares else ""
    yield (
        f"goodput by the number of GPUs, {faults.rate:g} faults a GPU-day{announced}, {spares}runs "
        f"of {RUN_DAYS.value:.0f} days, the largest checkpoint:"
    )
    asked = {*SCALES, *([gpus] if gpus else [])}
    for number in sorted({max(multiple, rounded(size, multiple)) for size in asked}):
        one = outlook(number, multiple, faults, saved_bytes, multiple=multiple)
        mean = one.fleet.crash_mean_s
        between = "never" if mean == float("inf") else f"every {duration(mean)}"
        yield f"  {number:>6,}  {_said(one.expected)}; a fault without notice {between}"
    yield (
        "goodput is the time of training that is kept over all time; the model takes a lost "
        f"machine ({MACHINE_GPUS.value:.0f} GPUs) to be replaced after {duration(RETURN_S.value)}, "
        f"and {100 * MACHINE_SHARE.value:.0f} % of the faults without notice to take one; saving "
        "counts in how a save slows the updates beside it"
    )
    yield from _sources()


def _sources() -> Iterator[str]:
    """What the costs of saves and restarts rest on: machines other than the user's."""
    for bench, machine in MEASURED_ON.items():
        of_bench = {name.lower(): c for name, c in MEASURED.items() if c.bench == bench}
        measured = [name for name, constant in of_bench.items() if not constant.is_provisional]
        waiting = [name for name, constant in of_bench.items() if constant.is_provisional]
        if measured:
            yield (
                f"measured: {', '.join(measured)} by tests/bench/{bench}.py on {machine}; a larger "
                "model on GPUs has other times: run it there"
            )
        if waiting:
            yield (
                f"provisional: {', '.join(waiting)} are estimates until tests/bench/{bench}.py has "
                f"been run and {RESULTS} is copied into cluster/constants.py"
            )


def sample_flops(stage: DiffusionStage, bucket: Bucket) -> float:
    """FLOPs of one sample, forward and backward, with the longest text."""
    return dit_flops(stage, bucket, stage.text.most_tokens(()))


def seconds_a_sample(stage: Stage, gpus: int) -> float | None:
    """Mean seconds a sample over the stage at the assumed speed; None where FLOPs are not known."""
    if not isinstance(stage, DiffusionStage):
        return None
    return _work(stage, gpus) / stage.budget / GPU_FLOPS.value


def speed_of(stage: Stage) -> Callable[[float], float]:
    """How fast a stage trains on so many GPUs, against others: by what each of them computes."""

    @cache
    def speed(gpus: float) -> float:
        # The mean of GPUs a machine may be a fraction, and its sum end just below a whole number.
        return 1 / _work(stage, rounded(math.floor(gpus + 1e-6), stage.multiple))

    return speed


def _work(stage: Stage, workers: int) -> float:
    """What each worker computes over the stage, filler included: FLOPs, or tokens of a codec."""
    total, start = 0.0, 0
    for phase in stage.schedule:
        cycles = (phase.until - start) // phase.cycle
        for bucket in phase.buckets:
            total += cycles * computed(stage, bucket, workers) * _size(stage, bucket)
        start = phase.until
    return total / stage.context


def _size(stage: Stage, bucket: Bucket) -> float:
    if isinstance(stage, DiffusionStage):
        return sample_flops(stage, bucket)
    return video_tokens(stage, bucket)


def _said(one: Expected) -> str:
    asked = RUN_DAYS.value * DAY_S
    shorter = f"of only {duration(one.run_s)} " if one.run_s < asked else ""
    return (
        f"{100 * one.goodput:.2f} % expected (standard error {100 * one.standard_error:.2f}; "
        f"90 % of runs {shorter}{100 * one.low:.1f} to {100 * one.high:.1f})"
    )


def _parts(one: Outlook) -> str:
    shares = one.expected.shares
    lost = (
        (SAVING, shares.saving),
        (LOST, shares.lost),
        (STARTING, shares.starting),
        ("waiting for machines", shares.waiting),
    )
    said = ", ".join(f"{name} {100 * share:.2f} %" for name, share in lost)
    return f"{said}; {100 * shares.work:.2f} % of the work of machines that never fail"
