"""One self-contained HTML page about a run; it opens without a network and without a server."""

import base64
import datetime
import json
import re
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from elastic.figures import (
    Figure,
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
_MOST_BYTES = 40_000_000  # of samples in one page; browsers stall on more
_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".png": "image/png",
    ".jpg": "image/jpeg",
}


def write_report(run_dir: str | Path) -> Path:
    """Write report.html from the journals and samples of a run folder, and return its path."""
    run_dir = Path(run_dir)
    history = read_history(run_dir)
    summaries = summarise_history(history)
    versions = _read_run(run_dir)
    title = str(versions.get("plan") or run_dir.resolve().name)
    losses, figures = _losses(history)
    figures += [timeline_figure(history, "timeline"), time_figure(history.account, "time")]
    body = [
        _header(title, history, summaries),
        _section("The stages", _stage_table(summaries)),
        _section("Samples", _samples(run_dir, history)),
        _section("Loss over samples", losses),
        _section(
            "World size and throughput",
            '<div class="card"><div class="plot tall" id="timeline"></div></div>',
        ),
        _section("Speed", _speed_table(history)),
        _section("Restarts", _restart_table(history)),
        _section("Where the time went", _time_table(history.account)),
        _section("Events", _event_table(history.events)),
        _section("Versions", _version_table(versions)),
    ]
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


def _read_run(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        return {"run.json": f"cannot be read: {error}"}
    return found if isinstance(found, dict) else {"run.json": found}


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>"


def _header(title: str, history: History, summaries: list[StageSummary]) -> str:
    account = history.account
    began = min((span.begin for span in account.spans), default=None)
    when = "has not begun"
    if began is not None:
        moment = datetime.datetime.fromtimestamp(began, datetime.UTC)
        when = f"began {moment:%Y-%m-%d %H:%M} UTC"
    tiles = {
        "stages finished": f"{sum(one.is_finished for one in summaries)} of {len(summaries)}",
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
        return '<p class="soft">No stage has begun.</p>'
    return _table(TABLE_HEAD, [table_row(one) for one in summaries])


def _losses(history: History) -> tuple[str, list[Figure]]:
    latest = latest_values(history.metrics)
    figures: list[Figure] = []
    cards = []
    for number, stage in enumerate(history.stages):
        pairs = (
            ("loss", loss_figure(latest, stage, f"loss-{number}")),
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
        return '<p class="soft">No stage has been trained.</p>'
    return "".join(f"<p>{safe(line)}</p>" for line in lines)


def _restart_table(history: History) -> str:
    if not history.restarts:
        return '<p class="soft">No worker group was replaced in the middle of a stage.</p>'
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
    return _table(head, rows, text_columns={1, 7})


def _time_table(account: Account) -> str:
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
    height = 130 + 34 * len(account.stages)
    return (
        '<div class="card"><div class="plot bars" id="time" '
        f'style="--bars: {height}px"></div></div>'
        + _table(("seconds", "goodput", *spent), rows)
        + f'<p class="soft">{safe(DEFINITION)}</p>'
    )


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
    table = _table(head, rows, text_columns={1, 2, 5})
    return f"<details><summary>All {len(events)} events</summary>{table}</details>"


def _version_table(run: dict[str, Any]) -> str:
    rows = [[name, str(value)] for name, value in _flatten("", run)]
    if not rows:
        return '<p class="soft">run.json has not been written.</p>'
    table = _table(("what", "value"), rows, text_columns={1})
    return f"<details><summary>run.json</summary>{table}</details>"


def _flatten(prefix: str, value: object) -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    pairs = []
    for key, item in value.items():
        pairs += _flatten(f"{prefix}.{key}" if prefix else str(key), item)
    return pairs


def _table(
    head: tuple[str, ...], rows: list[list[str]], text_columns: set[int] | None = None
) -> str:
    texts = text_columns or set()

    def line(cells: list[str] | tuple[str, ...], tag: str) -> str:
        marks = [' class="text"' if number in texts else "" for number in range(len(cells))]
        pairs = zip(marks, cells, strict=True)
        return f"<tr>{''.join(f'<{tag}{mark}>{safe(cell)}</{tag}>' for mark, cell in pairs)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return (
        f'<div class="card scroll"><table><thead>{line(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _samples(run_dir: Path, history: History) -> str:
    left = _MOST_BYTES
    blocks = []
    for stage in history.stages:
        position, samples = _last_samples(history.events, stage)
        figures = []
        for path, caption in samples.items():
            file = run_dir / path
            size = file.stat().st_size if file.is_file() else 0
            left -= size
            figures.append(_sample(file, caption, size, is_embedded=left >= 0))
        if figures:
            blocks.append(
                f'<div class="card stage-samples"><h3>{safe(stage)} <span class="soft">at '
                f'{position:,} samples</span></h3><div class="samples">{"".join(figures)}</div>'
                "</div>"
            )
    return "".join(blocks) or '<p class="soft">No samples have been made.</p>'


def _last_samples(events: list[Event], stage: str) -> tuple[int, dict[str, str]]:
    """The position at which a stage was sampled last, and path to caption there."""
    mine = [event for event in events if event["kind"] == "sample" and event["stage"] == stage]
    if not mine:
        return 0, {}
    position = mine[-1]["position"]
    samples: dict[str, str] = {}
    for event in mine:
        if event["position"] == position:
            samples |= zip(event.get("paths", []), event.get("captions", []), strict=False)
    return position or 0, samples


def _sample(file: Path, caption: str, size: int, is_embedded: bool) -> str:
    kind = _TYPES.get(file.suffix.lower())
    if not size:
        shown = f'<p class="bad">{safe(file.name)} is missing</p>'
    elif kind is None or not is_embedded:
        shown = f'<p class="soft">{safe(file.name)}: {size:,} bytes, not put into this page</p>'
    else:
        data = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        shown = (
            f'<video src="{data}" autoplay loop muted playsinline></video>'
            if kind.startswith("video")
            else f'<img src="{data}" alt="{safe(caption)}">'
        )
    return f"<figure>{shown}<figcaption>{safe(caption)}</figcaption></figure>"
