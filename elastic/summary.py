"""What a run did, worked out from its journals: stages, restarts, and where the time went."""

import sys
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from elastic.journal import Event, Metric, latest_values, read_events, read_metrics

# What a worker group, or the driver, does after an event of this kind.
_NEXT_STATE = {
    "run_start": "starting",
    "stage_start": "starting",
    "encode_start": "encoding",
    "encode_end": "starting",
    "start": "training",
    "crash": "starting",
    "stage_end": "other",
    "run_end": None,
}
ACTIVITIES = ("training", "saving", "waiting for data", "starting", "encoding", "other")


class Span(NamedTuple):
    """A stretch of wall time with one activity; both ends in unix seconds."""

    begin: float
    end: float
    activity: str
    stage: str | None


class Restart(NamedTuple):
    """A worker group that took over from another one in the middle of a stage."""

    stage: str
    wall: float
    cause: str  # crash, resize, run restarted
    reason: str
    position_before: int
    position_after: int
    samples_lost: int
    seconds_without_step: float  # from the last logged step to the first one of the new group
    world_before: int | None
    world_after: int | None


class StageSummary(NamedTuple):
    """One line of the closing table; losses are means over the first and last 5 % of the log."""

    stage: str
    samples: int
    loss_first: float | None
    loss_last: float | None
    held_out_first: float | None
    held_out_last: float | None
    psnr: float | None
    ssim: float | None
    seconds: float
    samples_lost: int
    resizes: int
    crashes: int
    longest_gap: float
    is_finished: bool


class History(NamedTuple):
    """The journals of a run and what follows from them."""

    events: list[Event]
    metrics: list[Metric]  # as written, redone positions included
    spans: list[Span]
    restarts: list[Restart]

    @property
    def stages(self) -> list[str]:
        """Stage names in the order in which they first appear."""
        events = [e["stage"] for e in self.events if e["stage"] is not None]
        return list(dict.fromkeys(events + [m["stage"] for m in self.metrics]))


def read_history(run_dir: str | Path) -> History:
    """Read a run folder; a run that has not begun has an empty history."""
    events = sorted(read_events(run_dir), key=lambda event: event["wall"])
    metrics = read_metrics(run_dir)
    return History(events, metrics, _spans(events, metrics), _restarts(events, metrics))


def summarise(run_dir: str | Path) -> list[StageSummary]:
    """One summary for each stage that has begun, in the order of the plan."""
    return summarise_history(read_history(run_dir))


def summarise_history(history: History) -> list[StageSummary]:
    """As `summarise`, of a history that has been read already."""
    latest = latest_values(history.metrics)
    return [_summarise_stage(history, latest, stage) for stage in history.stages]


def time_accounts(history: History) -> dict[str, dict[str, float]]:
    """Seconds by stage and activity; the stage "" is time that belongs to none."""
    accounts: dict[str, dict[str, float]] = {}
    for span in history.spans:
        account = accounts.setdefault(span.stage or "", dict.fromkeys(ACTIVITIES, 0.0))
        account[span.activity] += span.end - span.begin
    for stage, account in accounts.items():
        published = [e for e in history.events if e["kind"] == "publish" and e["stage"] == stage]
        spent = {
            "saving": sum(event.get("seconds", 0.0) for event in published),
            "waiting for data": _data_wait(history, stage),
        }
        for activity, seconds in spent.items():
            # Both happen inside training spans; clocks of two processes may differ a little.
            moved = min(seconds, account["training"])
            account["training"] -= moved
            account[activity] += moved
    return accounts


def print_table(summaries: Sequence[StageSummary], file: TextIO | None = None) -> None:
    """Print the closing table as plain text, to standard output unless told otherwise."""
    print(table_text(summaries), file=file or sys.stdout)


def table_text(summaries: Sequence[StageSummary]) -> str:
    """The closing table; numbers to the right, a dash where there is none."""
    rows = [list(TABLE_HEAD)] + [table_row(summary) for summary in summaries]
    widths = [max(len(row[i]) for row in rows) for i in range(len(TABLE_HEAD))]
    lines = []
    for row in rows:
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


