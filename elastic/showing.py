"""Films of what a finished stage can do. What goes wrong there costs the films, not the course."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from elastic.errors import InputError, StageBlocked, last_line
from elastic.folders import RunFolder
from elastic.journal import Event
from elastic.tries import Tries

log = logging.getLogger(__name__)

MOST_TRIES = 2  # of a stage, one a start: a try may have ended for another reason


class Made(NamedTuple):
    """Films, and the caption of each."""

    paths: list[Path]
    captions: list[str]


class Showing:
    """Makes the films of one stage after the other, in the thread of the course.

    A try counts from its beginning, since it may take the driver with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: tuple[Tries, int] | None = None  # with how many there were before it
        self._has_left = False

    def make(self, tries: Tries, films: Callable[[], Made]) -> Made | str:
        """What `films` made, or why it made nothing."""
        try:
            self._begin(tries)
            made = films()
        except Exception as error:  # whatever it is, the next stage does not need these films
            with self._lock:
                if self._has_left:
                    raise
                self._under_way = None
            log.debug("no films", exc_info=True)
            is_said = isinstance(error, InputError | StageBlocked)
            return str(error) if is_said else f"{type(error).__name__}: {last_line(error)}"
        with self._lock, suppress(OSError):
            self._under_way = None
            tries.note(0)
        return made

    def leave(self) -> None:
        """The driver ends as it was asked to: what it is making has not failed."""
        with self._lock, suppress(OSError):
            self._has_left = True
            if self._under_way is not None:
                tries, before = self._under_way
                tries.note(before)

    def _begin(self, tries: Tries) -> None:
        with self._lock:
            before = tries.count()
            self._under_way = tries, before
            tries.note(before + 1)


def tries_of(folder: RunFolder, stage: str) -> Tries:
    """Those of the films of a stage's end."""
    return Tries(folder.samples(stage) / ".tries")


def missing_line(folder: RunFolder, stage: str, reason: str) -> str:
    """What to say of films of a stage's end that could not be made."""
    tries = tries_of(folder, stage)
    advice = "the next start tries once more"
    if tries.count() >= MOST_TRIES:
        advice = f"they are not tried again, unless {tries.path} is deleted"
    return f"no films of {stage}: {reason}; {advice}"


def why_missing(events: Sequence[Event], stage: str) -> str | None:
    """Why the films of a stage's end are not there; None if they are, or are still to be made."""
    told = [
        event
        for event in events
        if event["stage"] == stage and event["kind"] in ("sample", "sample_failed")
    ]
    return told[-1]["reason"] if told and told[-1]["kind"] == "sample_failed" else None
