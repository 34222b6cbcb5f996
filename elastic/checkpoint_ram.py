"""Copies of a rank's newest files in the memory of its node, so that a restart reads no storage.

They live in a tmpfs folder and so outlive the processes that wrote them. They are never trusted:
a restore compares each with the SHA-256 in the published manifest, and reads the storage otherwise.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from elastic.checkpoint_store import Sink
from elastic.files import write_atomic

log = logging.getLogger(__name__)

SHM = Path("/dev/shm")
_PREFIX = "restage-"
_LEFT_FREE = 0.25  # of the node's memory: copies are a convenience, and training is not


class RamCopies:
    """`<tmpfs>/restage-<digest of the stage's folder>/<position>/<file>`, newest position only."""

    def __init__(self, stage: Path, owner: int, root: Path = SHM) -> None:
        """The copies of a stage on this node, kept for as long as the process `owner` lives.

        `owner` has to outlive the ranks: their node's daemon, not one of them. Copies of owners
        that are gone are removed here.
        """
        digest = hashlib.sha256(str(stage.absolute()).encode()).hexdigest()[:16]
        self._folder = root / f"{_PREFIX}{os.getuid()}-{digest}"
        self._usable = root.is_dir() and self._take(owner)
        if self._usable:
            _sweep(root, self._folder)

    def _take(self, owner: int) -> bool:
        """Make the folder ours; a folder of another user of the node is left alone."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if self._folder.stat().st_uid != os.getuid() or self._folder.is_symlink():
                return False
            mark = {"pid": owner, "started": psutil.Process(owner).create_time()}
            write_atomic(self._folder / "owner", json.dumps(mark).encode())
        except (OSError, psutil.Error) as error:
            log.warning("no copies of checkpoints in memory: %s", error)
            return False
        return True

    @contextmanager
    def create(self, position: int, name: str, num_bytes: int) -> Iterator[Sink | None]:
        """A copy to be written; None where there is no room for it."""
        copy = self._open(position, name, num_bytes)
        if copy is None:
            yield None
            return
        with copy:
            yield copy

    def _open(self, position: int, name: str, num_bytes: int) -> "_Copy | None":
        if not self._usable or not self._has_room(num_bytes):
            return None
        folder = self._folder / str(position)
        try:
            folder.mkdir(exist_ok=True)
            return _Copy(folder / name)
        except OSError as error:
            log.warning("no copy of %s in memory: %s", name, error)
            return None

    def _has_room(self, num_bytes: int) -> bool:
        memory = psutil.virtual_memory()
        free = min(shutil.disk_usage(self._folder).free, memory.available)
        return bool(free - num_bytes >= _LEFT_FREE * memory.total)

    def find(self, position: int, name: str, num_bytes: int) -> Path | None:
        """The copy of a file, if there is one of this size."""
        path = self._folder / str(position) / name
        try:
            return path if self._usable and path.stat().st_size == num_bytes else None
        except OSError:
            return None

    def keep_only(self, position: int) -> None:
        """Forget the copies of every other position."""
        for folder in self._folder.glob("*/"):
            if folder.name != str(position):
                shutil.rmtree(folder, ignore_errors=True)  # ranks of one node do this at once

    def remove(self) -> None:
        """Forget everything: the stage is finished."""
        if self._usable:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Copy:
    """A file that gives up, without a word to its writer, where the memory is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.unlink(missing_ok=True)
        self._file = path.open("xb", buffering=0)
        self._given_up = False

    def write(self, data: memoryview) -> int:
        done = len(data) if self._given_up else 0
        try:
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            log.warning("the copy %s in memory is given up: %s", self._path, error)
            self._given_up = True
            self._path.unlink(missing_ok=True)
        return len(data)

    def __enter__(self) -> "_Copy":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is not None:
            self._path.unlink(missing_ok=True)


def _sweep(root: Path, own: Path) -> None:
    """Remove the copies of runs that are gone."""
    for folder in root.glob(f"{_PREFIX}{os.getuid()}-*"):
        if folder == own:
            continue
        try:
            owner = json.loads((folder / "owner").read_text())
            alive = psutil.Process(owner["pid"]).create_time() == owner["started"]
        except psutil.NoSuchProcess:
            alive = False
        except (OSError, ValueError, LookupError, psutil.Error):
            continue  # being made by somebody just now, or not ours to judge
        if not alive:
            log.info("removing %s of a run that is gone", folder)
            shutil.rmtree(folder, ignore_errors=True)
