"""Latent stores behind a URL, by fsspec. Only S3 is tested, with moto for a server.

A bucket has no rename and no append. A file is one upload, whole or not there, and a line of the
commit log is an object of its own; sealing gathers those. Small files that are read item by item
are copied to this machine once. Parts of an upload whose sender was killed are invisible and are
paid for: give the bucket a lifecycle rule that aborts them after some days.
"""

import errno
import fcntl
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from elastic.data.places import as_os_errors
from elastic.data.shards import Bytes
from elastic.data.store_folder import LOG, LOG_END, OpenFile, Span
from elastic.files import published

_AT_ONCE = 1000  # objects asked for at once
_MOST_LOG = 2**40  # bytes
_PATIENCE_S = 30.0  # less than a training process may be silent
_WAIT_S = 1.0  # before the next try; the back end has made some of its own
_pause = time.sleep
_UNUSED_S = 30 * 86400.0  # after which a copy is removed


class UrlFolder:
    """Objects below a URL. Access keys come from the environment, as the back end reads them."""

    def __init__(self, url: str) -> None:
        # A listing kept from before would hide what other writers have published.
        self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self._root = root.rstrip("/")
        self._url = url.rstrip("/")

    @property
    def where(self) -> str:
        """The URL."""
        return self._url

    @property
    def reads_at_once(self) -> int:
        """Many: each waits for an answer most of the time."""
        return 16

    def size(self, name: str) -> int | None:
        """By asking for its head."""
        with as_os_errors(self._url):
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def sizes(self, below: str) -> dict[str, int]:
        """By a listing, of up to 1000 objects a request."""
        with as_os_errors(self._url):
            found: dict[str, Any] = self._fs.find(self._path(below), detail=True)  # fsspec's
        return {self._name(path): int(info["size"]) for path, info in found.items()}

    def holding(self, name: str) -> list[str]:
        """By a pattern."""
        with as_os_errors(self._url):
            found = self._fs.glob(self._path(f"*/{name}"))
        return sorted(self._name(path).partition("/")[0] for path in found)

    def read(self, name: str) -> bytes:
        """One request."""
        with as_os_errors(self._url):
            return bytes(self._fs.cat_file(self._path(name)))

    def fill(self, spans: Sequence[Span]) -> dict[int, str]:
        """Range requests, all at once; those that fail are made again for half a minute."""
        left = {number: span for number, span in enumerate(spans) if len(span.out)}
        faults: dict[int, str] = {}
        began = time.monotonic()
        while failed := self._try(left, faults):
            number, error = next(iter(failed.items()))
            if time.monotonic() - began > _PATIENCE_S:
                raise OSError(f"{self._url}/{left[number].name}: {error}") from error
            left = {number: left[number] for number in failed}
            _pause(_WAIT_S)
        return faults

    def _try(self, left: dict[int, Span], faults: dict[int, str]) -> dict[int, Exception]:
        """Fill what can be filled; what may be worth another try."""
        failed = {}
        names, starts, outs = zip(*left.values(), strict=True) if left else ((), (), ())
        ends = [
            start + len(out) if start >= 0 else None
            for start, out in zip(starts, outs, strict=True)
        ]
        found = self._fs.cat_ranges(
            [self._path(name) for name in names], list(starts), ends, on_error="return"
        )
        for number, data in zip(left, found, strict=True):
            out = left[number].out
            if isinstance(data, FileNotFoundError):
                faults[number] = "is gone with its shard"
                continue
            if isinstance(data, OSError) and data.errno == errno.EINVAL:
                data = b""  # a range that begins beyond the end
            if isinstance(data, Exception):
                failed[number] = data
            elif len(data) < len(out):
                faults[number] = f"is cut off after {len(data)} bytes"
            else:
                out[:] = np.frombuffer(data, np.uint8)
        return failed

    def kept(self, name: str, digest: str, without: int = 0) -> OpenFile | None:
        """A copy on this machine, which all processes share; it is compared at each opening."""
        copy = _copies() / f"{digest}-{without}"  # of a plan and of a column may be one digest
        for is_new in (False, True):
            with _alone(copy.parent):
                if is_new or not copy.exists():
                    is_new = True
                    if not self._download(name, copy):
                        return None
                file = OpenFile(copy)
                os.utime(copy)
            if file.digest(without) == digest:
                return file
            with _alone(copy.parent):
                if file.is_at(copy):  # and not a whole one that somebody else has fetched since
                    copy.unlink()
            if is_new:
                break
        return None

    def _download(self, name: str, copy: Path) -> bool:
        for other in copy.parent.iterdir():
            if other != copy and time.time() - other.stat().st_mtime > _UNUSED_S:
                other.unlink(missing_ok=True)
        try:
            with published(copy) as file, as_os_errors(self._url):
                self._fs.get_file(self._path(name), file.name)
        except FileNotFoundError:
            return False
        return True

    def publish(self, name: str, pieces: Sequence[Bytes]) -> None:
        """One upload, which is there when it has ended."""
        with as_os_errors(self._url):
            self._fs.pipe_file(self._path(name), b"".join(piece.data for piece in pieces))

    def append(self, writer: str, line: bytes) -> None:
        """An object of its own."""
        name = f"{LOG}{writer}-{uuid.uuid4().hex}{LOG_END}"
        with as_os_errors(self._url):
            self._fs.pipe_file(self._path(name), line)

    def logs(self) -> Iterator[bytes]:
        """Many requests at once."""
        names = self._log_names()
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            with as_os_errors(self._url):
                # Ranges, since a whole object is asked for its size before.
                yield from self._fs.cat_ranges(some, 0, _MOST_LOG, on_error="raise")

    def tidy(self) -> None:
        """Gather the log in one object: each line was one, and each is a request to read."""
        names = self._log_names()
        if len(names) < 2:
            return
        self.append("all", b"".join(self.logs()))
        with as_os_errors(self._url):  # last: what is gathered is there already
            self._fs.rm(names)

    def _log_names(self) -> list[str]:
        with as_os_errors(self._url):
            return sorted(self._fs.glob(self._path(f"{LOG}*{LOG_END}")))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _name(self, path: str) -> str:
        return path.removeprefix(f"{self._root}/")


def _copies() -> Path:
    """Where this user keeps copies of small files that lie behind URLs, by their digests."""
    folder = Path(tempfile.gettempdir()) / f"restage-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(
            f"{folder} is not this user's alone, and holds copies of what is trained on: remove "
            "it, or set TMPDIR to another folder"
        )
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the kernel lets go when it dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
