"""The report's plots as Plotly figures in plain dictionaries; every name is HTML-escaped."""

import html
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar

from elastic.goodput import Account
from elastic.journal import Event, Metric
from elastic.level_names import NUM_LEVELS, name_of, text_of
from elastic.summary import History, contexts_of, values_of
from elastic.timeline import (
    ACTIVITIES,
    CAPACITY,
    DATA,
    DOWN,
    ENCODING,
    EVALUATING,
    LOST,
    OTHER,
    RESTORING,
    SAMPLING,
    SAVING,
    STARTING,
    TRAINING,
    merged,
    thinned,
)

COLOURS = ("#4c8dd6", "#e07b39", "#3fa66b", "#b565c4", "#c9a227", "#d1495b", "#4fb3bf", "#8a8f98")
# From little noise to much.
_LEVEL_COLOURS = (
    *("#4c6fd6", "#4c9bd6", "#3fb3a6", "#5fb35f"),
    *("#b5b53a", "#e0a139", "#e07b39", "#d1495b"),
)
_ACTIVITY_COLOURS = {
    TRAINING: "#3fa66b",
    LOST: "#d1495b",
    SAVING: "#b565c4",
    EVALUATING: "#4fb3bf",
    DATA: "#c9a227",
    RESTORING: "#f2b69b",
    STARTING: "#e07b39",
    CAPACITY: "#7a5c99",
    ENCODING: "#4c8dd6",
    SAMPLING: "#9cc3ec",
    OTHER: "#8a8f98",
    DOWN: "#3b4048",
}
STRIP_AXIS = "y3"  # of what went on, in the timeline
_MOST_POINTS = 2000  # of one line; a phone draws no more in good time

# Kind of event: symbol, colour, label.
_MARKS = {
    "crash": ("x", "#d1495b", "crash"),
    "fault_injected": ("triangle-down", "#e07b39", "fault injected"),
    "resize_requested": ("diamond", "#3fa66b", "resize"),
    "capacity": ("circle", "#4fb3bf", "capacity"),
    "run_start": ("star", "#8a8f98", "run started"),
}

Point = TypeVar("Point")
Trace = dict[str, Any]  # Any: Plotly's own schema


class Figure(TypedDict):
    """One plot: the id of its element on the page, and what Plotly draws there."""

    id: str
    data: list[Trace]
    layout: dict[str, Any]


def safe(value: object) -> str:
    """The value as text for HTML, and for Plotly, which reads names as HTML too."""
    return html.escape(str(value))


def loss_figure(latest: Sequence[Metric], stage: str, identifier: str) -> Figure:
    """Loss over samples of one stage: by bucket and on the held-out clips."""
    data: list[Trace] = []
    buckets = contexts_of(latest, stage, "bucket")
    for number, bucket in enumerate(buckets):
        points = values_of(latest, stage, "loss", {"bucket": bucket})
        data.append(_line(points, f"train {bucket}", number, width=1.5))
    if not buckets:
        data.append(_line(values_of(latest, stage, "loss", {}), "train", 0, width=1.5))
    for subset in contexts_of(latest, stage, "subset"):
        points = values_of(latest, stage, "loss", {"subset": subset})
        held_out = _line(points, subset.replace("_", "-"), len(data), width=2.5)
        data.append({**held_out, "mode": "lines+markers", "line": {"width": 2.5, "dash": "dot"}})
        data[-1]["line"]["color"] = data[-1]["marker"]["color"] = COLOURS[5]
    return _loss_axis(identifier, [trace for trace in data if trace["x"]])


def psnr_figure(latest: Sequence[Metric], stage: str, identifier: str) -> Figure | None:
    """PSNR over samples on the held-out clips; None for a stage that does not measure it."""
    return _held_out_figure(latest, stage, identifier, "psnr", "PSNR, dB")


def ssim_figure(latest: Sequence[Metric], stage: str, identifier: str) -> Figure | None:
    """SSIM over samples on the held-out clips; None for a stage that does not measure it."""
    return _held_out_figure(latest, stage, identifier, "ssim", "SSIM")


def level_figure(
    latest: Sequence[Metric], stage: str, identifier: str, context: dict[str, str]
) -> Figure | None:
    """Loss over samples by level of noise; None where it is not known by level."""
    data: list[Trace] = []
    for level, colour in zip(range(NUM_LEVELS), _LEVEL_COLOURS, strict=True):
        points = values_of(latest, stage, name_of("loss", level), context)
        if points:
            line = _line(points, f"t {text_of(level)}", level, width=1.5)
            line["line"]["color"] = line["marker"]["color"] = colour
            data.append(line)
    return _loss_axis(identifier, data) if data else None


