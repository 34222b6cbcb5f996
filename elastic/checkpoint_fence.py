"""One attempt at a stage publishes: the newest."""

import fcntl
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # JSON

from elastic.errors import StageBlocked
from elastic.files import write_atomic


class StaleAttempt(StageBlocked):
    """A newer attempt at this stage has begun; this one may publish nothing more."""


@dataclass(frozen=True)
class Fence:
    """The number of this attempt; a newer attempt raises it and so shuts the older one out."""

    path: Path
    attempt: int
    run: str  # of the stage's folder, the same for all of its attempts and for no other run's

    @classmethod
    def take(cls, folder: Path) -> "Fence":
        """Begin a new attempt at the stage that lives in `folder`."""
        path = folder / "attempt.json"
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            last: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            attempt, run = int(last.get("attempt", 0)) + 1, str(last.get("run", uuid.uuid4().hex))
            write_atomic(path, json.dumps({"attempt": attempt, "run": run}).encode())
        return cls(path, attempt, run)

    def check(self) -> None:
        """Raise StaleAttempt if a newer attempt has begun."""
        newest = int(json.loads(self.path.read_text())["attempt"])
        if newest != self.attempt:
            raise StaleAttempt(
                f"attempt {self.attempt} at {self.path.parent.name} may not publish: "
                f"attempt {newest} has begun; leave the stage to that one"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Publish inside this block: it is entered by the newest attempt alone, and none begins."""
        with _alone(self.path):
            self.check()
            yield


@contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Inside this block no attempt at the stage publishes or gives up a checkpoint, none begins."""
    with _alone(folder / "attempt.json"):
        yield


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the kernel lets go when it dies."""
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
