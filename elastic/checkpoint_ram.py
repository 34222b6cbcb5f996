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
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from elastic.checkpoint_store import Sink
from elastic.files import write_atomic

log = logging.getLogger(__name__)

SHM = Path("/dev/shm")
_PREFIX = "restage-"
_SPARE = "spare"
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
        if not self._usable:
            return None
        folder, spare = self._folder / str(position), self._folder / _SPARE / name
        held = spare.stat().st_size if spare.exists() else 0
        if not self._has_room(max(0, num_bytes - held)):
            spare.unlink(missing_ok=True)
            return None
        try:
            folder.mkdir(exist_ok=True)
            return _Copy(folder / name, num_bytes, spare if held else None)
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
        """Forget the copies of every other position, and keep the memory of one for the next.

        A save needs the memory of two in any case, since the older copies serve until it is done.
        """
        for folder in self._folder.glob("*/"):
            if folder.name in (str(position), _SPARE):
                continue
            with suppress(OSError):  # ranks of one node do this at once
                (self._folder / _SPARE).mkdir(exist_ok=True)
                for copy in folder.glob("*.safetensors"):
                    copy.replace(self._folder / _SPARE / copy.name)
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Forget everything: the stage is finished."""
        if self._usable:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Copy:
    """A file that gives up, without a word to its writer, where the memory is full.

    It takes its name when it is whole. `spare` is an older copy whose memory is used again: pages
    that are there need not be cleared by the kernel, which takes longer than to write them.
    """

    def __init__(self, path: Path, num_bytes: int, spare: Path | None) -> None:
        self._path = path
        self._aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        if spare is not None:
            spare.rename(self._aside)
        self._file = self._aside.open("wb" if spare is None else "r+b", buffering=0)
        self._file.truncate(num_bytes)
        self._is_whole = True

    def write(self, data: memoryview) -> int:
        done = 0 if self._is_whole else len(data)
        try:
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            log.warning("the copy %s in memory is given up: %s", self._path, error)
            self._is_whole = False
        return len(data)

    def __enter__(self) -> "_Copy":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._is_whole:
            self._aside.replace(self._path)
        else:
            self._aside.unlink(missing_ok=True)


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
