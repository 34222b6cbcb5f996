"""The manifest of a checkpoint: what its files are, and how to tell that they still are that."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from elastic.checkpoint_store import DAMAGED, MANIFEST, Storage
from elastic.state import Progress

SCHEMA = 1
_PIECE = 8 * 2**20


class FileEntry(NamedTuple):
    """Size and digest of one file."""

    num_bytes: int
    sha256: str


class Manifest(NamedTuple):
    """A manifest that has the digest which it carries."""

    progress: Progress
    files: dict[str, FileEntry]


class Damaged(Exception):
    """A checkpoint is not what its manifest says, or has none."""


def encode(progress: dict[str, object], files: dict[str, FileEntry]) -> bytes:
    """A manifest as the bytes to publish."""
    listed = {name: {"bytes": e.num_bytes, "sha256": e.sha256} for name, e in files.items()}
    manifest: dict[str, Any] = {"schema": SCHEMA, "progress": progress, "files": listed}
    manifest["sha256"] = _digest_of(manifest)
    return json.dumps(manifest, indent=1).encode()


def read_manifest(storage: Storage, position: int) -> Manifest:
    """The manifest of a checkpoint; Damaged if it is not to be trusted."""
    try:
        content = json.loads(storage.read(position, MANIFEST))
        listed = content.pop("sha256")
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error!r}") from None
    if listed != _digest_of(content):
        raise Damaged(f"{MANIFEST} does not have the SHA-256 that it carries")
    try:
        return _parsed(content, position)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(f"{MANIFEST} has not the fields of one: {error!r}") from None


def _parsed(content: dict[str, Any], position: int) -> Manifest:
    """Any error of a lookup or a type where the fields are others than `encode` writes."""
    if content["schema"] != SCHEMA:
        raise Damaged(f"schema {content['schema']}, this version reads {SCHEMA}")
    progress = Progress(**content["progress"])
    if progress.samples != position:
        raise Damaged(f"manifest is of position {progress.samples}")
    files = {n: FileEntry(int(e["bytes"]), str(e["sha256"])) for n, e in content["files"].items()}
    astray = [name for name in files if "/" in name or "\\" in name or name.startswith(".")]
    if astray:
        raise Damaged(f"{MANIFEST} lists {astray[0]!r}, which is no name of a file of its folder")
    return Manifest(progress, files)


def misfits(storage: Storage, position: int, manifest: Manifest) -> list[str]:
    """Files that are missing or of another size."""
    there = storage.sizes(position)
    faults = []
    for name, entry in manifest.files.items():
        if name not in there:
            faults.append(f"{name} is missing")
        elif there[name] != entry.num_bytes:
            faults.append(f"{name} has {there[name]} bytes, not {entry.num_bytes}")
    return faults


def problems(storage: Storage, position: int, thorough: bool) -> list[str]:
    """What is wrong with a checkpoint; empty if its files are what the manifest says."""
    try:
        manifest = read_manifest(storage, position)
        faults = misfits(storage, position, manifest)
        if thorough and not faults:
            for name, entry in manifest.files.items():
                require_digest(name, entry, partial(storage.read_into, position, name))
    except (Damaged, OSError) as error:
        return [fault(error)]
    return faults


def whole_positions(storage: Storage) -> list[int]:
    """Positions of the checkpoints whose files are there and were not found damaged, newest first.

    OSError where the storage cannot be listed.
    """
    return [
        position
        for position in storage.positions()
        if DAMAGED not in storage.sizes(position)
        and not problems(storage, position, thorough=False)
    ]


def fault(error: Damaged | OSError) -> str:
    """An error of a checkpoint in words."""
    return str(error) if isinstance(error, Damaged) else f"cannot be read: {error}"


def require_digest(
    name: str, entry: FileEntry, read_into: Callable[[int, memoryview], None]
) -> None:
    """Read a file in full; Damaged if it is not the listed one."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(_PIECE, entry.num_bytes)))
    for start in range(0, entry.num_bytes, _PIECE):
        part = piece[: entry.num_bytes - start]
        read_into(start, part)
        digest.update(part)
    if digest.hexdigest() != entry.sha256:
        raise Damaged(f"{name} does not have the listed SHA-256")


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
