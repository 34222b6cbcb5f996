"""How often something was begun and not brought to its end: on disk, as whoever tries may die."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tries:
    """The tries of one thing, in a file that is not there when there are none."""

    path: Path

    def count(self) -> int:
        """How many there were; 0 if nothing that can be read was noted."""
        try:
            return int(self.path.read_text() or 0)
        except (OSError, ValueError):
            return 0

    def note(self, count: int) -> None:
        """Note so many."""
        if not count:
            self.path.unlink(missing_ok=True)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(str(count))
