"""Where the checkpoints of a stage lie: the same few operations on a local path and on a URL.

A checkpoint is a folder named by its position, with files and one manifest. Until its manifest is
published it is a draft, which nothing but its own attempt looks at.
"""

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from elastic.direct_file import DirectFile
from elastic.files import exchange, fsync_dir, read_into, write_atomic

MANIFEST = "manifest.json"
DAMAGED = "damaged.txt"  # left in a checkpoint that was skipped, so that nothing deletes it
KEEP_LAST = 2
_A_TIME = 10**12  # nanoseconds since 1970 are more, numbers of attempts are less
OWNER = "owner.json"  # in a place outside of run folders: whose it is


@dataclass(frozen=True)
class Keep:
    """Which whole checkpoints are not deleted: the `last` so many, and one in `every` samples."""

    last: int = KEEP_LAST
    every: int | None = None

    def chosen(self, positions: list[int]) -> set[int]:
        """Of whole checkpoints. For `every`, the first at or after each multiple of it."""
        kept = set(sorted(positions)[-self.last :])
        if self.every is not None:
            first_of: dict[int, int] = {}
            for position in sorted(positions):
                first_of.setdefault(position // self.every, position)
            kept |= {position for window, position in first_of.items() if window}
        return kept

    def most(self, budget: int) -> int:
        """How many a stage of so many samples may hold at once."""
        return self.last + (budget // self.every if self.every else 0)

    def __str__(self) -> str:
        for_good = f" and one in {self.every:,} samples for good" if self.every else ""
        return f"the last {self.last} of a stage{for_good}"


DEFAULT_KEEP = Keep()


class Draft(NamedTuple):
    """A checkpoint that is being written."""

    position: int
    attempt: int


class Sink(Protocol):
    """What a file is written to."""

    def write(self, data: memoryview, /) -> int | None:
        """Append the bytes."""


class Storage(Protocol):
    """Checkpoints of one stage. Every method raises OSError where the storage refuses."""

    @property
    def where(self) -> str:
        """The place in words, for messages."""

    @property
    def largest_file(self) -> int | None:
        """Bytes of the largest file that it takes; None if there is no limit to be known."""

    def owner(self) -> bytes:
        """The mark that says whose the place is; empty if there is none."""

    def claim(self, mark: bytes) -> None:
        """Leave that mark where there is none; of two at once, one is kept."""

    def positions(self) -> list[int]:
        """Positions of what was published, whole or damaged, newest first."""

    def sizes(self, position: int) -> dict[str, int]:
        """Bytes of each file that lies in a checkpoint's folder."""

    def read(self, position: int, name: str) -> bytes:
        """A small file in full."""

    def read_into(self, position: int, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on."""

    def free_bytes(self) -> int | None:
        """What can still be written; None if there is no limit to be known."""

    def file_name(self, draft: Draft, number: int) -> str:
        """Of a file of the draft, such that no other attempt writes over it."""

    def prepare(self, draft: Draft) -> None:
        """Make room for a draft; what an earlier try of the same draft left is removed."""

    def create(self, draft: Draft, name: str) -> AbstractContextManager[Sink]:
        """A file of the draft; it survives a loss of power once the block has ended."""

    def publish(self, draft: Draft, manifest: bytes) -> None:
        """Make the draft visible at its position, in one step; what was there is set aside."""

    def discard(self, draft: Draft) -> None:
        """Remove a draft that will not be published."""

    def note(self, position: int, name: str, text: str) -> None:
        """Leave a word in a checkpoint's folder."""

    def delete(self, position: int) -> None:
        """Take back a published checkpoint; a kill in the middle leaves no damaged one."""

    def sweep(self, attempt: int, listed: Collection[int]) -> None:
        """Remove the drafts of attempts up to this one, which has none in flight.

        Nothing is a draft that lies at one of the `listed` positions.
        """


class LocalStorage:
    """A folder on a local or mounted file system; publication is one rename of the draft."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def where(self) -> str:
        """The folder."""
        return str(self._folder)

    @property
    def largest_file(self) -> None:
        """As large as there is room for."""

    def owner(self) -> bytes:
        """A file beside the checkpoints."""
        with suppress(FileNotFoundError):
            return (self._folder / OWNER).read_bytes()
        return b""

    def claim(self, mark: bytes) -> None:
        """In a new file: the kernel lets only one make it."""
        self._make_folder()
        with suppress(FileExistsError), (self._folder / OWNER).open("xb") as file:
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        fsync_dir(self._folder)

    def positions(self) -> list[int]:
        """Every folder with a number for a name."""
        names = [entry.name for entry in _entries(self._folder) if entry.is_dir()]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def sizes(self, position: int) -> dict[str, int]:
        """Empty where the folder is missing."""
        entries = _entries(self._folder / str(position))
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read(self, position: int, name: str) -> bytes:
        """A small file in full."""
        return (self._folder / str(position) / name).read_bytes()

    def read_into(self, position: int, name: str, start: int, into: memoryview) -> None:
        """Fill `into`; OSError where the file ends before."""
        read_into(self._folder / str(position) / name, start, into)

    def free_bytes(self) -> int:
        """What the file system has left for this user."""
        there = next(p for p in (self._folder, *self._folder.absolute().parents) if p.is_dir())
        return shutil.disk_usage(there).free

    def file_name(self, draft: Draft, number: int) -> str:
        """The folder aside is this attempt's own."""
        return f"{number:05d}.safetensors"

    def prepare(self, draft: Draft) -> None:
        """Make the folder aside, empty."""
        self.discard(draft)
        self._make_folder()
        self._aside(draft).mkdir()

    @contextmanager
    def create(self, draft: Draft, name: str) -> Iterator[Sink]:
        """A file aside, flushed to the disk at the end of the block."""
        with DirectFile(self._aside(draft) / name) as file:
            yield file

    def publish(self, draft: Draft, manifest: bytes) -> None:
        """Publish last: a reader that sees the folder must see every file in it."""
        aside, final = self._aside(draft), self._folder / str(draft.position)
        write_atomic(aside / MANIFEST, manifest)
        if final.exists():  # damaged, or left by an attempt that could not restore it: keep it
            kept = final.with_name(f"{final.name}.{time.time_ns()}.replaced")
            os.rename(aside, kept)
            exchange(kept, final)
        else:
            os.rename(aside, final)
        fsync_dir(self._folder)

    def discard(self, draft: Draft) -> None:
        """Remove the folder aside."""
        shutil.rmtree(self._aside(draft), ignore_errors=True)

    def note(self, position: int, name: str, text: str) -> None:
        """Leave a word in a checkpoint's folder."""
        write_atomic(self._folder / str(position) / name, text.encode())

    def delete(self, position: int) -> None:
        """By a rename first: a kill in the middle must not leave a damaged checkpoint."""
        folder = self._folder / str(position)
        aside = folder.with_name(f"{position}.{time.time_ns()}.partial")
        folder.rename(aside)
        shutil.rmtree(aside)

    def sweep(self, attempt: int, listed: Collection[int]) -> None:
        """Remove folders aside; where a deletion was killed, a time stands for the attempt."""
        for entry in _entries(self._folder):
            _, number, kind = (*entry.name.split("."), "", "")[:3]
            if kind == "partial" and not attempt < int(number) < _A_TIME:
                shutil.rmtree(entry.path)

    def _make_folder(self) -> None:
        """The folder and those above it; each entry survives a loss of power."""
        missing = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        for folder in reversed(missing):
            fsync_dir(folder.parent)

    def _aside(self, draft: Draft) -> Path:
        return self._folder / f"{draft.position}.{draft.attempt}.partial"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing if it is missing, OSError where it cannot be read.

    Path.glob says "nothing" in both cases.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
