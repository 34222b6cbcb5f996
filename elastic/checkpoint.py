"""Checkpoints that are whole or not there, in safetensors, for any world size.

Every rank writes its part of the state beside the training; when all parts are there, flushed and
hashed, the first rank publishes them with a manifest. Nothing that is read is a pickle.
"""

import errno
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from elastic.checkpoint_fence import Fence, StaleAttempt
from elastic.checkpoint_flight import Flight
from elastic.checkpoint_manifest import (
    Damaged,
    FileEntry,
    Manifest,
    encode,
    misfits,
    read_manifest,
    whole_positions,
)
from elastic.checkpoint_place import Register, Wanted, storage_of
from elastic.checkpoint_ram import RamCopies
from elastic.checkpoint_read import (
    LONGEST_PAUSE_S,
    RETRY_S,
    Origin,
    Source,
    answered,
    causes,
    restore,
)
from elastic.checkpoint_store import (
    DAMAGED,
    DEFAULT_KEEP,
    Draft,
    Keep,
    LocalStorage,
    Storage,
)
from elastic.checkpoint_write import CheckpointWriter, Place, Snapshot
from elastic.ema import local
from elastic.errors import StageBlocked
from elastic.state import Progress, TrainState
from elastic.world import World

__all__ = ["Checkpoints", "Fence", "NothingToRestore", "StaleAttempt", "load_subset", "published"]
log = logging.getLogger(__name__)

LAST = ("stop", "finished")  # reasons of a save after which the ranks end: it is waited for
# A rank waits so long for the slowest one's file; it is no limit for a save that makes progress.
_WRITE_TIMEOUT = timedelta(hours=2)
Event = Callable[..., None]
T = TypeVar("T")


class NothingToRestore(StageBlocked):
    """There are checkpoints, and none of them can be used; starting over would hide the loss."""


