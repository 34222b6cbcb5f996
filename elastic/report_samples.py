"""The films in the report: how each caption came along, and what the stage shows at its end."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from elastic.figures import safe
from elastic.film import first_frame
from elastic.journal import Event
from elastic.page_parts import soft
from elastic.showing import why_missing
from elastic.summary import History

MOST_POSITIONS = 8  # of one caption; the course of a long stage is shown at some of its points
_MOST_BYTES = 40_000_000  # of samples in one page; browsers stall on more
_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".png": "image/png",
    ".jpg": "image/jpeg",
}


class Film(NamedTuple):
    """One film of a run: what it was made for, where it lies, and at which position."""

    caption: str
    path: str  # below the run folder
    position: int


class _Room:
    """What is still taken into the page."""

    def __init__(self) -> None:
        self._left = _MOST_BYTES

    def takes(self, size: int) -> bool:
        """Whether so many bytes are; they are counted either way."""
        self._left -= size
        return self._left >= 0


def samples(run_dir: Path, history: History, pairs: frozenset[str]) -> str:
    """The films of each stage, those of `pairs` as a clip beside its reconstruction."""
    room = _Room()
    blocks = [_stage(run_dir, history.events, name, name in pairs, room) for name in history.stages]
    return "".join(blocks) or soft("No samples have been made.")


def _stage(run_dir: Path, events: list[Event], stage: str, is_pair: bool, room: _Room) -> str:
    courses, last = courses_of(events, stage), last_films(events, stage)
    rows = [_course(run_dir, films, room) for films in courses.values()]
    rest = [film for film in last if film.caption not in courses]
    figures = [_film(run_dir / film.path, film.caption, room) for film in rest]
    reason = why_missing(events, stage)
    if not rows and not figures and reason is None:
        return ""
    missing = "" if reason is None else f'<p class="bad">no films of its end: {safe(reason)}</p>'
    told = [f"at {film.position:,} samples" for film in last[:1]]
    told += ["first frames by samples seen, and the last film"] if rows else []
    told += ["left the clip, right what the codec gives back of it"] if is_pair else []
    grid = f'<div class="samples{" pairs" if is_pair else ""}">{"".join(figures)}</div>'
    return (
        f'<div class="card stage-samples"><h3>{safe(stage)} <span class="soft">'
        f"{'; '.join(told)}</span></h3>{missing}{''.join(rows)}{grid if figures else ''}</div>"
    )


def courses_of(events: Sequence[Event], stage: str) -> dict[str, list[Film]]:
    """The films of each caption that was sampled while the stage trained, by position.

    The first, the last and what lies evenly between; that of the stage's end is the last of them.
    """
    found: dict[str, dict[int, Film]] = {}
    for film in _films(events, stage, "preview"):
        found.setdefault(film.caption, {})[film.position] = film
    for film in last_films(events, stage):
        if film.caption in found:
            found[film.caption][film.position] = film
    return {
        caption: spread([by_position[at] for at in sorted(by_position)])
        for caption, by_position in found.items()
    }


def spread(films: list[Film]) -> list[Film]:
    """At most MOST_POSITIONS of them, the first and the last included."""
    steps = MOST_POSITIONS - 1
    if len(films) <= MOST_POSITIONS:
        return films
    return [films[round(number * (len(films) - 1) / steps)] for number in range(MOST_POSITIONS)]


def last_films(events: Sequence[Event], stage: str) -> list[Film]:
    """What the stage showed when it was sampled last after its end, each path once."""
    films = _films(events, stage, "sample")
    return list({f.path: f for f in films if f.position == films[-1].position}.values())


def _films(events: Sequence[Event], stage: str, kind: str) -> list[Film]:
    return [
        Film(caption, path, event["position"] or 0)
        for event in events
        if event["kind"] == kind and event["stage"] == stage
        for path, caption in zip(event.get("paths", []), event.get("captions", []), strict=False)
    ]


def _course(run_dir: Path, films: list[Film], room: _Room) -> str:
    """One caption: first frames in a row, and the last film playing."""
    shown = [_frame(run_dir / film.path, f"{film.position:,}", room) for film in films[:-1]]
    shown.append(_film(run_dir / films[-1].path, f"{films[-1].position:,}", room))
    return f'<p>{safe(films[0].caption)}</p><div class="course">{"".join(shown)}</div>'


def _frame(file: Path, words: str, room: _Room) -> str:
    try:
        data = first_frame(file)
    except (OSError, ValueError):
        return _figure(f'<p class="bad">{safe(file.name)} is missing</p>', words)
    if not room.takes(len(data)):
        return _figure(f'<p class="soft">{safe(file.name)}: not put into this page</p>', words)
    return _figure(f'<img src="{_url("image/webp", data)}" alt="{safe(words)}">', words)


def _film(file: Path, words: str, room: _Room) -> str:
    size = file.stat().st_size if file.is_file() else 0
    kind = _TYPES.get(file.suffix.lower())
    takes = room.takes(size)
    if not size:
        shown = f'<p class="bad">{safe(file.name)} is missing</p>'
    elif kind is None or not takes:
        shown = f'<p class="soft">{safe(file.name)}: {size:,} bytes, not put into this page</p>'
    elif kind.startswith("video"):
        source = _url(kind, file.read_bytes())
        shown = f'<video src="{source}" autoplay loop muted playsinline></video>'
    else:
        shown = f'<img src="{_url(kind, file.read_bytes())}" alt="{safe(words)}">'
    return _figure(shown, words)


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _figure(shown: str, words: str) -> str:
    return f"<figure>{shown}<figcaption>{safe(words)}</figcaption></figure>"
