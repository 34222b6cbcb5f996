"""How a rank's part of a state is written: one safetensors file, hashed while it is written.

The files are those of torch.distributed.checkpoint's own safetensors storage, which can read them.
Its writer is not used because it builds the whole file in memory, holds the interpreter for that
long, and leaves the SHA-256 to a second reading.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from elastic.checkpoint_manifest import FileEntry
from elastic.checkpoint_ram import RamCopies
from elastic.checkpoint_store import Draft, Sink, Storage
from elastic.ema import local

# The words of the format; a checkpoint holds whatever dtypes a critic's buffers have.
WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names: where each part begins
_PIECE = 8 * 2**20  # bytes hashed and written at once: large enough to leave the interpreter alone


class Place(NamedTuple):
    """Where a draft is written to: the storage, and the memory of the node if it keeps copies."""

    storage: Storage
    draft: Draft
    ram: RamCopies | None


class Snapshot:
    """This rank's parts of a state as they were at one moment, in memory that is kept for the next.

    The memory is the cost of a short stall: new memory has to be cleared by the kernel first, which
    takes longer than the copy. It is held from the first save for as long as the process lives, and
    pinned where the state is on a GPU. Bytes: those of the rank's part (`plan` names them).
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the rank's parts by name, good until the next call."""
        parts = {name: local(tensor) for name, tensor in tensors.items()}
        for name, part in parts.items():
            held = self._held.get(name)
            if held is None or (held.shape, held.dtype) != (part.shape, part.dtype):
                self._held[name] = torch.empty(
                    part.shape, dtype=part.dtype, pin_memory=part.is_cuda
                )
        taken = {name: self._held[name] for name in parts}
        torch._foreach_copy_(list(taken.values()), list(parts.values()), non_blocking=True)
        if any(part.is_cuda for part in parts.values()):
            torch.cuda.current_stream().synchronize()
        return taken


class CheckpointWriter(StorageWriter):
    """Writes the draft of a checkpoint for `dcp.save`.

    `begin` and `publish` are called on the first rank alone, before any rank writes and after all
    have. Both may raise: torch tells every rank, and nobody goes on.
    """

    def __init__(
        self,
        place: Place,
        parts: Mapping[str, Tensor],  # this rank's, on any device, unchanged until the save is done
        begin: Callable[[int], None],  # gets the bytes of the largest file
        publish: Callable[[dict[str, FileEntry]], None],
    ) -> None:
        self._place = place
        self._parts = parts
        self._begin = begin
        self._publish = publish

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing: the coordinator begins when it has every rank's plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As torch plans it."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the files; in a world larger than a tensor has rows some ranks write none."""
        self._begin(max(map(_bytes_of, plans)))
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        done: Future[list[WriteResult]] = Future()
        results = []
        if plan.items:
            name = self._place.storage.file_name(self._place.draft, plan.storage_data)
            entry = write_file(self._place, name, self._tensors_of(plan.items))
            results = [WriteResult(MetadataIndex(name), entry.num_bytes, entry)]
        done.set_result(results)
        return done

    def _tensors_of(self, items: list[WriteItem]) -> dict[str, tuple[Tensor, list[int]]]:
        """The tensors of a file, and where in the whole tensor each begins."""
        tensors = {}
        for item in items:
            name, part, data = item.index.fqn, self._parts[item.index.fqn], item.tensor_data
            assert data is not None, f"{name} is no tensor"
            assert data.chunk.sizes == part.shape, f"{name}: {data.chunk.sizes} of {part.shape}"
            tensors[name] = (part, list(data.chunk.offsets))
        return tensors

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Every rank's file is there and flushed: publish. Called on the first rank alone."""
        written = [result for share in results for result in share]
        self._publish({str(r.index.fqn): r.storage_data for r in written})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Places are storages, not names."""
        return False


def write_file(
    place: Place, name: str, tensors: Mapping[str, tuple[Tensor, list[int]]]
) -> FileEntry:
    """Write tensors, each with its offsets in the whole, as one file that survives a power cut."""
    header = _header(tensors)
    num_bytes = len(header) + sum(tensor.nbytes for tensor, _ in tensors.values())
    storage, draft, ram = place
    digest = hashlib.sha256()
    with ExitStack() as stack:
        sinks: list[Sink] = [stack.enter_context(storage.create(draft, name))]
        if ram is not None:
            copy = stack.enter_context(ram.create(draft.position, name, num_bytes))
            sinks += [] if copy is None else [copy]
        for piece in _pieces(header, tensors):
            digest.update(piece)
            for sink in sinks:
                sink.write(piece)
    return FileEntry(num_bytes, digest.hexdigest())


def _bytes_of(plan: SavePlan) -> int:
    data = (item.tensor_data for item in plan.items)
    return sum(math.prod(d.chunk.sizes) * d.properties.dtype.itemsize for d in data if d)


def _header(tensors: Mapping[str, tuple[Tensor, list[int]]]) -> bytes:
    offsets = {name: {OFFSETS: where} for name, (_, where) in tensors.items()}
    header: dict[str, Any] = {
        "__metadata__": {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    }
    end = 0
    for name, (tensor, _) in tensors.items():
        begin, end = end, end + tensor.nbytes
        word, shape = WORDS[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(header: bytes, tensors: Mapping[str, tuple[Tensor, list[int]]]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor, _ in tensors.values():
        flat = tensor.detach().cpu().contiguous().flatten()
        data = flat.view(torch.uint8).numpy().data
        for begin in range(0, len(data), _PIECE):
            yield data[begin : begin + _PIECE]
