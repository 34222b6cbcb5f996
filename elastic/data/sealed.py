"""The reading side of the latent store: byte ranges straight into the caller's buffers."""

# B sample, C channel, T frame, H, W latent grid, L text token, D text width, P pooled width

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from elastic.data.packing import DamagedIndex, Layout, unpack
from elastic.data.rows import DamagedStore, Place, Rows, load_rows
from elastic.data.schema import (
    NULL_TEXT,
    SEAL,
    TEXT_BLOCK,
    StoreSchema,
    array_digest,
    load_schema,
    sealed_file,
    shard_file,
)
from elastic.data.shards import Bytes, canonical_digest, crc32c
from elastic.data.store_folder import Span, StoreFolder, folder_at
from elastic.errors import InputError
from models.text import TextEmbedding

_INDEXES = 1024  # of shards, each some kB


class LatentBatch(NamedTuple):
    """Latents B,C,T,H,W, texts L,D of their true lengths, pooled B,P, all bf16; ids int64 B.

    `given_BCTHW` are the stills B,C,2,H,W of the first and last frames, where the store has them.
    """

    latents_BCTHW: Tensor
    texts_LD: list[Tensor]
    pooled_BP: Tensor
    sample_ids: NDArray[np.int64]
    given_BCTHW: Tensor | None = None


