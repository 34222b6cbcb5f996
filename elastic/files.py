"""Files that other processes read: written aside, flushed, and published by one rename."""

import os
import uuid
from pathlib import Path


def fsync_dir(folder: Path) -> None:
    """Make the folder's entries, and so the renames in it, survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write the file whole or not at all; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with aside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_dir(path.parent)
