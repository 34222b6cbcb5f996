"""How a checkpoint is read: verified first, then each rank the rows that it holds in this world."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from elastic.checkpoint_manifest import Damaged, FileEntry, require_digest
from elastic.checkpoint_ram import RamCopies
from elastic.checkpoint_store import Storage
from elastic.checkpoint_write import OFFSETS, SHARDING, WORDS
from elastic.errors import StageBlocked
from elastic.files import read_into
from elastic.world import World

log = logging.getLogger(__name__)

RETRY_S = 60.0  # a storage that does not answer is tried again for so long
LONGEST_PAUSE_S = 10.0
_DTYPES = {word: dtype for dtype, word in WORDS.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
T = TypeVar("T")
ReadInto = Callable[[int, memoryview], None]  # fills memory from a byte of one file on


def answered(world: World, where: str, ask: Callable[[], T], retry_s: float = RETRY_S) -> T:
    """What a storage answers; it is asked again for `retry_s` seconds, then StageBlocked.

    Every rank calls it, and `ask` has to return on all of them or raise OSError on all.
    """
    began, pause = time.monotonic(), 0.5
    while True:
        try:
            return ask()
        except OSError as error:
            if world.from_first(time.monotonic() - began + pause > retry_s):
                raise StageBlocked(
                    f"storage unreachable: {where}: {error}; nothing is lost: when it can be read, "
                    "the same command goes on"
                ) from None
            log.warning("%s: %s; asking again", where, error)
            time.sleep(pause)  # nothing says when a silent storage is back
            pause = min(2 * pause, LONGEST_PAUSE_S)


class Part(NamedTuple):
    """A part of a tensor: its rows begin at `begin` in the file, at `offsets` in the whole."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    begin: int


Parts = dict[tuple[str, tuple[int, ...]], Part]  # by tensor and offsets


class Source(NamedTuple):
    """A checkpoint to be read, and the copies of its files that this node may have."""

    storage: Storage
    position: int
    files: dict[str, FileEntry]
    ram: RamCopies | None

    def stored(self, name: str) -> ReadInto:
        """Reads a file of the storage."""
        return partial(self.storage.read_into, self.position, name)

    def copy_of(self, name: str) -> Path | None:
        """The node's copy of a file; not to be trusted before its digest is compared."""
        if self.ram is None:
            return None
        return self.ram.find(self.position, name, self.files[name].num_bytes)


class Origin(NamedTuple):
    """Bytes that the ranks read to restore, by where they came from."""

    ram: int = 0
    storage: int = 0


class Verified(NamedTuple):
    """What is known of a checkpoint's files once their digests were compared."""

    parts: Parts  # of every file
    copies: dict[str, Path]  # good copies on this node
    stored: frozenset[str]  # files that are good in the storage


def restore(source: Source, tensors: dict[str, Tensor], world: World) -> Origin:
    """Load a checkpoint into the tensors; every rank calls it, and all of them raise or none.

    Damaged where it is not what its manifest says, OSError where it cannot be read; the tensors
    may be half loaded then. Each file is verified before anything in it is believed: where it is in
    the memory of a node, by a rank of that node, else in the storage, by one rank of the world; and
    in the storage as well, for nodes that have to read it there.
    """
    verified = _verify(source, world)
    faults = unfit(verified.parts, tensors)
    if faults:
        raise Damaged("; ".join(faults))
    reader = CheckpointReader(source, verified)
    try:
        dcp.load(cast(dict[str, Any], tensors), storage_reader=reader)
    except CheckpointException as failure:
        raise_first(causes(failure, Damaged, OSError))
    read = world.gather((reader.bytes_from_ram, reader.bytes_from_storage))
    return Origin(*(sum(values) for values in zip(*read, strict=True)))


def causes(failure: CheckpointException, *expected: type[Exception]) -> list[Exception]:
    """The ranks' errors, if each of them is expected; else one RuntimeError with all tracebacks.

    Torch's own exception is no Exception, so it must not go further than this.
    """
    errors = [error for error, _ in failure.failures.values()]
    if not all(isinstance(error, expected) for error in errors):
        raise RuntimeError(str(failure)) from None
    return cast(list[Exception], errors)


