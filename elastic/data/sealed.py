"""The reading side of the latent store: byte ranges straight into the caller's buffers."""

# B sample, C channel, T frame, H, W latent grid, L text token, D text width, P pooled width

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

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
from elastic.data.shards import CHECKSUM_BYTES, Bytes, canonical_digest, chunk_name, crc32c
from elastic.data.store_folder import OpenFile, Span, StoreFolder, folder_at
from elastic.errors import InputError
from models.text import TextEmbedding

_SCAN = 2**20  # ids looked at at once
_MANY = 16  # one in so many of all: then all are read at once
_Item = TypeVar("_Item", bound=np.generic)


class DamagedStore(Exception):
    """Data on the disk is not what was committed; the message names the file and the sample."""


class LatentBatch(NamedTuple):
    """Latents B,C,T,H,W, texts L,D of their true lengths, pooled B,P, all bf16; ids int64 B.

    `given_BCTHW` are the stills B,C,2,H,W of the first and last frames, where the store has them.
    """

    latents_BCTHW: Tensor
    texts_LD: list[Tensor]
    pooled_BP: Tensor
    sample_ids: NDArray[np.int64]
    given_BCTHW: Tensor | None = None


class _Place(NamedTuple):
    """Where a present sample lies: its slot in the plan, its shard, and what is before it there."""

    slot: int
    shard: int
    samples: int  # present ones before it in the shard


class _Column(Generic[_Item]):
    """An array of a few values for each planned sample, read where it is asked for.

    Not mapped: pages of a mapping stay in the process until nearly all of the file does.
    """

    def __init__(
        self, file: OpenFile, where: str, shape: tuple[int, ...], dtype: "np.dtype[_Item]"
    ) -> None:
        self._file, self._where, self._dtype = file, where, dtype
        self._count, self._each = shape[0], shape[1:]
        self._items = math.prod(self._each)

    def __len__(self) -> int:
        return self._count

    def between(self, first: int, end: int) -> NDArray[_Item]:
        """The values of slots in a row."""
        found = self._file.array(self._dtype, (end - first) * self._items, first * self._items)
        if len(found) != (end - first) * self._items:
            raise DamagedStore(
                f"{self._where} has been cut off since it was opened; encode the stage again"
            )
        return found.reshape(end - first, *self._each)

    def at(self, slots: NDArray[np.int64]) -> NDArray[_Item]:
        """The values of some slots; of many, by way of all."""
        if _MANY * len(slots) > len(self):
            return self.between(0, len(self))[slots]
        out = np.empty((len(slots), *self._each), self._dtype)
        for number, slot in enumerate(slots.tolist()):
            out[number] = self.between(slot, slot + 1)[0]
        return out


