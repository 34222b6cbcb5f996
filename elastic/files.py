"""Files that other processes read: written aside, flushed, and published by one rename."""

import ctypes
import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_NOT_KNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def fsync_dir(folder: Path) -> None:
    """Make the folder's entries, and so the renames in it, survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that is there, whole, once the block has ended; not at all if it raises.

    The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write the file whole or not at all; the folder is made if it is missing."""
    with published(path) as file:
        file.write(data)


def exchange(one: Path, other: Path) -> None:
    """Two files or folders of one file system change names, in one step.

    Where the file system cannot do that (NFS), `other` is missing for a moment, and a kill in it
    leaves what was `one` under that name.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    names = (_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    code = errno.ENOSYS  # a C library before 2018 has no such call
    if hasattr(libc, "renameat2"):
        code = ctypes.get_errno() if libc.renameat2(*names) else 0
    if code in _NOT_KNOWN:
        aside = one.with_name(f"{one.name}.{uuid.uuid4().hex}")
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)
    elif code:
        raise OSError(code, os.strerror(code), str(one), None, str(other))


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