def raise_first(errors: list[Exception]) -> None:
    """Raise all damage in one, or else the first error; nothing if there is none."""
    damage = [str(error) for error in errors if isinstance(error, Damaged)]
    if damage:
        raise Damaged("; ".join(damage))
    if errors:
        raise errors[0]


def _verify(source: Source, world: World) -> Verified:
    names = sorted(source.files)
    hosts = world.gather(host())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    share = names[here.index(world.rank) :: len(here)]
    copies = {n: p for n in share if (p := source.copy_of(n)) and _is_good(source, n, p)}
    headers = _headers_of_copies(source, copies)
    copies = {name: path for name, path in copies.items() if name in headers}
    everyone = world.gather((copies, headers))
    copies = {n: path for rank in here for n, path in everyone[rank][0].items()}
    headers = {n: header for _, some in everyone for n, header in some.items()}

    missing = [name for name in names if name not in headers]
    stored = world.gather(verify_stored(source, missing[world.rank :: world.size]))
    raise_first([error for _, errors in stored for error in errors])
    headers |= {n: header for some, _ in stored for n, header in some.items()}
    parts = {(name, part.offsets): part for file in headers.values() for name, part in file}
    return Verified(parts, copies, frozenset(missing))


def host() -> str:
    """The name of this node: ranks with the same name see the same memory."""
    return os.uname().nodename


def _is_good(source: Source, name: str, copy: Path) -> bool:
    try:
        require_digest(name, source.files[name], partial(read_into, copy))
    except (Damaged, OSError):
        return False  # the storage has it
    return True


def _headers_of_copies(
    source: Source, copies: dict[str, Path]
) -> dict[str, list[tuple[str, Part]]]:
    """Of those that can be read; nothing is raised here, as the other ranks would wait."""
    headers = {}
    for name, path in copies.items():
        with suppress(Damaged, OSError):  # the storage has it
            headers[name] = _header_of(source, name, partial(read_into, path))
    return headers


def verify_stored(
    source: Source, names: list[str]
) -> tuple[dict[str, list[tuple[str, Part]]], list[Exception]]:
    """The parts in each of these files of the storage that is good, and what is wrong with others.

    Each file is read in full and compared with its digest.
    """
    headers: dict[str, list[tuple[str, Part]]] = {}
    errors: list[Exception] = []
    for name in names:
        try:
            require_digest(name, source.files[name], source.stored(name))
            headers[name] = _header_of(source, name, source.stored(name))
        except (Damaged, OSError) as error:
            errors.append(error)
    return headers, errors