def _loss_axis(identifier: str, data: list[Trace]) -> Figure:
    """A logarithmic one where the losses lie far from one another."""
    values = [value for trace in data for value in trace["y"]]
    is_wide = bool(values) and min(values) > 0 and max(values) > 8 * min(values)
    return _figure(identifier, data, "loss", "log" if is_wide else "linear")


def _held_out_figure(
    latest: Sequence[Metric], stage: str, identifier: str, name: str, title: str
) -> Figure | None:
    points = values_of(latest, stage, name, {"subset": "held_out"})
    if not points:
        return None
    line = {**_line(points, f"{name.upper()} held-out", 2, width=2.5), "mode": "lines+markers"}
    return _figure(identifier, [line], title, "linear")


def timeline_figure(history: History, identifier: str) -> Figure:
    """World size, what went on, and throughput on one time axis, with the machines' events."""
    zero = _zero(history)
    data = [
        trace
        for number, stage in enumerate(history.stages)
        for trace in _stage_traces(history, stage, number, zero)
    ]
    marks = _marks(history, zero)
    lines = [_vertical(x, trace["marker"]["color"]) for trace in marks for x in trace["x"]]
    minutes = {"title": {"text": "minutes since the start"}, "rangemode": "tozero"}
    world = {"title": {"text": "world size"}, "domain": [0.6, 1], "rangemode": "tozero"}
    layout = {
        "barmode": "overlay",
        "xaxis": {**minutes, "anchor": "y2"},
        "yaxis": {**world, "dtick": max(1, _most_workers(history.events) // 5)},
        "yaxis2": {"title": {"text": "samples / s"}, "domain": [0, 0.42], "rangemode": "tozero"},
        "yaxis3": {"domain": [0.48, 0.55], "visible": False, "fixedrange": True},
        "showlegend": False,  # the page has a key
        "margin": {"t": 10, "r": 10, "b": 45, "l": 55},
        "shapes": lines,
    }
    strip = _strip(history.account, zero)
    return {"id": identifier, "data": data + strip + marks, "layout": layout}


def _strip(account: Account, zero: float) -> list[Trace]:
    """What went on as one bar over time."""
    together = {DATA: TRAINING}  # steps wait in between: a strip of them would be grey
    spans = thinned(
        [
            span._replace(activity=together.get(span.activity, span.activity))
            for span in account.spans
        ],
        _MOST_POINTS,
    )
    traces: list[Trace] = []
    for activity in ACTIVITIES:
        mine = [span for span in spans if span.activity == activity]
        if not mine:
            continue
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": activity,
                "yaxis": STRIP_AXIS,
                "y": [0] * len(mine),
                "base": [_minutes(span.begin, zero) for span in mine],
                "x": [round(span.seconds / 60, 4) for span in mine],
                "width": 1,
                "marker": {"color": _ACTIVITY_COLOURS[activity], "line": {"width": 0}},
                "hovertemplate": f"{activity}, from minute %{{base:.1f}}<extra></extra>",
            }
        )
    return traces


def _stage_traces(history: History, stage: str, number: int, zero: float) -> list[Trace]:
    """World size and throughput of one stage, in one colour."""
    colour = COLOURS[number % len(COLOURS)]
    worlds, rates = _world_steps(history, stage), _rates(history.metrics, stage)
    common = {"name": safe(stage), "legendgroup": str(number), "mode": "lines"}
    world = {
        "x": [_minutes(wall, zero) for wall, _ in worlds],
        "y": [workers for _, workers in worlds],
        "line": {"shape": "hv", "width": 2, "color": colour},
        "fill": "tozeroy",
        "fillcolor": colour + "38",
        "hovertemplate": "world %{y}, minute %{x:.1f}",
    }
    rate = {
        "x": [_minutes(wall, zero) for wall, _ in rates],
        "y": [samples_per_s for _, samples_per_s in rates],
        "yaxis": "y2",
        "showlegend": False,
        "line": {"width": 1.5, "color": colour},
        "hovertemplate": "%{y:.3s} samples/s, minute %{x:.1f}",
    }
    return [{**common, **world}, {**common, **rate}]


