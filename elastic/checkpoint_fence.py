"""One attempt at a stage publishes: the newest."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elastic.errors import StageBlocked
from elastic.files import write_atomic


class StaleAttempt(StageBlocked):
    """A newer attempt at this stage has begun; this one may publish nothing more."""


@dataclass(frozen=True)
class Fence:
    """The number of this attempt; a newer attempt raises it and so shuts the older one out."""

    path: Path
    attempt: int

    @classmethod
    def take(cls, folder: Path) -> "Fence":
        """Begin a new attempt at the stage that lives in `folder`."""
        path = folder / "attempt.json"
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            last = int(json.loads(path.read_text())["attempt"]) if path.exists() else 0
            write_atomic(path, json.dumps({"attempt": last + 1}).encode())
        return cls(path, last + 1)

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
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the kernel lets go when it dies."""
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