def _header_of(source: Source, name: str, read: ReadInto) -> list[tuple[str, Part]]:
    """The tensors of a verified file; Damaged where it is no file of ours all the same."""
    size = source.files[name].num_bytes
    length = int.from_bytes(_bytes(read, 0, 8), "little") if size >= 8 else 0
    try:
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(_bytes(read, 8, length))
        offsets = json.loads(header.pop("__metadata__")[SHARDING])
        return [
            (key, _part(name, fields, offsets[key][OFFSETS], 8 + length, size))
            for key, fields in header.items()
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{name} is no file of a checkpoint: {error!r}") from None


def _part(file: str, fields: Any, offsets: list[int], data: int, size: int) -> Part:  # Any: JSON
    begin, end = fields["data_offsets"]
    dtype, shape = _DTYPES[fields["dtype"]], tuple(fields["shape"])
    if end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError(f"{fields} do not fit into {size} bytes")
    return Part(file, dtype, shape, tuple(offsets), data + begin)


def _bytes(read: ReadInto, start: int, count: int) -> bytes:
    buffer = bytearray(count)
    read(start, memoryview(buffer))
    return bytes(buffer)


class CheckpointReader(StorageReader):
    """Reads verified files for `dcp.load`, from the node's copies where it has them."""

    def __init__(self, source: Source, verified: Verified) -> None:
        self._source = source
        self._verified = verified
        self.bytes_from_ram = 0
        self.bytes_from_storage = 0

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What the files hold, as torch describes it."""
        chunks: dict[str, list[Part]] = {}
        for (name, _offsets), part in self._verified.parts.items():
            chunks.setdefault(name, []).append(part)
        return Metadata({name: _described(parts) for name, parts in chunks.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any) -> None:
        """Nothing: the parts are known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Name the files that this rank will read in the storage, where nobody has read them."""
        names = {self._part_of(item).file for item in plan.items}
        unknown = names - self._verified.copies.keys() - self._verified.stored
        return replace(plan, storage_data=sorted(unknown))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Have each of those files verified by one of the ranks that read it."""
        shares: list[list[str]] = [[] for _ in plans]
        for name in sorted({name for plan in plans for name in plan.storage_data}):
            readers = [rank for rank, plan in enumerate(plans) if name in plan.storage_data]
            shares[min(readers, key=lambda rank: len(shares[rank]))].append(name)
        return [replace(p, storage_data=s) for p, s in zip(plans, shares, strict=True)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Verify this rank's share, then fill the tensors."""
        _, errors = verify_stored(self._source, plan.storage_data)
        raise_first(errors)
        for item in plan.items:
            self._fill(planner.resolve_tensor(item).detach(), item)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, target: Tensor, item: ReadItem) -> None:
        """Copy the wanted box of a part; its rows are read whole, being contiguous in the file."""
        part = self._part_of(item)
        shape = part.shape or (1,)  # a scalar has no rows: one row of one value
        first, count = (item.storage_offsets[0], item.lengths[0]) if part.shape else (0, 1)
        rows = torch.empty((count, *shape[1:]), dtype=part.dtype)
        row_bytes = math.prod(shape[1:]) * part.dtype.itemsize
        self._read(part, first * row_bytes, rows.flatten().view(torch.uint8).numpy().data)
        for dim in range(1, len(part.shape)):
            rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        target.copy_(rows.view(target.shape) if not part.shape else rows)

    def _read(self, part: Part, start: int, into: memoryview) -> None:
        copy = self._verified.copies.get(part.file)
        read = self._source.stored(part.file) if copy is None else partial(read_into, copy)
        read(part.begin + start, into)
        if copy is None:
            self.bytes_from_storage += len(into)
        else:
            self.bytes_from_ram += len(into)

    def _part_of(self, item: ReadItem) -> Part:
        index = item.storage_index
        assert index.offset is not None, f"{index} has no offset"
        return self._verified.parts[index.fqn, tuple(index.offset)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Places are storages, not names."""
        return False


def unfit(parts: Parts, tensors: Mapping[str, Tensor]) -> list[str]:
    """Why a checkpoint with these parts cannot be loaded into the tensors; empty if it can."""
    held: dict[str, list[Part]] = {}
    for (name, _), part in parts.items():
        held.setdefault(name, []).append(part)
    faults = ((name, _misfit(held.get(name, []), tensor)) for name, tensor in tensors.items())
    return [f"{name} {fault}" for name, fault in faults if fault]


def _misfit(parts: list[Part], tensor: Tensor) -> str:
    """Parts are blocks of whole rows, since the first dimension alone is sharded."""
    if not parts:
        return "is in none of its files"
    whole, dtypes = tuple(tensor.shape), {part.dtype for part in parts}
    if dtypes != {tensor.dtype}:
        return f"is of {', '.join(sorted(map(str, dtypes)))}, not of {tensor.dtype}"
    row, num_rows, end = whole[1:], whole[0] if whole else 1, 0
    for part in sorted(parts, key=lambda part: part.offsets):
        begin = part.offsets[0] if whole and part.offsets else 0
        if len(part.shape) != len(whole) or part.shape[1:] != row or any(part.offsets[1:]):
            return f"has a part of shape {part.shape}, does not fit into {whole}"
        if begin > end:
            return f"lacks rows {end} to {begin}"
        end = max(end, begin + (part.shape[0] if whole else 1))
    if end > num_rows:
        return f"has shape {(end, *row)}, not {whole}"
    return f"lacks rows {end} to {num_rows}" if end < num_rows else ""


def _described(parts: list[Part]) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.shape)) for p in parts]
    ends = ([o + n for o, n in zip(p.offsets, p.shape, strict=True)] for p in parts)
    whole = torch.Size(max(dims) for dims in zip(*ends, strict=True))
    return TensorStorageMetadata(TensorProperties(dtype=parts[0].dtype), whole, chunks)
