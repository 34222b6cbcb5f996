"""One self-contained HTML page about a run; it opens without a network and without a server."""

import datetime
import json
import re
from pathlib import Path

from plotly.offline import get_plotlyjs

from elastic.cost import COUNTED, Cost, cost, unit
from elastic.figures import (
    Figure,
    level_figure,
    loss_figure,
    psnr_figure,
    safe,
    ssim_figure,
    time_figure,
    timeline_figure,
)
from elastic.files import write_atomic
from elastic.goodput import DEFINITION, Account, duration, shown_goodput
from elastic.journal import Event, latest_values
from elastic.page_parts import folded, key, section, soft, table
from elastic.report_record import (
    autoencoders,
    fingerprints,
    read_run,
    starts,
    versions,
    whole_record,
)
from elastic.report_samples import samples
from elastic.speed import speed_lines
from elastic.summary import (
    TABLE_HEAD,
    History,
    StageSummary,
    print_table,
    read_history,
    summarise,
    summarise_history,
    table_row,
)
from elastic.timeline import ACTIVITIES

__all__ = ["StageSummary", "print_table", "summarise", "write_report"]

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("report_page.html")


def write_report(run_dir: str | Path) -> Path:
    """Write report.html from the journals and samples of a run folder, and return its path."""
    run_dir = Path(run_dir)
    history = read_history(run_dir)
    summaries = summarise_history(history)
    run = read_run(run_dir)
    title = str(run.get("plan") or run_dir.resolve().name)
    losses, figures = _losses(history)
    times = timeline_figure(history, "timeline"), time_figure(history.account, "time")
    body = [
        _header(title, history, summaries),
        section("The stages", _stage_table(summaries)),
        section("What each stage started from", starts(run_dir, run, history.stages)),
        section("Samples", samples(run_dir, history, autoencoders(run))),
        section("Loss over samples", losses),
        section("World size, events and throughput", _plot(times[0], "tall")),
        section("Speed", _speed_table(history)),
        section("Restarts", _restart_table(history)),
        section("Where the time went", _time_table(history.account, times[1])),
        section("What it cost", _cost_table(history)),
        section("Events", _event_table(history.events)),
        section(
            "Versions and fingerprints",
            versions(run) + fingerprints(run_dir, history.stages) + whole_record(run),
        ),
    ]
    figures += times
    parts = {
        "TITLE": f"{safe(title)} - Restage",
        "PLOTLY": get_plotlyjs(),
        "BODY": "\n".join(body),
        "FIGURES": _script_json(figures),
    }
    # One pass: text that was put in is not searched again.
    page = re.sub(r"@@([A-Z]+)@@", lambda found: parts[found[1]], _TEMPLATE.read_text("utf-8"))
    path = run_dir / REPORT
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def _script_json(figures: list[Figure]) -> str:
    """JSON that is safe inside a script element, whatever the names hold."""
    text = json.dumps(figures, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(title: str, history: History, summaries: list[StageSummary]) -> str:
    account = history.account
    began = min((span.begin for span in account.spans), default=None)
    when = "has not begun"
    if began is not None:
        moment = datetime.datetime.fromtimestamp(began, datetime.UTC)
        when = f"began {moment:%Y-%m-%d %H:%M} UTC"
    num_left = sum(one.is_left and not one.is_finished for one in summaries)
    tiles = {
        "stages finished": f"{sum(one.is_finished for one in summaries)} of {len(summaries)}"
        + (f", {num_left} left" if num_left else ""),
        "samples seen": f"{sum(one.samples for one in summaries):,}",
        "time": duration(account.seconds()),
        "goodput": shown_goodput(account),
        "crashes": str(sum(one.crashes for one in summaries)),
        "resizes": str(sum(one.resizes for one in summaries)),
        "samples lost": f"{sum(one.samples_lost for one in summaries):,}",
    }
    cards = "".join(
        f'<div class="card"><b>{safe(value)}</b><span class="soft">{name}</span></div>'
        for name, value in tiles.items()
    )
    return (
        f'<header><h1>{safe(title)}</h1><p class="soft">{when}</p>'
        f'<div class="tiles">{cards}</div></header>'
    )


def _stage_table(summaries: list[StageSummary]) -> str:
    if not summaries:
        return soft("No stage has begun.")
    return table(TABLE_HEAD, [table_row(one) for one in summaries])


def _losses(history: History) -> tuple[str, list[Figure]]:
    latest = latest_values(history.metrics)
    figures: list[Figure] = []
    cards = []
    for number, stage in enumerate(history.stages):
        held_out = {"subset": "held_out"}
        pairs = (
            ("loss", loss_figure(latest, stage, f"loss-{number}")),
            (
                "loss by noise on held-out clips (t = 1 is noise)",
                level_figure(latest, stage, f"levels-{number}", held_out),
            ),
            ("loss by noise in training", level_figure(latest, stage, f"trained-{number}", {})),
            ("PSNR on held-out clips", psnr_figure(latest, stage, f"psnr-{number}")),
            ("SSIM on held-out clips", ssim_figure(latest, stage, f"ssim-{number}")),
        )
        for what, figure in pairs:
            if figure is None or not figure["data"]:
                continue
            figures.append(figure)
            cards.append(
                f'<div class="card"><h3>{safe(stage)} <span class="soft">{what}</span></h3>'
                f'<div class="plot" id="{figure["id"]}"></div></div>'
            )
    return f'<div class="plots">{"".join(cards)}</div>', figures


def _speed_table(history: History) -> str:
    lines = speed_lines(history)
    if not lines:
        return soft("No stage has been trained.")
    return "".join(f"<p>{safe(line)}</p>" for line in lines)


def _restart_table(history: History) -> str:
    if not history.restarts:
        return soft("No worker group was replaced in the middle of a stage.")
    head = (
        "stage", "cause", "world", "position before", "position after", "samples lost",
        "seconds without a step", "reason",
    )  # fmt: skip
    rows = [
        [
            one.stage,
            one.cause,
            f"{one.world_before} -> {one.world_after}",
            f"{one.position_before:,}",
            f"{one.position_after:,}",
            f"{one.samples_lost:,}",
            f"{one.seconds_without_step:.1f}",
            one.reason,
        ]
        for one in history.restarts
    ]
    return table(head, rows, frozenset({1, 7}))


def _time_table(account: Account, figure: Figure) -> str:
    spent = [name for name in ACTIVITIES if account.seconds(name) > 0]
    rows = [
        [
            stage or "between stages",
            shown_goodput(account, stage) if stage else "-",
            *(f"{account.seconds(name, stage):,.1f}" for name in spent),
        ]
        for stage in account.stages
    ]
    totals = [account.seconds(name) for name in spent]
    rows.append(["all", shown_goodput(account), *(f"{total:,.1f}" for total in totals)])
    whole = sum(totals) or 1.0
    rows.append(["share", "", *(f"{100 * total / whole:.1f} %" for total in totals)])
    bars = _plot(figure, "bars", f"--bars: {60 + 34 * len(account.stages)}px")
    return bars + table(("seconds", "goodput", *spent), rows) + soft(DEFINITION)


def _plot(figure: Figure, kind: str, style: str = "") -> str:
    """A card with the place of a plot, and its key."""
    own = f' style="{style}"' if style else ""
    return (
        f'<div class="card">{key(figure)}<div class="plot {kind}" id="{figure["id"]}"{own}>'
        "</div></div>"
    )


def _cost_table(history: History) -> str:
    spent, one = cost(history), unit(history)
    if not spent:
        return soft("No worker group has held a machine.")
    samples = {summary.stage: summary.samples for summary in summarise_history(history)}
    whole = Cost(sum(c.held for c in spent.values()), sum(c.kept for c in spent.values()))
    rows = [
        [
            stage or "between stages",
            f"{hours.held:,.3f}",
            f"{hours.kept:,.3f}",
            f"{100 * hours.kept / hours.held:.1f} %",
            f"{samples[stage] / hours.held:,.0f}" if stage in samples else "-",
        ]
        for stage, hours in {**spent, "all": whole}.items()
    ]
    head = ("stage", f"{one} hours", "trained and kept", "share", f"samples / {one} hour")
    return table(head, rows) + soft(COUNTED)


def _event_table(events: list[Event]) -> str:
    zero = events[0]["wall"] if events else 0.0
    known = {"wall", "clock", "kind", "stage", "position", "attempt", "world", "reason"}
    rows = []
    for event in events:
        extra = ", ".join(f"{k}={v}" for k, v in event.items() if k not in known)
        position = event["position"]
        rows.append(
            [
                f"{event['wall'] - zero:,.1f} s",
                event["kind"].replace("_", " "),
                event["stage"] or "",
                "" if position is None else f"{position:,}",
                "" if event["world"] is None else str(event["world"]),
                " | ".join(part for part in (event["reason"], extra) if part),
            ]
        )
    head = ("after", "event", "stage", "position", "world", "reason")
    shown = table(head, rows, frozenset({1, 2, 5}))
    return folded(f"All {len(events)} events", shown)
