"""Where a latent store lies: a local folder here, a URL in `store_url`."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from elastic.data.places import is_url
from elastic.data.shards import Bytes
from elastic.files import published

_OPEN_FILES = 192
_PIECE = 2**22  # bytes hashed at once
LOG, LOG_END = "manifest-", ".jsonl"

_Item = TypeVar("_Item", bound=np.generic)


class Span(NamedTuple):
    """Bytes of a file from `start` on, as many as `out` takes; a negative one is from the end."""

    name: str
    start: int
    out: Bytes


class OpenFile:
    """A descriptor that closes when its last reader lets go of it, in whatever thread."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def is_at(self, path: Path) -> bool:
        """Whether it is what lies at a path now."""
        return path.exists() and os.path.samestat(os.fstat(self._descriptor), path.stat())

    def fill(self, out: Bytes, start: int) -> int:
        """Read into `out`; how many bytes there were."""
        if start < 0:
            start += os.fstat(self._descriptor).st_size
            if start < 0:
                return 0
        got = 0
        while got < len(out):
            step = os.preadv(self._descriptor, [out[got:].data], start + got)
            if step == 0:
                break
            got += step
        return got

    def array(self, dtype: "np.dtype[_Item]", count: int, first: int = 0) -> NDArray[_Item]:
        """Items in a row; as many as there are."""
        out = np.empty(count, dtype)
        got = self.fill(out.view(np.uint8), first * dtype.itemsize)
        return out[: got // dtype.itemsize]

    def digest(self, without: int = 0) -> str:
        """`array_digest` of all bytes but the last few."""
        digest, at = hashlib.blake2b(digest_size=16), 0
        end = os.fstat(self._descriptor).st_size - without
        while at < end and (piece := os.pread(self._descriptor, min(end - at, _PIECE), at)):
            digest.update(piece)
            at += len(piece)
        return digest.hexdigest()


class StoreFolder(Protocol):
    """The files of a store, by names with slashes. OSError is what the place itself fails with."""

    @property
    def where(self) -> str:
        """The path or URL."""
        ...

    @property
    def reads_at_once(self) -> int:
        """How many reads the place answers faster together than one after the other."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        ...

    def sizes(self, below: str) -> dict[str, int]:
        """Bytes of each file at any depth below a name."""
        ...

    def holding(self, name: str) -> list[str]:
        """The folders directly below that hold a file of this name, in order."""
        ...

    def read(self, name: str) -> bytes:
        """A file in full; FileNotFoundError where there is none."""
        ...

    def fill(self, spans: Sequence[Span]) -> dict[int, str]:
        """Read all of them; what is wrong with those that could not be filled, by number."""
        ...

    def kept(self, name: str, digest: str, without: int = 0) -> OpenFile | None:
        """A file that stays open and has that digest; None where it is another one, or gone."""
        ...

    def publish(self, name: str, pieces: Sequence[Bytes]) -> None:
        """Write a file: whole or not there, and on the disk when this returns."""
        ...

    def append(self, writer: str, line: bytes) -> None:
        """Add a line to the commit log of a writer; on the disk when this returns."""
        ...

    def logs(self) -> Iterator[bytes]:
        """The commit logs of all writers."""
        ...

    def tidy(self) -> None:
        """Remove what killed writers left. Called when nobody writes."""
        ...


def folder_at(root: str | Path) -> StoreFolder:
    """The folder at a path or URL; nothing is made."""
    place = str(root).removeprefix("file://")
    if not is_url(place):
        return LocalFolder(Path(place))
    from elastic.data.store_url import UrlFolder  # fsspec's back ends take long to import

    return UrlFolder(place)


class LocalFolder:
    """A folder of a file system."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = _Files()
        self._prefix = f"{root}/"

    @property
    def where(self) -> str:
        """The path."""
        return str(self._root)

    @property
    def reads_at_once(self) -> int:
        """A few: the folder may be on a network."""
        return 4

    def size(self, name: str) -> int | None:
        """By its entry."""
        try:
            return os.stat(self._prefix + name).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self, below: str) -> dict[str, int]:
        """By the entries of the folders."""
        found, folders = {}, [below]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError), os.scandir(self._prefix + folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir():
                        folders.append(name)
                    else:
                        found[name] = entry.stat().st_size
        return found

    def holding(self, name: str) -> list[str]:
        """By a pattern."""
        return sorted(path.parent.name for path in self._root.glob(f"*/{name}"))

    def read(self, name: str) -> bytes:
        """At one go."""
        return (self._root / name).read_bytes()

    def fill(self, spans: Sequence[Span]) -> dict[int, str]:
        """One after the other: the disk's own read-ahead and cache do the rest."""
        faults = {}
        for number, (name, start, out) in enumerate(spans):
            try:
                file = self._files.get(self._prefix + name)
            except FileNotFoundError:
                faults[number] = "is gone with its shard"
                continue
            if (got := file.fill(out, start)) < len(out):
                faults[number] = f"is cut off after {got} bytes"
        return faults

    def kept(self, name: str, digest: str, without: int = 0) -> OpenFile | None:
        """Where it lies."""
        try:
            file = OpenFile(self._prefix + name)
        except FileNotFoundError:
            return None
        return file if file.digest(without) == digest else None

    def publish(self, name: str, pieces: Sequence[Bytes]) -> None:
        """Aside, and by one rename."""
        with published(self._root / name) as file:
            for piece in pieces:
                file.write(piece.data)

    def append(self, writer: str, line: bytes) -> None:
        """One write to the writer's own file."""
        path = self._root / f"{LOG}{writer}{LOG_END}"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(descriptor, line)
            if written != len(line):
                raise OSError(
                    f"{path}: {written} of {len(line)} bytes were written; is the disk full?"
                )
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def logs(self) -> Iterator[bytes]:
        """In the order of their names."""
        for path in sorted(self._root.glob(f"{LOG}*{LOG_END}")):
            yield path.read_bytes()

    def tidy(self) -> None:
        """Files that were written aside and never published."""
        for leftover in self._root.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)


class _Files:
    """The shard files that were used last, kept open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, OpenFile] = OrderedDict()

    def get(self, path: str) -> OpenFile:
        with self._lock:
            file = self._open.get(path) or OpenFile(path)
            self._open[path] = file
            self._open.move_to_end(path)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file
