"""Checkpoints behind a URL, by fsspec. Only S3 is tested, with moto for a server.

There is no rename. Files are uploaded under names that hold the number of their attempt, and the
manifest, put last in one request, is the publication: a folder without one is not a checkpoint.

Guaranteed: what a manifest lists was uploaded before it and is named with its SHA-256; no attempt
writes over a file of another; the manifest is put only where there is none and, by `Fence`, only
while the attempt is the newest. The put is conditional on AWS S3; a server that takes the condition
and ignores it leaves that to the fence alone.
Not guaranteed: that a request whose sender died, or lost the fence while the request was on its
way, is not carried out later. What it then publishes is whole, and belongs to the older attempt.
Parts of an upload whose sender was killed are invisible and are paid for: give the bucket a
lifecycle rule that aborts incomplete multipart uploads after some days.
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec

from elastic.checkpoint_manifest import Damaged, read_manifest
from elastic.checkpoint_store import DAMAGED, MANIFEST, OWNER, Draft, Sink
from elastic.data.places import as_os_errors

_BLOCK = 16 * 2**20  # bytes of a part of an upload
_MOST_PARTS = 10_000  # S3's own limit
_REPLACED = ".replaced"


class UrlStorage:
    """Folders below a URL. Access keys come from the environment, as the back end reads them."""

    def __init__(self, url: str) -> None:
        # A listing kept from before would hide what other ranks and attempts have written.
        self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self._root = root.rstrip("/")
        self._url = url

    @property
    def where(self) -> str:
        """The URL."""
        return self._url

    @property
    def largest_file(self) -> int:
        """What the parts of one upload can hold."""
        return _BLOCK * _MOST_PARTS

    def owner(self) -> bytes:
        """An object beside the checkpoints."""
        with as_os_errors(self._url), suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(f"{self._root}/{OWNER}"))
        return b""

    def claim(self, mark: bytes) -> None:
        """By a conditional write."""
        with as_os_errors(self._url), suppress(FileExistsError):
            if not self.owner():
                self._fs.pipe_file(f"{self._root}/{OWNER}", mark, mode="create")

    def positions(self) -> list[int]:
        """Every folder that has a manifest, or had one that was found damaged."""
        known = {MANIFEST, DAMAGED}
        found = {p for p, files in self._folders().items() if known & files.keys()}
        return sorted(found, reverse=True)

    def sizes(self, position: int) -> dict[str, int]:
        """Bytes of each object below the position."""
        return self._folders(str(position)).get(position, {})

    def read(self, position: int, name: str) -> bytes:
        """A small object in full."""
        with as_os_errors(self._url):
            return bytes(self._fs.cat_file(self._path(position, name)))

    def read_into(self, position: int, name: str, start: int, into: memoryview) -> None:
        """One range request."""
        if not len(into):
            return  # an empty range cannot be asked for
        with as_os_errors(self._url):
            data = self._fs.cat_file(self._path(position, name), start=start, end=start + len(into))
        if len(data) != len(into):
            raise OSError(f"{self._url}: {name} ends at byte {start + len(data)}")
        into[:] = data

    def free_bytes(self) -> None:
        """Nobody says."""

    def file_name(self, draft: Draft, number: int) -> str:
        """With the attempt's number: drafts of all attempts lie in one folder."""
        return f"{draft.attempt}-{number:05d}.safetensors"

    def prepare(self, draft: Draft) -> None:
        """Remove what an earlier try left; nothing has to be made."""
        self.discard(draft)

    @contextmanager
    def create(self, draft: Draft, name: str) -> Iterator[Sink]:
        """An upload in parts, there once the block has ended."""
        path = self._path(draft.position, name)
        with as_os_errors(self._url):
            file = self._fs.open(path, "wb", block_size=_BLOCK)
            try:
                yield file
            except BaseException:
                with suppress(Exception):  # the first error is the one to tell
                    file.discard()
                raise
            file.close()

    def publish(self, draft: Draft, manifest: bytes) -> None:
        """Put the manifest where none is; one that is there is kept under another name."""
        path = self._path(draft.position, MANIFEST)
        with as_os_errors(self._url):
            if self._fs.exists(path):  # damaged, or left by an attempt that could not restore it
                self._set_aside(draft.position, MANIFEST)
            with suppress(FileNotFoundError):
                self._set_aside(draft.position, DAMAGED)
            try:
                self._fs.pipe_file(path, manifest, mode="create")
            except Exception:
                # The answer may be lost where the request was not: what is there says which.
                if not self._holds(path, manifest):
                    raise

    def _set_aside(self, position: int, name: str) -> None:
        path = self._path(position, name)
        self._fs.copy(path, f"{path}.{time.time_ns()}{_REPLACED}")
        self._fs.rm_file(path)

    def _holds(self, path: str, data: bytes) -> bool:
        with suppress(Exception):
            return bytes(self._fs.cat_file(path)) == data
        return False

    def discard(self, draft: Draft) -> None:
        """Remove the files of the draft, unless it was published after all."""
        files = self.sizes(draft.position)
        own = {name for name in files if name.startswith(f"{draft.attempt}-")}
        if MANIFEST in files:
            with suppress(Damaged):  # one of before, which lists no file of this draft
                own -= read_manifest(self, draft.position).files.keys()
        self._remove(draft.position, own)

    def note(self, position: int, name: str, text: str) -> None:
        """Put a word beside the manifest."""
        with as_os_errors(self._url):
            self._fs.pipe_file(self._path(position, name), text.encode())

    def delete(self, position: int) -> None:
        """The manifest first, then what it lists: what was damaged and set aside here is kept."""
        listed = read_manifest(self, position).files
        self._remove(position, [MANIFEST])
        self._remove(position, listed)

    def sweep(self, attempt: int, listed: Collection[int]) -> None:
        """Remove what was never published; a folder with a word about damage in it is kept."""
        for position, files in self._folders().items():
            is_draft = not {MANIFEST, DAMAGED} & files.keys() and position not in listed
            if is_draft and not any(name.endswith(_REPLACED) for name in files):
                older = [n for n in files if n.split("-")[0].isdecimal()]
                self._remove(position, [n for n in older if int(n.split("-")[0]) <= attempt])

    def _remove(self, position: int, names: Collection[str]) -> None:
        with as_os_errors(self._url):
            for name in names:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(self._path(position, name))

    def _path(self, position: int, name: str) -> str:
        return f"{self._root}/{position}/{name}"

    def _folders(self, below: str = "") -> dict[int, dict[str, int]]:
        """Bytes of each file of each position."""
        with as_os_errors(self._url):
            root = f"{self._root}/{below}".rstrip("/")
            found: dict[str, Any] = self._fs.find(root, detail=True)  # Any: fsspec's records
        folders: dict[int, dict[str, int]] = {}
        for path, info in found.items():
            *_, position, name = path.rsplit("/", 2)
            if position.isdecimal():
                folders.setdefault(int(position), {})[name] = int(info["size"])
        return folders