class Checkpoints:
    """The checkpoints of one stage. Every rank makes one, at the same time.

    They lie in `<stage folder>/checkpoints/<position>/` unless a storage is given. `ram` keeps
    copies of the newest on the ranks' own nodes. A last save is tried again for `retry_s` seconds.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        fence: Fence,
        event: Event,
        keep: Keep = DEFAULT_KEEP,
        storage: Storage | None = None,
        ram: RamCopies | None = None,
        retry_s: float = RETRY_S,
    ) -> None:
        self._stage = folder.name
        self._storage = storage or LocalStorage(folder / "checkpoints")
        self._register = Register(folder)
        self._wanted = Wanted(folder)
        self._world = world
        self._fence = fence
        self._event = event
        self._keep = keep
        self._ram = ram
        self._retry_s = retry_s
        self._snapshot = Snapshot()
        self._flight: Flight | None = None
        # Its messages must not come between those of the training, so it has a group of its own.
        self._group = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT)
        self.saved_at = -1  # position of the newest checkpoint that this attempt wrote or restored
        self.restored_from = Origin()  # where the bytes came from that this attempt began with

    def save(self, state: TrainState, reason: str) -> None:
        """Save the state as it is now; every rank calls it.

        Returns when the values are copied and goes on beside the training, where `poll` sees its
        end; a last save (`stop`, `finished`) returns when it is published, else StageBlocked. One
        save is in flight at a time: an earlier one is waited for.
        """
        began, position = time.monotonic(), state.progress.samples
        if self._flight is not None:
            self._land(reason if self._flight.position == position else None)
        if position != self.saved_at and reason in LAST:
            self._save_last(state, reason, began)
        elif position != self.saved_at:
            tensors, progress = state.tensors(), state.progress.as_json()
            parts = self._snapshot.take(tensors)
            stall_s = time.monotonic() - began

            def work() -> None:
                self._write(tensors, parts, progress)

            self._flight = Flight(position, reason, stall_s, work)
        if reason == "finished" and self._ram is not None:
            self._ram.remove()

    def poll(self) -> None:
        """Tell of a save in flight that has ended on every rank; called once an update by all."""
        if self._flight is not None and not self._world.most(int(not self._flight.is_over())):
            self._land(None)

    def wait(self) -> None:
        """Return when no save is in flight; every rank calls it."""
        if self._flight is not None:
            self._land(None)

    def abandon(self, grace_s: float) -> None:
        """For a rank that ends by an error: let a save in flight end, but wait no longer than this.

        The threads of the ranks that are still there finish it without their training.
        """
        if self._flight is not None:
            self._flight.join(grace_s)

    def _land(self, instead: str | None) -> None:
        """Wait for the save in flight and tell how it ended.

        With a reason `instead` of its own, training stands still for it and nothing is beside it.
        """
        flight, self._flight = self._flight, None
        assert flight is not None, "no save is in flight"
        try:
            flight.wait()
        except OSError as error:
            self._failed(flight.position, error, *flight.took(bool(instead)))
            return
        stall, background = flight.took(bool(instead))
        self._published(flight.position, instead or flight.reason, stall, background)

    def _save_last(self, state: TrainState, reason: str, began: float) -> None:
        tensors, progress = state.tensors(), state.progress
        parts = {name: local(tensor) for name, tensor in tensors.items()}
        pause = 0.5
        while True:
            try:
                self._write(tensors, parts, progress.as_json())
            except OSError as error:
                self._failed(progress.samples, error, time.monotonic() - began, 0.0)
                if self._world.from_first(time.monotonic() - began + pause > self._retry_s):
                    raise StageBlocked(self._blocked(progress.samples, error)) from None
                time.sleep(pause)  # nothing says when a full disk or a silent storage is back
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._published(progress.samples, reason, time.monotonic() - began, 0.0)
                return

    def _blocked(self, position: int, error: OSError) -> str:
        newest = f"the one at {self.saved_at} is whole" if self.saved_at >= 0 else "there is none"
        return (
            f"stage {self._stage!r}: the checkpoint at {position} could not be written to "
            f"{self._storage.where} for {self._retry_s:.0f} s ({error}); of those before it, "
            f"{newest}; put that right and give the same command again"
        )

    def _failed(self, position: int, error: OSError, stall: float, background: float) -> None:
        # A newer attempt removes the drafts of older ones, which then fail to write. Where even the
        # fence cannot be read, the save has failed and that is all that is known.
        with suppress(OSError):
            self._world.on_first(self._fence.check)
        log.warning("checkpoint %d could not be written: %s", position, error)
        seconds, background = round(stall, 3), round(background, 3)
        self._event("save_failed", position, str(error), seconds=seconds, background=background)

    def _published(self, position: int, reason: str, stall: float, background: float) -> None:
        self.saved_at = position
        if self._ram is not None:
            self._ram.keep_only(position)
        seconds, background = round(stall, 3), round(background, 3)
        self._event("publish", position, reason, seconds=seconds, background=background)

    def _write(
        self, tensors: dict[str, Tensor], parts: Mapping[str, Tensor], progress: dict[str, object]
    ) -> None:
        """Write and publish; on every rank, and all of them raise or none.

        OSError where the storage refused; StaleAttempt.
        """
        draft = Draft(cast(int, progress["samples"]), self._fence.attempt)
        num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        writer = CheckpointWriter(
            Place(self._storage, draft, self._ram),
            parts,
            begin=lambda largest: self._begin(draft, num_bytes, largest),
            publish=lambda files: self._publish(draft, progress, files),
        )
        try:
            dcp.save(
                cast(dict[str, Any], tensors), storage_writer=writer, process_group=self._group
            )
        except CheckpointException as failure:
            if self._world.is_first:
                self._discard(draft)
            errors = causes(failure, OSError, StaleAttempt)
            raise next((e for e in errors if isinstance(e, StaleAttempt)), errors[0]) from None

    def _begin(self, draft: Draft, num_bytes: int, largest: int) -> None:
        """For files of so many bytes in all, and in the largest one (names left out)."""
        self._fence.check()
        limit = self._storage.largest_file
        if limit is not None and largest + 2**20 > limit:
            raise OSError(
                errno.EFBIG,
                f"checkpoint {draft.position} has a file of {largest / 1e9:,.3f} GB, "
                f"{limit / 1e9:,.3f} GB are the most in {self._storage.where}; train on more "
                "workers, each of which writes its part, or give a folder for --checkpoints",
            )
        free = self._storage.free_bytes()
        if free is not None and free < num_bytes * 1.01 + 2**20:  # names, offsets, the manifest
            raise OSError(
                errno.ENOSPC,
                f"checkpoint {draft.position} needs {num_bytes / 1e9:,.3f} GB, {free / 1e9:,.3f} "
                f"GB are free in {self._storage.where}; make room, or keep fewer (--keep-last)",
            )
        self._storage.prepare(draft)

    def _publish(
        self, draft: Draft, progress: dict[str, object], files: dict[str, FileEntry]
    ) -> None:
        manifest = encode(progress, files)
        with self._fence.held():
            self._storage.publish(draft, manifest)
            try:
                self._register.add(draft.position)
            except OSError as error:  # published all the same
                log.warning("%s could not be written: %s", self._register.path, error)
        try:
            self._delete_old()
        except (OSError, StaleAttempt) as error:
            log.warning("old checkpoints could not be deleted: %s", error)

    def _discard(self, draft: Draft) -> None:
        try:
            self._storage.discard(draft)
        except OSError as error:  # swept by the next save that succeeds
            log.warning("a draft could not be removed: %s", error)

    def _delete_old(self) -> None:
        """Delete what was never published, and the whole checkpoints that nobody is to keep.

        The fence is not held while a storage works on that: a newer attempt need not wait.
        """
        whole = whole_positions(self._storage)
        doomed = set(whole) - self._keep.chosen(whole)
        with self._fence.held():
            doomed -= self._wanted.positions()
            self._register.remove(doomed)
            listed = self._register.positions()
        for position in doomed:
            self._storage.delete(position)
        self._storage.sweep(self._fence.attempt, listed)

    def require_current(self) -> None:
        """Raise StaleAttempt on every rank if a newer attempt at the stage has begun."""
        self._fence.check()

    def restore_latest(self, state: TrainState) -> bool:
        """Load the newest valid checkpoint into the state; False if none was ever published.

        NothingToRestore if there are some and all of them are damaged, or all have gone; another
        StageBlocked where the storage cannot be read.
        """
        there = self._answered(lambda: self._world.on_first(self._expected))
        for position in there:
            try:
                progress = self._answered(partial(self._restore, position, state))
            except Damaged as error:
                self._skip(position, str(error))
                continue
            state.restored(progress)
            self.saved_at = position
            return True
        if there:
            raise NothingToRestore(
                f"none of the checkpoints {', '.join(map(str, there))} in {self._storage.where} "
                f"can be restored (each has a {DAMAGED} that says why); put one back from a copy, "
                f"or move that folder and {self._register.path} away to train the stage from its "
                "beginning"
            )
        return False

    def _answered(self, ask: Callable[[], T]) -> T:
        return answered(self._world, self._storage.where, ask, self._retry_s)

    def _expected(self) -> list[int]:
        """Positions of what is there and of what was published, newest first."""
        there, listed = self._storage.positions(), self._register.positions()
        if listed and not there:
            raise NothingToRestore(
                f"stage {self._stage!r} has published checkpoints (newest: {max(listed)}) and "
                f"nothing is in {self._storage.where}; have it mounted or put them back, or remove "
                f"{self._register.path} to train the stage from its beginning"
            )
        return sorted(listed.union(there), reverse=True)

    def _restore(self, position: int, state: TrainState) -> Progress:
        """Load one checkpoint; Damaged or OSError, on every rank."""
        manifest = self._world.on_first(lambda: _whole(self._storage, position))
        progress = manifest.progress
        if progress.stage != state.progress.stage:
            raise Damaged(f"it is of stage {progress.stage!r}, not of {state.progress.stage!r}")
        source = Source(self._storage, position, manifest.files, self._ram)
        self.restored_from = restore(source, state.tensors(), self._world)
        return progress

    def _skip(self, position: int, faults: str) -> None:
        if not self._world.is_first:
            return
        message = f"checkpoint {position} is damaged and skipped: {faults}"
        log.warning(message)
        try:
            if self._storage.sizes(position):
                self._storage.note(position, DAMAGED, f"{message}\n")
        except OSError as error:
            log.warning("that could not be noted beside it: %s", error)
        self._event("damaged_checkpoint", position, message)


def load_subset(stage: Path, position: int, tensors: dict[str, Tensor], world: World) -> None:
    """Load some tensors of another stage's checkpoint; NothingToRestore if it is not whole.

    `stage` is that stage's folder; every rank calls it.
    """
    storage = storage_of(stage)

    def load() -> None:
        files = world.on_first(lambda: _whole(storage, position)).files
        restore(Source(storage, position, files, None), tensors, world)

    try:
        answered(world, storage.where, load)
    except Damaged as error:
        raise NothingToRestore(
            f"checkpoint {position} of {stage.name!r} cannot be used: {error}; put it back, or "
            f"start from {str(stage / 'weights.safetensors')!r} with FromFile(...), or from "
            "another checkpoint with `at`, under another stage name"
        ) from None


def published(folder: Path) -> list[int]:
    """Positions of the checkpoints in a local folder, whole or damaged, newest first."""
    return LocalStorage(folder).positions()


def _whole(storage: Storage, position: int) -> Manifest:
    """What a checkpoint says of itself; Damaged if one can see that it is not whole."""
    manifest = read_manifest(storage, position)
    faults = misfits(storage, position, manifest)
    if faults:
        raise Damaged("; ".join(faults))
    return manifest
