"""How fast each stage trains: what `status` and the report say of throughput and memory."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from elastic.journal import Metric, latest_values
from elastic.summary import History


class Speed(NamedTuple):
    """Medians over the log lines of a stage's newest attempt; the memory is the most of all."""

    stage: str
    world: int
    values: dict[str, float]


_SHOWN: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("samples_per_s", lambda x: f"{x:,.4g} samples/s"),
    ("tokens_per_s", lambda x: f"{x:,.0f} tokens/s"),
    ("tokens_per_s_per_worker", lambda x: f"{x:,.0f} a worker"),
    ("useful_tokens", lambda x: f"{x:.1%} of computed tokens of use"),
    ("data_wait", lambda x: f"{x:.1%} of the time waiting for data"),
    ("flops_per_device", lambda x: f"{x / 1e12:,.3g} TFLOP/s a device"),
    ("mfu", lambda x: f"MFU {x:.1%}"),
    ("memory_peak", lambda x: f"{x / 2**30:,.2f} GiB at most"),
)


def speeds(history: History) -> list[Speed]:
    """The speed of each stage that has trained, in the order of the plan."""
    latest = [m for m in latest_values(history.metrics) if not m["context"]]
    found = []
    for stage in history.stages:
        lines = [metric for metric in latest if metric["stage"] == stage]
        newest = max((metric["attempt"] for metric in lines), default=0)
        mine = [metric for metric in lines if metric["attempt"] == newest]
        if mine:
            found.append(Speed(stage, mine[-1]["world"], dict(_values(mine))))
    return found


def _values(lines: Sequence[Metric]) -> Iterator[tuple[str, float]]:
    for name, _ in _SHOWN:
        known = [value for line in lines if (value := line["values"].get(name)) is not None]
        if known:
            # Half of the lines may hold a measurement or a save without moving the median.
            yield name, max(known) if name == "memory_peak" else statistics.median(known)


def speed_lines(history: History) -> list[str]:
    """One line for each stage that has trained."""
    return [
        f"speed of {one.stage} on {one.world}: "
        + ", ".join(shown(one.values[name]) for name, shown in _SHOWN if name in one.values)
        for one in speeds(history)
    ]
