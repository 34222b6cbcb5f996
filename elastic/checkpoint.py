"""Checkpoints that are whole or not there, in safetensors, for any world size.

A checkpoint is written into a folder aside, every file is flushed and listed with its SHA-256 in
manifest.json, and one rename makes the folder visible. The tensors are written and read by
torch.distributed.checkpoint through its safetensors storage, so nothing that is read is a pickle.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from elastic.errors import StageBlocked
from elastic.files import fsync_dir, write_atomic
from elastic.state import Progress, TrainState
from elastic.world import World

log = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "manifest.json"
DAMAGED = "damaged.txt"  # left in a checkpoint that was skipped, so that nothing deletes it
KEEP_LAST = 2
Event = Callable[..., None]


class StaleAttempt(StageBlocked):
    """A newer attempt at this stage has begun; this one may publish nothing more."""


class NothingToRestore(StageBlocked):
    """There are checkpoints, and none of them can be used; starting over would hide the loss."""


@dataclass(frozen=True)
class Fence:
    """The number of this attempt; a newer attempt raises it and so shuts the older one out."""

    path: Path
    attempt: int

    @classmethod
    def take(cls, folder: Path) -> "Fence":
        """Begin a new attempt at the stage that lives in `folder`."""
        path = folder / "attempt.json"
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            last = int(json.loads(path.read_text())["attempt"]) if path.exists() else 0
            write_atomic(path, json.dumps({"attempt": last + 1}).encode())
        return cls(path, last + 1)

    def check(self) -> None:
        """Raise StaleAttempt if a newer attempt has begun."""
        newest = int(json.loads(self.path.read_text())["attempt"])
        if newest != self.attempt:
            raise StaleAttempt(
                f"attempt {self.attempt} at {self.path.parent.name} may not publish: "
                f"attempt {newest} has begun; leave the stage to that one"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Publish inside this block: it is entered by the newest attempt alone, and none begins."""
        with _alone(self.path):
            self.check()
            yield


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the kernel lets go when it dies."""
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Checkpoints:
    """The checkpoints of one stage: `<stage folder>/checkpoints/<position>/`."""

    def __init__(
        self, folder: Path, world: World, fence: Fence, event: Event, keep_last: int = KEEP_LAST
    ) -> None:
        self._folder = folder / "checkpoints"
        self._world = world
        self._fence = fence
        self._event = event
        self._keep_last = keep_last
        self.saved_at = -1  # position of the newest checkpoint that this attempt wrote or restored

    def save(self, state: TrainState, reason: str) -> None:
        """Write and publish a checkpoint at the state's position; every rank calls it."""
        progress = state.progress
        if progress.samples == self.saved_at:
            return
        began = time.monotonic()
        aside = self._folder / f"{progress.samples}.{self._fence.attempt}.partial"
        if self._world.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self._world.barrier()
        _write_tensors(state.tensors(), aside)
        self._world.barrier()  # every rank's file is there before it is listed
        files = self._list(aside)
        if self._world.is_first:
            self._publish(aside, progress, files)
        self._world.barrier()  # nobody goes on, or ends, before it is visible
        self.saved_at = progress.samples
        seconds = round(time.monotonic() - began, 3)
        self._event("publish", progress.samples, reason, seconds=seconds)

    def _list(self, folder: Path) -> dict[str, Any]:
        """Flush and hash every file of the folder, each rank its share of them."""
        paths = sorted(folder.iterdir())[self._world.rank :: self._world.size]
        shares = self._world.gather({path.name: _entry(path) for path in paths})
        return {name: entry for share in shares for name, entry in share.items()}

    def require_current(self) -> None:
        """Raise StaleAttempt on every rank if a newer attempt at the stage has begun."""
        self._fence.check()

    def _publish(self, aside: Path, progress: Progress, files: dict[str, Any]) -> None:
        manifest = {"schema": SCHEMA, "progress": progress.as_json(), "files": files}
        manifest["sha256"] = _digest_of(manifest)
        write_atomic(aside / MANIFEST, json.dumps(manifest, indent=1).encode())
        final = self._folder / str(progress.samples)
        with self._fence.held():
            if final.exists():  # damaged, or left by an attempt that could not restore it: keep it
                final.rename(final.with_name(f"{final.name}.{time.time_ns()}.replaced"))
            os.rename(aside, final)
            fsync_dir(self._folder)
            self._delete_old()

    def _delete_old(self) -> None:
        """Delete what was never published, and all but the newest of the whole checkpoints."""
        folders = [self._folder / str(position) for position in published(self._folder)]
        whole = [f for f in folders if not (f / DAMAGED).exists() and not problems(f, False)]
        for folder in whole[self._keep_last :]:
            # By a rename first: a kill in the middle must not leave a damaged checkpoint.
            folder.rename(folder.with_name(f"{folder.name}.{time.time_ns()}.partial"))
        for leftover in self._folder.glob("*.partial"):
            shutil.rmtree(leftover)

    def restore_latest(self, state: TrainState) -> bool:
        """Load the newest valid checkpoint into the state; False if none was ever published.

        NothingToRestore if there are some and all of them are damaged.
        """
        mine = (self._newest_valid(), published(self._folder)) if self._world.is_first else None
        position, there = self._world.from_first(mine)
        if position is None and there:
            raise NothingToRestore(
                f"none of the checkpoints {', '.join(map(str, there))} in {self._folder} can be "
                f"restored (each has a {DAMAGED} that says why); put one back from a copy, or move "
                "that folder away to train the stage from its beginning"
            )
        if position is None:
            return False
        folder = self._folder / str(position)
        manifest = json.loads((folder / MANIFEST).read_text())
        _read_tensors(state.tensors(), folder)
        state.restored(Progress(**manifest["progress"]))
        self.saved_at = state.progress.samples
        return True

    def _newest_valid(self) -> int | None:
        for position in published(self._folder):
            folder = self._folder / str(position)
            faults = problems(folder, thorough=True)
            if not faults:
                return position
            message = f"checkpoint {position} is damaged and skipped: {'; '.join(faults)}"
            log.warning(message)
            write_atomic(folder / DAMAGED, f"{message}\n".encode())
            self._event("damaged_checkpoint", position, message)
        return None


