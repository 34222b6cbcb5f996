"""Where the checkpoints of a stage lie: the same few operations on a local path and on a URL.

A checkpoint is a folder named by its position, with files and one manifest. Until its manifest is
published it is a draft, which nothing but its own attempt looks at.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from elastic.direct_file import DirectFile
from elastic.errors import InputError, StageBlocked
from elastic.files import fsync_dir, write_atomic

MANIFEST = "manifest.json"
DAMAGED = "damaged.txt"  # left in a checkpoint that was skipped, so that nothing deletes it
KEEP_LAST = 2
HOME = "checkpoints.url"  # in a stage's folder, if its checkpoints lie elsewhere: where


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

    def sweep(self, attempt: int) -> None:
        """Remove the drafts of ended attempts; `attempt` is the newest, with none in flight."""


class LocalStorage:
    """A folder on a local or mounted file system; publication is one rename of the draft."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def where(self) -> str:
        """The folder."""
        return str(self._folder)

    def positions(self) -> list[int]:
        """Every folder with a number for a name."""
        names = [path.name for path in self._folder.glob("*/")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def sizes(self, position: int) -> dict[str, int]:
        """Empty where the folder is missing."""
        files = [path for path in (self._folder / str(position)).glob("*") if path.is_file()]
        return {path.name: path.stat().st_size for path in files}

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
        self._aside(draft).mkdir(parents=True)

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
            final.rename(final.with_name(f"{final.name}.{time.time_ns()}.replaced"))
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

    def sweep(self, attempt: int) -> None:
        """Remove every folder aside, whoever's it was."""
        for leftover in self._folder.glob("*.partial"):
            shutil.rmtree(leftover)

    def _aside(self, draft: Draft) -> Path:
        return self._folder / f"{draft.position}.{draft.attempt}.partial"


def read_into(path: Path, start: int, into: memoryview) -> None:
    """Fill `into` with the bytes of a file from `start` on; OSError where it ends before."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while done < len(into):
            count = file.readinto(into[done:])
            if not count:
                raise OSError(f"{path} ends at byte {start + done}, asked for {len(into) - done}")
            done += count


def open_storage(place: str) -> Storage:
    """The storage at a folder or URL; InputError where no program for the URL is installed."""
    scheme, found, rest = place.partition("://")
    if not found or scheme == "file":
        return LocalStorage(Path(rest if found else place).expanduser().absolute())
    from elastic.checkpoint_url import UrlStorage  # fsspec's back ends take long to import

    return UrlStorage(place)


def place_for(setting: str | None, stage: Path) -> str:
    """Where the setting `checkpoints` puts those of the stage that lives in this folder.

    `<setting>/<plan>/stages/<stage>/checkpoints`; in the stage's own folder without the setting.
    """
    if setting is None:
        return str(stage / "checkpoints")
    setting = setting.removeprefix("file://")
    if "://" not in setting:
        return str(Path(setting).expanduser().absolute().joinpath(*stage.parts[-3:], "checkpoints"))
    return "/".join((setting.rstrip("/"), *stage.parts[-3:], "checkpoints"))


def storage_of(stage: Path) -> Storage:
    """Where the checkpoints of the stage that lives in this folder lie."""
    return open_storage(_home(stage))


def settle(stage: Path, setting: str | None) -> Storage:
    """The storage that the setting asks for, noted in the stage's folder.

    StageBlocked if the stage has checkpoints elsewhere: it would silently start over.
    """
    home, wanted = _home(stage), place_for(setting, stage)
    if home == wanted:
        return open_storage(home)
    there = open_storage(home).positions()
    if there:
        raise StageBlocked(
            f"stage {stage.name!r} has its checkpoints (newest: {there[0]}) in {home}, the setting "
            f"`checkpoints` asks for {wanted}; go on with the earlier setting, or move the "
            f"checkpoints there and write that place into {stage / HOME}"
        )
    write_atomic(stage / HOME, wanted.encode())
    return open_storage(wanted)


def _home(stage: Path) -> str:
    note = stage / HOME
    return note.read_text().strip() if note.exists() else place_for(None, stage)


def check_place(setting: str | None) -> None:
    """InputError, ahead of any work, where the setting `checkpoints` cannot be used."""
    if setting is None:
        return
    if not setting:
        raise InputError("checkpoints '': empty; give a folder or a URL such as s3://bucket/runs")
    try:
        open_storage(place_for(setting, Path("plan/stages/stage")))
    except (ImportError, ValueError) as error:
        raise InputError(
            f"checkpoints {setting!r}: {error}; for s3:// install the extra: pip install "
            "'restage[s3]'"
        ) from None