class _Array:
    """An array of a bucket: where its shards lie, and which samples' bytes have been checked."""

    def __init__(self, bucket: str, name: str, column: int, count: int, layout: Layout) -> None:
        self.name, self.column, self.layout = name, column, layout
        path = shard_file(bucket, name, 0)
        self._start, _, self._end = path.rpartition("/c.0")
        # A bit for each sample; pages of it that are not written to take no memory.
        self._checked = np.zeros(-(-count // 8), np.uint8)

    def file(self, shard: int) -> str:
        """The name of a shard of it."""
        return f"{self._start}/c.{shard}{self._end}"

    def index_of(self, shard: int) -> Span:
        """The index of a shard of it, to be read."""
        size = self.layout.index_bytes
        return Span(self.file(shard), -size, np.empty(size, np.uint8))

    def forget(self) -> None:
        """Nothing has been checked."""
        self._checked[:] = 0

    def is_checked(self, slot: int) -> bool:
        """Whether the bytes of a sample were found to be those that were sealed."""
        return bool(self._checked[slot >> 3] >> (slot & 7) & 1)

    def check(self, slot: int) -> None:
        """Note that they were. Of two threads at once one may be forgotten: it is checked again."""
        self._checked[slot >> 3] |= 1 << (slot & 7)


class _Unpacked(NamedTuple):
    """Stored sizes of the chunks of a sample, and what they are unpacked to."""

    sizes: list[int]
    out: Bytes


_Indexes = dict[str, NDArray[np.int64]]
"""Where the chunks of each sample of a shard lie, and how long they are, by the shard's file."""


class _Cache:
    """The indexes of the packed shards that were used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[str, NDArray[np.int64]] = OrderedDict()

    def get(self, files: Iterable[str]) -> _Indexes:
        with self._lock:
            return {file: self._found[file] for file in files if file in self._found}

    def put(self, indexes: _Indexes) -> None:
        with self._lock:
            for file, index in indexes.items():
                self._found[file] = index
                self._found.move_to_end(file)
            while len(self._found) > _INDEXES:
                self._found.popitem(last=False)


class _Wanted(NamedTuple):
    """A sample's part in an array, and where it is read from and to."""

    bucket: str
    array: _Array
    place: Place
    span: Span
    unpacked: _Unpacked | None = None


class SealedStore:
    """A finished store. Indices count the samples that are present, in the order of the plan.

    Where a sample lies follows from the sealed lengths; the index of a shard is read only where the
    store is packed. What is read for the first time is compared with its CRC: a process reads again
    what it has found whole. May be used by several threads.
    """

    def __init__(
        self,
        folder: StoreFolder,
        schema: StoreSchema,
        digest: str,
        rows: dict[str, Rows],
        null_text: TextEmbedding | None,
    ) -> None:
        self.digest = digest
        self.schema = schema
        self.null_text = null_text
        """What dropped text is replaced by, fp32; None in stores that were sealed without it."""
        self._folder = folder
        self._rows = rows
        self._cache = _Cache()
        self._shapes = {bucket.name: bucket.shape for bucket in schema.buckets}
        self._arrays = {
            bucket.name: {
                name: _Array(
                    bucket.name,
                    name,
                    column,
                    len(bucket.sample_ids),
                    schema.layout(bucket.name, name),
                )
                for column, name in enumerate(schema.arrays(bucket.name))
            }
            for bucket in schema.buckets
        }

    @classmethod
    def open(cls, root: str | Path, fingerprint: str, digest: str | None = None) -> Self:
        """Open the sealed store; InputError if it is another one than was asked for."""
        folder = folder_at(root)
        try:
            attributes = json.loads(folder.read(SEAL))["attributes"]
        except FileNotFoundError:
            raise InputError(
                f"latents at {folder.where!r} are not sealed: {SEAL} is missing; encode the stage"
            ) from None
        for word, asked in (("fingerprint", fingerprint), ("digest", digest)):
            if asked is not None and attributes[word] != asked:
                raise InputError(
                    f"latents at {folder.where!r} have the {word} {attributes[word]}, the stage "
                    f"needs {asked}: another codec, other weights or other data made them; encode "
                    "again"
                )
        sealed_as = sealed_file(attributes["digest"])
        sealed = json.loads(folder.read(sealed_as))
        if canonical_digest(sealed) != attributes["digest"]:
            raise DamagedStore(
                f"{folder.where}/{sealed_as} is not what its name says; delete {SEAL} there and "
                "encode again"
            )
        schema = load_schema(folder, sealed)
        rows = {
            bucket.name: load_rows(folder, schema, bucket.name, sealed["arrays"][bucket.name])
            for bucket in schema.buckets
        }
        null_text = read_null_text(folder, sealed["null_text"]) if "null_text" in sealed else None
        return cls(folder, schema, attributes["digest"], rows, null_text)

    @property
    def reads_at_once(self) -> int:
        """How many threads it pays to read with."""
        return self._folder.reads_at_once

    def count(self, bucket: str) -> int:
        """How many samples the bucket has."""
        return len(self._rows[bucket])

    def present_before(self, bucket: str, slot: int) -> int:
        """How many of the samples that are planned before a slot of the bucket are present."""
        return self._rows[bucket].present_before(slot)

    def sample_ids(
        self, bucket: str, indices: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The ids of some samples of the bucket, or of all."""
        rows = self._rows[bucket]
        return rows.ids(np.arange(len(rows)) if indices is None else np.asarray(indices, np.int64))

    def text_lengths(self, bucket: str, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Text tokens of some samples of the bucket."""
        return self._rows[bucket].text_lengths(np.asarray(indices, np.int64))

    def read(self, bucket: str, index: int, out: Tensor) -> None:
        """Fill `out` (bf16 C,T,H,W, contiguous, on the CPU) with one latent."""
        place = self._place(bucket, index)
        self._fill([self._latent(bucket, place, out, self._indexes_of(bucket, [place]))])

    def read_batch(
        self, bucket: str, indices: Sequence[int] | NDArray[np.int64], out: Tensor | None = None
    ) -> LatentBatch:
        """Read some samples; latents go into `out` (bf16 B,C,T,H,W) if it is given."""
        rows, shape = self._rows[bucket], self.schema.bucket(bucket).shape
        if out is None:
            out = torch.empty((len(indices), *shape), dtype=torch.bfloat16)
        if len(out) != len(indices):
            raise ValueError(f"{len(indices)} samples do not fill a buffer of {len(out)}")
        pooled_BP = torch.empty((len(indices), self.schema.pooled_width), dtype=torch.bfloat16)
        given = self.schema.bucket(bucket).given
        given_BCTHW = torch.empty((len(indices), *given), dtype=torch.bfloat16) if given else None
        places = [self._place(bucket, int(index)) for index in indices]
        indexes = self._indexes_of(bucket, places)
        texts, wanted = [], []
        for number, place in enumerate(places):
            text_LD, text = self._text(bucket, place, indexes)
            texts.append(text_LD)
            wanted += [self._latent(bucket, place, out[number], indexes), text]
            wanted.append(self._part(bucket, "pooled", place, pooled_BP[number], indexes))
            if given_BCTHW is not None:
                wanted.append(self._part(bucket, "given", place, given_BCTHW[number], indexes))
        self._fill(wanted)
        ids = rows.ids(np.asarray(indices, np.int64))
        return LatentBatch(out, texts, pooled_BP, ids, given_BCTHW)

    def forget_checks(self) -> None:
        """Compare everything again when it is read next."""
        for arrays in self._arrays.values():
            for array in arrays.values():
                array.forget()

    def _place(self, bucket: str, index: int) -> Place:
        rows = self._rows[bucket]
        if not 0 <= index < len(rows):
            raise IndexError(f"bucket {bucket!r} has {len(rows)} samples, not {index}")
        return rows.place(index)

    def _latent(self, bucket: str, place: Place, out: Tensor, indexes: _Indexes) -> _Wanted:
        shape = self._shapes[bucket]
        if out.dtype != torch.bfloat16 or tuple(out.shape) != shape or not out.is_contiguous():
            raise ValueError(
                f"bucket {bucket!r} fills a contiguous bfloat16 tensor {shape}, "
                f"got {out.dtype} {tuple(out.shape)}"
            )
        return self._part(bucket, "latent", place, out, indexes)

    def _text(self, bucket: str, place: Place, indexes: _Indexes) -> tuple[Tensor, _Wanted]:
        """The text of a sample, and what is to be read into it."""
        blocks, length = self._rows[bucket].text(place)
        width = self.schema.text_width
        text_LD = torch.empty((-(-length // TEXT_BLOCK) * TEXT_BLOCK, width), dtype=torch.bfloat16)
        start = blocks * 2 * TEXT_BLOCK * width
        return text_LD[:length], self._part(bucket, "text", place, text_LD, indexes, start)

    def _part(
        self,
        bucket: str,
        name: str,
        place: Place,
        tensor: Tensor,
        indexes: _Indexes,
        start: int | None = None,
    ) -> _Wanted:
        """All samples of an array but text take the same space; of text the start is given."""
        array, out = self._arrays[bucket][name], _bytes_of(tensor)
        file = array.file(place.shard)
        if not self.schema.packed:
            at = place.samples * out.nbytes if start is None else start
            return _Wanted(bucket, array, place, Span(file, at, out))
        index = indexes[file][place.slot % self.schema.samples_per_shard]
        chunks = index[: out.nbytes // array.layout.chunk_bytes]
        at, size = (int(chunks[0, 0]), int(chunks[:, 1].sum())) if len(chunks) else (0, 0)
        stored = np.empty(size, np.uint8)
        unpacked = _Unpacked(chunks[:, 1].tolist(), out)
        return _Wanted(bucket, array, place, Span(file, at, stored), unpacked)

    def _indexes_of(self, bucket: str, places: Sequence[Place]) -> _Indexes:
        """Of packed samples the indexes of their shards; those not at hand are read at once."""
        if not self.schema.packed:
            return {}
        arrays = self._arrays[bucket].values()
        files = {array.file(place.shard): (array, place) for place in places for array in arrays}
        found = self._cache.get(files)
        missing = [
            _Wanted(bucket, array, place, array.index_of(place.shard))
            for file, (array, place) in files.items()
            if file not in found
        ]
        self._read(missing)
        for part in missing:
            try:
                found[part.span.name] = part.array.layout.read_index(part.span.out)
            except DamagedIndex:
                raise self._damaged(part, "has a damaged index") from None
        self._cache.put(found)
        return found

    def _fill(self, wanted: Sequence[_Wanted]) -> None:
        """Read the bytes of samples; the first time, compare their CRCs with the sealed ones."""
        self._read(wanted)
        for part in wanted:
            bucket, array, place, span, unpacked = part
            if not array.is_checked(place.slot):
                found, sealed = crc32c(span.out), self._rows[bucket].crc(place, array.column)
                if found != sealed:
                    raise self._damaged(part, f"has CRC {found:08x}, sealed was {sealed:08x}")
                array.check(place.slot)
            if unpacked is None:
                continue
            try:
                unpack(span.out, *unpacked)
            except ValueError as error:
                raise self._damaged(part, str(error)) from None

    def _read(self, wanted: Sequence[_Wanted]) -> None:
        faults = self._folder.fill([part.span for part in wanted])
        if faults:
            number, what = next(iter(faults.items()))
            raise self._damaged(wanted[number], what)

    def _damaged(self, part: _Wanted, what: str) -> DamagedStore:
        number = self._rows[part.bucket].id(part.place)
        return DamagedStore(
            f"{self._folder.where}/{part.span.name}: {part.array.name} of sample {number} (bucket "
            f"{part.bucket!r}) {what}; delete that file and encode the stage again: only this "
            "shard is redone"
        )


def read_null_text(folder: StoreFolder, digest: str | None = None) -> TextEmbedding:
    """The text that stands for no text of a store; DamagedStore if it is another than `digest`."""
    try:
        data = folder.read(NULL_TEXT)
    except FileNotFoundError:
        data = b""
    if not data or (digest and array_digest(np.frombuffer(data, np.uint8)) != digest):
        raise DamagedStore(
            f"{folder.where}/{NULL_TEXT} is not what was sealed; delete it and {SEAL} there and "
            "encode again"
        )
    tensors = load(data)
    return TextEmbedding(tensors["text"].float(), tensors["pooled"].float())


def _bytes_of(tensor: Tensor) -> Bytes:
    """The memory of a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()