def load_subset(stage: Path, position: int, tensors: dict[str, Tensor], world: World) -> None:
    """Load some tensors of another stage's checkpoint; NothingToRestore if it is not whole.

    `stage` is that stage's folder; every rank calls it.
    """
    folder = stage / "checkpoints" / str(position)
    faults = problems(folder, thorough=True) if world.is_first else None
    faults = world.from_first(faults)
    if faults:
        raise NothingToRestore(
            f"checkpoint {position} of {stage.name!r} cannot be used: {'; '.join(faults)}; put it "
            f"back, or start from {str(stage / 'weights.safetensors')!r} with FromFile(...)"
        )
    _read_tensors(tensors, folder)


def published(folder: Path) -> list[int]:
    """Positions of the checkpoints, whole or damaged, newest first."""
    names = [path.name for path in folder.glob("*/")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def problems(folder: Path, thorough: bool) -> list[str]:
    """What is wrong with a checkpoint; empty if its files are what the manifest says."""
    try:
        return _problems(folder, thorough)
    except OSError as error:
        return [f"cannot be read: {error}"]


def _problems(folder: Path, thorough: bool) -> list[str]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        listed = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [f"{MANIFEST} cannot be read: {error!r}"]
    if listed != _digest_of(manifest):
        return [f"{MANIFEST} does not have the SHA-256 that it carries"]
    if manifest["schema"] != SCHEMA:
        return [f"schema {manifest['schema']}, this version reads {SCHEMA}"]
    position, files = manifest["progress"]["samples"], manifest["files"]
    faults = [] if str(position) == folder.name else [f"manifest is of position {position}"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
        elif thorough and _sha256(path) != entry["sha256"]:
            faults.append(f"{name} does not have the listed SHA-256")
    return faults


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's own content; Any: JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DCP's notes about its own defaults
        dcp.save(cast(dict[str, Any], tensors), storage_writer=writer)


def _read_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(cast(dict[str, Any], tensors), storage_reader=reader)