def time_figure(account: Account, identifier: str) -> Figure:
    """Seconds by stage and activity as stacked bars."""
    stages = [stage for stage in account.stages if account.seconds(stage=stage) >= 0.5]
    data: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": activity,
            "x": [round(account.seconds(activity, stage), 3) for stage in stages],
            "y": [safe(stage or "between stages") for stage in stages],
            "marker": {"color": _ACTIVITY_COLOURS[activity]},
            "hovertemplate": f"{activity} %{{x:.1f}} s",
        }
        for activity in ACTIVITIES
        if any(account.seconds(activity, stage) >= 0.05 for stage in stages)
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "seconds"}},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "showlegend": False,
        "margin": {"t": 10, "r": 10, "b": 45, "l": 10},
    }
    return {"id": identifier, "data": data, "layout": layout}


def _figure(identifier: str, data: list[Trace], title: str, scale: str) -> Figure:
    ticks = {"tickvals": _log_ticks()} if scale == "log" else {}
    layout = {
        "xaxis": {"title": {"text": "samples seen"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": title}, "type": scale, **ticks},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "showlegend": True,
        "margin": {"t": 10, "r": 10, "b": 45, "l": 55},
    }
    return {"id": identifier, "data": data, "layout": layout}


def _log_ticks() -> list[float]:
    """1, 2 and 5 of every decade: Plotly itself writes bare digits between the decades."""
    return [float(f"{digit}e{decade}") for decade in range(-9, 10) for digit in (1, 2, 5)]


def _line(points: list[tuple[int, float]], name: str, number: int, width: float) -> Trace:
    points = _thin(points)
    colour = COLOURS[number % len(COLOURS)]
    return {
        "x": [position for position, _ in points],
        "y": [value for _, value in points],
        "name": safe(name),
        "mode": "lines" if len(points) > 1 else "markers",
        "line": {"width": width, "color": colour},
        "marker": {"color": colour, "size": 6},
        "hovertemplate": "%{y:.4g} at %{x:,} samples",
    }


def _thin(points: list[Point]) -> list[Point]:
    stride = max(1, -(-len(points) // _MOST_POINTS))
    return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])


def _world_steps(history: History, stage: str) -> list[tuple[float, int]]:
    """(wall, workers) at every change; 0 while there is no group of this stage."""
    mine = [span for span in history.account.spans if span.stage == stage and span.world]
    steps: list[tuple[float, int]] = []
    for span in merged(mine, lambda a, b: a.world == b.world):
        steps += [(span.begin, 0), (span.begin, span.world or 0), (span.end, 0)]
    return steps


def _rates(metrics: Sequence[Metric], stage: str) -> list[tuple[float, float | None]]:
    """(wall, samples/s); a None between attempts breaks the line."""
    points: list[tuple[float, float | None]] = []
    attempt = None
    for metric in metrics:
        rate = metric["values"].get("samples_per_s")
        if metric["stage"] != stage or rate is None:
            continue
        if points and metric["attempt"] != attempt:
            points.append((metric["wall"], None))
        attempt = metric["attempt"]
        points.append((metric["wall"], rate))
    return _thin(points)


def _marks(history: History, zero: float) -> list[Trace]:
    marks: list[Trace] = []
    most = _most_workers(history.events)
    for kind, (symbol, colour, label) in _MARKS.items():
        events = [event for event in history.events if event["kind"] == kind]
        if kind == "run_start":
            events = events[1:]  # the first one is the start of the axis
        if not events:
            continue
        marks.append(
            {
                "x": [_minutes(event["wall"], zero) for event in events],
                "y": [most * (1.08 + 0.09 * len(marks))] * len(events),
                "text": [safe(event["reason"] or label) for event in events],
                "mode": "markers",
                "name": label,
                "marker": {"symbol": symbol, "size": 11, "color": colour},
                "hovertemplate": f"{label}, minute %{{x:.1f}}<br>%{{text}}<extra></extra>",
            }
        )
    return marks


def _vertical(x: float, colour: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1, "dash": "dot"}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _most_workers(events: Sequence[Event]) -> int:
    return max([event["world"] or 0 for event in events], default=0) or 1


def _zero(history: History) -> float:
    walls = [event["wall"] for event in history.events] + [m["wall"] for m in history.metrics]
    return min(walls, default=0.0)


def _minutes(wall: float, zero: float) -> float:
    return round((wall - zero) / 60, 4)