class _Rows:
    """What was sealed of each planned sample of a bucket, left in its files; 10^9 take no memory.

    Absent samples are the exception, so their slots alone are kept.
    """

    def __init__(
        self,
        sample_id: _Column[np.int64],
        length: _Column[np.int32],
        crcs: _Column[np.uint32],
        absent_M: NDArray[np.int64],
        per_shard: int,
    ) -> None:
        self._sample_id, self._length, self._crcs = sample_id, length, crcs
        self._absent_M, self._per_shard = absent_M, per_shard
        # How many present samples come before each absent one.
        self._present_M = absent_M - np.arange(len(absent_M))

    def __len__(self) -> int:
        return len(self._sample_id) - len(self._absent_M)

    def ids(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of present samples."""
        return self._sample_id.at(self._slots(indices)).astype(np.int64, copy=False)

    def place(self, index: int) -> _Place:
        """Where a present sample lies."""
        if len(self._absent_M):
            slot = index + int(np.searchsorted(self._present_M, index, side="right"))
        else:
            slot = index
        shard = slot // self._per_shard
        first = shard * self._per_shard
        return _Place(slot, shard, index - first + self._absent_before(first))

    def _absent_before(self, slot: int) -> int:
        return int(np.searchsorted(self._absent_M, slot)) if len(self._absent_M) else 0

    def text(self, place: _Place) -> tuple[int, int]:
        """Blocks of text before a sample's in its shard, and its own text tokens."""
        lengths = self._length.between(place.shard * self._per_shard, place.slot + 1)
        return int((-(-lengths[:-1] // TEXT_BLOCK)).sum()), int(lengths[-1])

    def crc(self, place: _Place, column: int) -> int:
        """The CRC of a sample's part in an array."""
        return int(self._crcs.between(place.slot, place.slot + 1)[0, column])

    def id(self, place: _Place) -> int:
        """The id of a sample."""
        return int(self._sample_id.between(place.slot, place.slot + 1)[0])

    def _slots(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices + np.searchsorted(self._present_M, indices, side="right")


class _Array:
    """An array of a bucket: where its shards lie, and which samples' bytes have been checked."""

    def __init__(self, bucket: str, name: str, column: int, count: int) -> None:
        self.name, self.column = name, column
        path = shard_file(bucket, name, 0)
        self._start, _, self._end = path.rpartition("/c.0")
        # A bit for each sample; pages of it that are not written to take no memory.
        self._checked = np.zeros(-(-count // 8), np.uint8)

    def file(self, shard: int) -> str:
        """The name of a shard of it."""
        return f"{self._start}/c.{shard}{self._end}"

    def forget(self) -> None:
        """Nothing has been checked."""
        self._checked[:] = 0

    def is_checked(self, slot: int) -> bool:
        """Whether the bytes of a sample were found to be those that were sealed."""
        return bool(self._checked[slot >> 3] >> (slot & 7) & 1)

    def check(self, slot: int) -> None:
        """Note that they were. Of two threads at once one may be forgotten: it is checked again."""
        self._checked[slot >> 3] |= 1 << (slot & 7)


class _Wanted(NamedTuple):
    """A sample's part in an array, and where it is read from and to."""

    bucket: str
    array: _Array
    place: _Place
    span: Span


class SealedStore:
    """A finished store. Indices count the samples that are present, in the order of the plan.

    Where a sample lies follows from the sealed lengths, so no shard index is read. What is read for
    the first time is compared with its CRC: a process reads again what it has found whole. May be
    used by several threads.
    """

    def __init__(
        self,
        folder: StoreFolder,
        schema: StoreSchema,
        digest: str,
        rows: dict[str, _Rows],
        null_text: TextEmbedding | None,
    ) -> None:
        self.digest = digest
        self.schema = schema
        self.null_text = null_text
        """What dropped text is replaced by, fp32; None in stores that were sealed without it."""
        self._folder = folder
        self._rows = rows
        self._shapes = {bucket.name: bucket.shape for bucket in schema.buckets}
        self._arrays = {
            bucket.name: {
                name: _Array(bucket.name, name, column, len(bucket.sample_ids))
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
        schema = load_schema(folder)
        rows = {
            bucket.name: _load_rows(folder, schema, bucket.name, sealed["arrays"][bucket.name])
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

    def sample_ids(
        self, bucket: str, indices: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The ids of some samples of the bucket, or of all."""
        rows = self._rows[bucket]
        return rows.ids(np.arange(len(rows)) if indices is None else np.asarray(indices, np.int64))

    def read(self, bucket: str, index: int, out: Tensor) -> None:
        """Fill `out` (bf16 C,T,H,W, contiguous, on the CPU) with one latent."""
        self._fill([self._latent(bucket, self._place(bucket, index), out)])

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
        texts, wanted = [], []
        for number, index in enumerate(indices):
            place = self._place(bucket, int(index))
            text_LD, text = self._text(bucket, place)
            texts.append(text_LD)
            wanted += [self._latent(bucket, place, out[number]), text]
            wanted.append(self._part(bucket, "pooled", place, pooled_BP[number]))
            if given_BCTHW is not None:
                wanted.append(self._part(bucket, "given", place, given_BCTHW[number]))
        self._fill(wanted)
        ids = rows.ids(np.asarray(indices, np.int64))
        return LatentBatch(out, texts, pooled_BP, ids, given_BCTHW)

    def forget_checks(self) -> None:
        """Compare everything again when it is read next."""
        for arrays in self._arrays.values():
            for array in arrays.values():
                array.forget()

    def _place(self, bucket: str, index: int) -> _Place:
        rows = self._rows[bucket]
        if not 0 <= index < len(rows):
            raise IndexError(f"bucket {bucket!r} has {len(rows)} samples, not {index}")
        return rows.place(index)

    def _latent(self, bucket: str, place: _Place, out: Tensor) -> _Wanted:
        shape = self._shapes[bucket]
        if out.dtype != torch.bfloat16 or tuple(out.shape) != shape or not out.is_contiguous():
            raise ValueError(
                f"bucket {bucket!r} fills a contiguous bfloat16 tensor {shape}, "
                f"got {out.dtype} {tuple(out.shape)}"
            )
        return self._part(bucket, "latent", place, out)

    def _text(self, bucket: str, place: _Place) -> tuple[Tensor, _Wanted]:
        """The text of a sample, and what is to be read into it."""
        blocks, length = self._rows[bucket].text(place)
        width = self.schema.text_width
        text_LD = torch.empty((-(-length // TEXT_BLOCK) * TEXT_BLOCK, width), dtype=torch.bfloat16)
        start = blocks * 2 * TEXT_BLOCK * width
        return text_LD[:length], self._part(bucket, "text", place, text_LD, start)

    def _part(
        self, bucket: str, name: str, place: _Place, tensor: Tensor, start: int | None = None
    ) -> _Wanted:
        """All samples of an array but text take the same space; of text the start is given."""
        array, out = self._arrays[bucket][name], _bytes_of(tensor)
        at = place.samples * out.nbytes if start is None else start
        return _Wanted(bucket, array, place, Span(array.file(place.shard), at, out))

    def _fill(self, wanted: Sequence[_Wanted]) -> None:
        """Read the bytes of samples; the first time, compare their CRCs with the sealed ones."""
        faults = self._folder.fill([part.span for part in wanted])
        if faults:
            number, what = next(iter(faults.items()))
            raise self._damaged(wanted[number], what)
        for part in wanted:
            bucket, array, place, span = part
            if array.is_checked(place.slot):
                continue
            found, sealed = crc32c(span.out), self._rows[bucket].crc(place, array.column)
            if found != sealed:
                raise self._damaged(part, f"has CRC {found:08x}, sealed was {sealed:08x}")
            array.check(place.slot)

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


def _load_rows(
    folder: StoreFolder, schema: StoreSchema, bucket: str, sealed: dict[str, str]
) -> _Rows:
    count = len(schema.bucket(bucket).sample_ids)
    ids = _column(folder, bucket, "sample_id", (count,), np.dtype("<i8"), sealed)
    lengths = _column(folder, bucket, "text_length", (count,), np.dtype("<i4"), sealed)
    columns = (count, len(schema.arrays(bucket)))
    crcs = _column(folder, bucket, "crc32c", columns, np.dtype("<u4"), sealed)
    return _Rows(ids, lengths, crcs, _absent(ids), schema.samples_per_shard)


def _absent(ids: _Column[np.int64]) -> NDArray[np.int64]:
    """The slots without a sample."""
    found = [np.empty(0, np.int64)]
    for first in range(0, len(ids), _SCAN):
        here = ids.between(first, min(first + _SCAN, len(ids)))
        found.append(first + np.flatnonzero(here < 0))
    return np.concatenate(found)


def _column(
    folder: StoreFolder,
    bucket: str,
    name: str,
    shape: tuple[int, ...],
    dtype: "np.dtype[_Item]",
    sealed: dict[str, str],
) -> _Column[_Item]:
    path = f"{bucket}/{name}/{chunk_name(0, len(shape))}"
    file = folder.kept(path, sealed[name], without=CHECKSUM_BYTES)
    if file is None:
        raise DamagedStore(
            f"{folder.where}/{path} is not what was sealed; delete {SEAL} there and encode again"
        )
    return _Column(file, f"{folder.where}/{path}", shape, dtype)


def _bytes_of(tensor: Tensor) -> Bytes:
    """The memory of a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()
