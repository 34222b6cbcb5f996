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
from typing import NamedTuple

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

    def __init__(self, stage: Path, owner: int, root: Path = SHM, ranks: int = 1) -> None:
        """The copies of a stage on this node, kept for as long as the process `owner` lives.

        `owner` has to outlive the ranks: their node's daemon, not one of them. Copies of owners
        that are gone are removed here. So many `ranks` of the node keep copies at once.
        """
        self._ranks = ranks
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
        memory = memory_for(self._folder)
        return memory.free - num_bytes * self._ranks >= _LEFT_FREE * memory.total

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
        for spare in (self._folder / _SPARE).glob("*"):
            # Of ranks that have gone, or of a copy for which there was no room.
            if not (self._folder / str(position) / spare.name).exists():
                spare.unlink(missing_ok=True)

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
        self._is_whole = True
        try:
            self._file.truncate(num_bytes)
            # All of it now: a tmpfs gives memory at the first write, when others may have it.
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        except OSError:
            self._file.close()
            self._aside.unlink(missing_ok=True)
            raise

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


class Memory(NamedTuple):
    """Bytes that can still be had, and bytes that there are in all."""

    free: int
    total: int


def memory_for(folder: Path) -> Memory:
    """The memory for a file in a tmpfs folder: the node's, or less by a control group's limit."""
    node = psutil.virtual_memory()
    limits = [Memory(node.available, node.total), *group_limits()]
    free = min(shutil.disk_usage(folder).free, *(limit.free for limit in limits))
    return Memory(free, min(limit.total for limit in limits))


def group_limits(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[Memory]:
    """The limits (cgroup v2) of this process's group and those above it; empty if there are none.

    Pages of files that nobody has used for a while count as free: the kernel takes them first.
    """
    with suppress(OSError):
        path = next((ln[3:] for ln in own.read_text().splitlines() if ln.startswith("0::")), "/")
        group = groups / path.strip("/")
        up = [group, *group.parents]
        within = up[: up.index(groups) + 1]
        return [limit for group in within if (limit := _limit_of(group)) is not None]
    return []


def _limit_of(group: Path) -> Memory | None:
    try:
        total = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return Memory(total - used + int(fields["inactive_file"]), total)
    except (OSError, ValueError, LookupError):  # no such group here, or "max"
        return None


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