TABLE_HEAD = (
    "stage",
    "samples",
    "loss first",
    "loss last",
    "held-out first",
    "held-out last",
    "PSNR dB",
    "SSIM",
    "seconds",
    "samples lost",
    "resizes",
    "crashes",
    "longest gap s",
)


def table_row(one: StageSummary) -> list[str]:
    """The cells of one stage under TABLE_HEAD."""
    losses = (one.loss_first, one.loss_last, one.held_out_first, one.held_out_last)
    return [
        one.stage if one.is_finished else f"{one.stage} (unfinished)",
        f"{one.samples:,}",
        *("-" if loss is None else f"{loss:.4g}" for loss in losses),
        "-" if one.psnr is None else f"{one.psnr:.2f}",
        "-" if one.ssim is None else f"{one.ssim:.3f}",
        f"{one.seconds:,.0f}",
        f"{one.samples_lost:,}",
        str(one.resizes),
        str(one.crashes),
        f"{one.longest_gap:.1f}" if one.longest_gap else "-",
    ]


def values_of(
    metrics: Sequence[Metric], stage: str, name: str, context: dict[str, str]
) -> list[tuple[int, float]]:
    """(position, value) of one series, without the values that are no number."""
    pairs = (
        (metric["position"], metric["values"].get(name))
        for metric in metrics
        if metric["stage"] == stage and metric["context"] == context
    )
    return [(position, value) for position, value in pairs if value is not None]


def contexts_of(metrics: Sequence[Metric], stage: str, key: str) -> list[str]:
    """The names that a stage's lines have under one context key, such as its buckets."""
    return list(
        dict.fromkeys(
            metric["context"][key]
            for metric in metrics
            if metric["stage"] == stage and key in metric["context"]
        )
    )


