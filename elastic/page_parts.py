"""Pieces of the report's page: sections, tables, and the key below a plot; all text is escaped."""

from collections.abc import Sequence

from elastic.figures import STRIP_AXIS, Figure, safe

_SIGNS = {  # of Plotly's markers, for the key
    "x": "&#10005;",
    "triangle-down": "&#9660;",
    "diamond": "&#9670;",
    "circle": "&#9679;",
    "star": "&#9733;",
}


def section(title: str, content: str) -> str:
    """A part of the page under a heading; both are HTML already."""
    return f"<section><h2>{title}</h2>\n{content}</section>"


def soft(text: object) -> str:
    """A paragraph in the background."""
    return f'<p class="soft">{safe(text)}</p>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: frozenset[int] = frozenset()
) -> str:
    """A table that is scrolled alone where it is too wide; columns of long text may wrap."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="text"' if number in text_columns else "" for number in range(len(cells))]
        pairs = zip(marks, cells, strict=True)
        return f"<tr>{''.join(f'<{tag}{mark}>{safe(cell)}</{tag}>' for mark, cell in pairs)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return (
        f'<div class="card scroll"><table><thead>{line(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    """HTML that is there when it is asked for."""
    return f"<details><summary>{safe(title)}</summary>{content}</details>"


def key(figure: Figure) -> str:
    """What the colours of a plot stand for, in words that wrap on a phone as Plotly's would not.

    The strip of a plot, on an axis of its own, has colours of its own too.
    """
    told: dict[str, dict[str, str]] = {}  # by axis, the entry of each name
    for trace in figure["data"]:
        if trace.get("showlegend", True):
            marker = trace.get("marker", {})
            sign = _SIGNS.get(marker.get("symbol", ""), "&#9632;")
            colour = marker.get("color") or trace["line"]["color"]
            entry = f'<span><i style="color: {colour}">{sign}</i> {trace["name"]}</span>'
            axis = "the strip:" if trace.get("yaxis") == STRIP_AXIS else ""
            told.setdefault(axis, {}).setdefault(trace["name"], entry)
    return "".join(
        f'<p class="key">{axis and f"<span>{axis}</span>"}{"".join(entries.values())}</p>'
        for axis, entries in told.items()
    )
