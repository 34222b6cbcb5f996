"""Files of the input by a path or a URL: there or not, how old, listed, opened. URLs: fsspec."""

import errno
import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

from elastic.errors import InputError

_BLOCK = 2**20  # bytes of one request; an index at a file's end is one, and its frames some
# What carries no time says when it changed in one of these words, whatever its kind of storage.
_STAMPS = ("ETag", "etag", "md5", "LastModified", "last_modified", "updated", "mtime", "created")


_SECRET = re.compile(r"[?&][^=&]*(sig|token|secret|password|credential|key)[^=&]*=", re.IGNORECASE)


class Stamp(NamedTuple):
    """Size in bytes, and a number that differs when it was written again: of a local one, ns."""

    size: int
    changed: int


def is_url(path: str) -> bool:
    """Whether fsspec is asked for it."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """A name below a folder or URL."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder, or the URL of it, that holds a file."""
    return path.rpartition("/")[0] if is_url(path) else os.path.dirname(path)


def name_of(path: str) -> str:
    """The last part of a path or URL."""
    return path.rpartition("/")[2]


def check_url(url: str, what: str) -> None:
    """InputError for a URL with keys in it, or for which no program is installed."""
    hosts = [part.partition("/")[0] for part in url.split("://")[1:]]
    if any("@" in host for host in hosts) or _SECRET.search(url):
        raise InputError(
            f"{what}: a URL with a user or key in it would end up in logs; give those by the "
            "environment, and write the URL without them"
        )
    if "::" in url:
        raise InputError(f"{what} {url!r}: files inside of other files are not read; unpack them")
    try:
        _file_system(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{what} {url!r}: {error}; for s3:// install the extra: pip install 'restage[s3]'"
        ) from None


def stamp(path: str) -> Stamp | None:
    """Size and age of what is there; None if nothing is. OSError where that cannot be known."""
    if not is_url(path):
        try:
            found = os.stat(path)
        except OSError as error:
            # A link that leads nowhere or in a circle is there, and gets a reason of its own.
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return Stamp(0, 0) if os.path.islink(path) else None
            raise
        return Stamp(found.st_size, found.st_mtime_ns)
    try:
        info = _file_system(path).info(path)
    except FileNotFoundError as error:
        if _is_missing(error):
            return None
        raise OSError(f"{path}: {error.__cause__ or error}") from error
    except Exception as error:  # a back end raises what it likes
        raise OSError(f"{path}: {error}") from error
    words = repr([info.get(name) for name in _STAMPS])
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return Stamp(int(info.get("size") or 0), int.from_bytes(digest, "big") >> 1)


def is_file(path: str) -> bool:
    """Whether a file is there. OSError where that cannot be known."""
    if is_url(path):
        return stamp(path) is not None
    return os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether it names a folder: by a slash at its end, or since one is there. OSError as above."""
    if path.endswith("/"):
        return True
    if not is_url(path):
        return os.path.isdir(path)
    try:
        return bool(_file_system(path).info(path).get("type") == "directory")
    except FileNotFoundError as error:
        if _is_missing(error):
            return False
        raise OSError(f"{path}: {error.__cause__ or error}") from error
    except Exception as error:  # a back end raises what it likes
        raise OSError(f"{path}: {error}") from error


def files_below(folder: str) -> Iterator[str]:
    """Names, from the folder on, of all files in it and in its folders, but hidden ones.

    In no order. OSError where a part of it cannot be read.
    """
    if not is_url(folder):
        yield from _local_files_below(folder)
        return
    system = _file_system(folder)
    root = system._strip_protocol(folder).rstrip("/") + "/"
    try:
        # What was listed is kept by the back end, and would be taken for what is there later.
        system.invalidate_cache()
        paths = system.find(root)
        system.invalidate_cache()
    except FileNotFoundError as error:
        if _is_missing(error):
            return
        raise OSError(f"{folder}: {error.__cause__ or error}") from error
    except Exception as error:  # as above
        raise OSError(f"{folder}: {error}") from error
    for path in paths:
        name = path.removeprefix(root)
        if not any(part.startswith(".") for part in name.split("/")):
            yield name


def _local_files_below(root: str) -> Iterator[str]:
    """Links are followed, but not those to a folder that holds them."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        inside = os.path.realpath(folder) + os.sep
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not inside.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)
        ]
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def is_there(path: str) -> bool:
    """Whether something is there, as far as can be known."""
    try:
        return stamp(path) is not None
    except OSError:
        return False


def open_read(path: str) -> BinaryIO:
    """The file, to read any part of it. OSError as files raise it."""
    if not is_url(path):
        return open(path, "rb")
    try:
        return cast(BinaryIO, _Remote(path, _file_system(path).open(path, "rb", block_size=_BLOCK)))
    except FileNotFoundError as error:
        if _is_missing(error):
            raise
        raise OSError(f"{path}: {error.__cause__ or error}") from error
    except OSError:
        raise
    except Exception as error:  # as above
        raise OSError(f"{path}: {error}") from error


class _Remote(io.RawIOBase):
    """A file behind a URL, whose back end raises what it likes: here they are OSErrors."""

    def __init__(self, path: str, file: Any) -> None:  # Any: fsspec has no types
        super().__init__()
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._file.read(size))
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{self._path}: {error}") from error

    def readinto(self, into: Any) -> int:
        data = self.read(len(into))
        into[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def as_os_errors(url: str) -> Iterator[None]:
    """A back end raises whatever its client library raises; here all of it is OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def _is_missing(error: FileNotFoundError) -> bool:
    """Whether the server said so: over HTTP a busy one gives the same error."""
    status = getattr(error.__cause__ or error.__context__, "status", None)
    return status in (None, 404, 410)


def _file_system(url: str) -> Any:  # Any: fsspec has no types
    import fsspec  # its back ends take long to import, and most data sets are local

    return fsspec.core.url_to_fs(url)[0]