def _summarise_stage(history: History, latest: list[Metric], stage: str) -> StageSummary:
    # The line over all buckets; a journal without one is read bucket by bucket.
    losses = values_of(latest, stage, "loss", {}) or [
        pair
        for bucket in contexts_of(latest, stage, "bucket")
        for pair in values_of(latest, stage, "loss", {"bucket": bucket})
    ]
    losses.sort()
    held_out = {"subset": "held_out"}
    held_out_losses = values_of(latest, stage, "loss", held_out)
    psnr = values_of(latest, stage, "psnr", held_out)
    ssim = values_of(latest, stage, "ssim", held_out)
    restarts = [restart for restart in history.restarts if restart.stage == stage]
    mine = [event for event in history.events if event["stage"] == stage]
    positions = [metric["position"] for metric in latest if metric["stage"] == stage]
    positions += [event["position"] or 0 for event in mine if event["kind"] == "stage_end"]
    few = max(1, len(losses) // 20)
    return StageSummary(
        stage=stage,
        samples=max(positions, default=0),
        loss_first=_mean([value for _, value in losses[:few]]),
        loss_last=_mean([value for _, value in losses[-few:]]),
        held_out_first=held_out_losses[0][1] if held_out_losses else None,
        held_out_last=held_out_losses[-1][1] if held_out_losses else None,
        psnr=psnr[-1][1] if psnr else None,
        ssim=ssim[-1][1] if ssim else None,
        seconds=sum(span.end - span.begin for span in history.spans if span.stage == stage),
        samples_lost=sum(restart.samples_lost for restart in restarts),
        resizes=sum(restart.cause == "resize" for restart in restarts),
        crashes=sum(event["kind"] == "crash" for event in mine),
        longest_gap=max((restart.seconds_without_step for restart in restarts), default=0.0),
        is_finished=any(event["kind"] == "stage_end" for event in mine),
    )


def _spans(events: list[Event], metrics: list[Metric]) -> list[Span]:
    """Split the wall time at the events; time in which no driver lived is in no span."""
    walls = sorted([e["wall"] for e in events] + [m["wall"] for m in metrics])
    spans: list[Span] = []
    state, stage, since = None, None, 0.0
    is_resizing = False

    def end_span(wall: float) -> None:
        if state is not None and wall > since:
            spans.append(Span(since, wall, state, stage))

    for event in events:
        kind, wall = event["kind"], event["wall"]
        is_resizing = is_resizing or kind == "resize_requested"
        is_handing_over = is_resizing and kind == "publish"
        if kind not in _NEXT_STATE and not is_handing_over:
            continue
        # A killed driver writes no run_end: its last line is its last sign of life.
        alive = walls[bisect_left(walls, wall) - 1] if walls[0] < wall else wall
        end_span(alive if kind == "run_start" else wall)
        if kind in ("start", "crash", "stage_end", "run_start") or is_handing_over:
            is_resizing = False
        state, since = "starting" if is_handing_over else _NEXT_STATE[kind], wall
        stage = None if kind == "run_start" else event["stage"] or stage
    if walls:
        end_span(walls[-1])
    return spans


def _restarts(events: list[Event], metrics: list[Metric]) -> list[Restart]:
    restarts = []
    previous: dict[str, Event] = {}
    for event in events:
        stage = event["stage"]
        if event["kind"] != "start" or stage is None:
            continue
        if stage in previous:
            restarts.append(_restart(previous[stage], event, events, metrics))
        previous[stage] = event
    return restarts


def _restart(old: Event, new: Event, events: list[Event], metrics: list[Metric]) -> Restart:
    stage = new["stage"]
    assert stage is not None, f"a start event without a stage: {new}"
    # Of the old group only: an earlier group may have been further, and lost that already.
    lines = [m for m in metrics if m["stage"] == stage and old["wall"] <= m["wall"] < new["wall"]]
    after = new["position"] or 0
    before = max([m["position"] for m in lines], default=old["position"] or 0)
    between = [e for e in events if old["wall"] < e["wall"] <= new["wall"]]
    cause, reason = _cause(between, old, new)
    stopped = max([m["wall"] for m in lines], default=old["wall"])
    return Restart(
        stage=stage,
        wall=new["wall"],
        cause=cause,
        reason=reason or new["reason"],
        position_before=before,
        position_after=after,
        samples_lost=max(0, before - after),
        seconds_without_step=max(0.0, _first_step_wall(new, metrics) - stopped),
        world_before=old["world"],
        world_after=new["world"],
    )


def _cause(between: list[Event], old: Event, new: Event) -> tuple[str, str]:
    for kind, cause in (
        ("crash", "crash"),
        ("resize_requested", "resize"),
        ("run_start", "run restarted"),
    ):
        for event in reversed(between):
            if event["kind"] == kind and event["stage"] in (new["stage"], None):
                return cause, event["reason"]
    return ("resize" if old["world"] != new["world"] else "restart"), new["reason"]


def _first_step_wall(start: Event, metrics: list[Metric]) -> float:
    """When the new group began its first step: its first log line, less what that line covers."""
    for metric in metrics:
        if metric["stage"] != start["stage"] or metric["wall"] < start["wall"]:
            continue
        rate = metric["values"].get("samples_per_s")
        if rate:
            covered = (metric["position"] - (start["position"] or 0)) / rate
            return max(start["wall"], metric["wall"] - covered)
    return start["wall"]


def _data_wait(history: History, stage: str) -> float:
    """Seconds in which steps waited for data; `data_wait` is a share of each log interval."""
    total = 0.0
    position: dict[int | None, int] = {
        event["attempt"]: event["position"] or 0
        for event in history.events
        if event["kind"] == "start" and event["stage"] == stage
    }
    for metric in history.metrics:
        share = metric["values"].get("data_wait")
        rate = metric["values"].get("samples_per_s")
        if metric["stage"] != stage or share is None or not rate:
            continue
        since = position.get(metric["attempt"], metric["position"])
        total += share * max(0, metric["position"] - since) / rate
        position[metric["attempt"]] = metric["position"]
    return total


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
