"""What a run did, worked out from its journals: stages, restarts, and where the time went."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from elastic.clock import lives
from elastic.goodput import Account, account_of
from elastic.journal import Event, Metric, latest_values, read_events, read_metrics


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
    is_left: bool  # for what branches from it


# What a stage's course is told by: begun, left for a branch, done.
COURSE_KINDS = ("stage_start", "stage_left", "stage_end")
_POOR_DB = 20.0  # what is given back is a blur, and a DiT on such latents learns to draw one


def poor_codec(metrics: Sequence[Metric], stage: str) -> str | None:
    """What to know of an autoencoder's stage before a DiT learns on its latents; None if nothing.

    By its last PSNR on held-out clips.
    """
    psnr = values_of(latest_values(metrics), stage, "psnr", {"subset": "held_out"})
    if not psnr or psnr[-1][1] >= _POOR_DB:
        return None
    return (
        f"the codec of stage {stage!r} gives held-out clips back at {psnr[-1][1]:.1f} dB, and "
        f"below {_POOR_DB:.0f} dB a DiT learns a blur: train it on more samples, or make it wider"
    )


class History(NamedTuple):
    """The journals of a run and what follows from them; jumps of the clock are taken out."""

    events: list[Event]
    metrics: list[Metric]  # redone positions included
    account: Account
    restarts: list[Restart]

    @property
    def stages(self) -> list[str]:
        """Stage names in the order in which they first appear."""
        events = [e["stage"] for e in self.events if e["stage"] is not None]
        return list(dict.fromkeys(events + [m["stage"] for m in self.metrics]))


def read_history(run_dir: str | Path) -> History:
    """Read a run folder; a run that has not begun has an empty history."""
    found = lives(read_events(run_dir), read_metrics(run_dir))
    events: list[Event] = [{**e, "wall": at / 1e6} for life in found for at, e in life.events]
    metrics: list[Metric] = [{**m, "wall": at / 1e6} for life in found for at, m in life.metrics]
    return History(events, metrics, account_of(found), _restarts(events, metrics))


def summarise(run_dir: str | Path) -> list[StageSummary]:
    """One summary for each stage that has begun, in the order of the plan."""
    return summarise_history(read_history(run_dir))


def summarise_history(history: History) -> list[StageSummary]:
    """As `summarise`, of a history that has been read already."""
    latest = latest_values(history.metrics)
    return [_summarise_stage(history, latest, stage) for stage in history.stages]


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
    state = "" if one.is_finished else " (left)" if one.is_left else " (unfinished)"
    return [
        f"{one.stage}{state}",
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
    course = [event["kind"] for event in mine if event["kind"] in COURSE_KINDS]
    return StageSummary(
        stage=stage,
        samples=max(positions, default=0),
        loss_first=_mean([value for _, value in losses[:few]]),
        loss_last=_mean([value for _, value in losses[-few:]]),
        held_out_first=held_out_losses[0][1] if held_out_losses else None,
        held_out_last=held_out_losses[-1][1] if held_out_losses else None,
        psnr=psnr[-1][1] if psnr else None,
        ssim=ssim[-1][1] if ssim else None,
        seconds=history.account.seconds(stage=stage),
        samples_lost=sum(restart.samples_lost for restart in restarts),
        resizes=sum(restart.cause == "resize" for restart in restarts),
        crashes=sum(event["kind"] == "crash" for event in mine),
        longest_gap=max((restart.seconds_without_step for restart in restarts), default=0.0),
        is_finished="stage_end" in course,
        is_left=course[-1:] == ["stage_left"],
    )


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


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
