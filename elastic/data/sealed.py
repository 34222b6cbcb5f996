"""The reading side of the latent store: byte ranges straight into the caller's buffers."""

# B sample, C channel, T frame, H, W latent grid, L text token, D text width, P pooled width

import json
import math
import os
import threading
from collections import OrderedDict
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
    TEXT_BLOCK,
    StoreSchema,
    array_digest,
    file_digest,
    load_schema,
    shard_file,
)
from elastic.data.shards import CHECKSUM_BYTES, Bytes, canonical_digest, chunk_name, crc32c
from elastic.errors import InputError
from models.text import TextEmbedding

_OPEN_FILES = 192
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

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: "np.dtype[_Item]") -> None:
        self._path, self._shape, self._dtype = path, shape, dtype
        self._file = _File(path)
        self._stride = dtype.itemsize * math.prod(shape[1:])

    def __len__(self) -> int:
        return self._shape[0]

    def between(self, first: int, end: int) -> NDArray[_Item]:
        """The values of slots in a row."""
        out = np.empty((end - first, *self._shape[1:]), self._dtype)
        if out.nbytes:
            self._read(out, first)
        return out

    def at(self, slots: NDArray[np.int64]) -> NDArray[_Item]:
        """The values of some slots; of many, by way of all."""
        if _MANY * len(slots) > len(self):
            count = math.prod(self._shape)
            return np.fromfile(self._path, self._dtype, count).reshape(self._shape)[slots]
        out = np.empty((len(slots), *self._shape[1:]), self._dtype)
        for number, slot in enumerate(slots.tolist()):
            self._read(out[number : number + 1], slot)
        return out

    def _read(self, out: NDArray[_Item], slot: int) -> None:
        if os.preadv(self._file.descriptor, [out.data], slot * self._stride) != out.nbytes:
            raise DamagedStore(
                f"{self._path} has been cut off since it was opened; encode the stage again"
            )


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

    def present_before(self, slot: int) -> int:
        """How many of the samples that are planned before a slot are present."""
        return slot - self._absent_before(slot)

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

    def __init__(self, root: Path, bucket: str, name: str, column: int, count: int) -> None:
        self.name, self.column = name, column
        path = str(shard_file(root, bucket, name, 0))
        self._start, _, self._end = path.rpartition("/c.0")
        # A bit for each sample; pages of it that are not written to take no memory.
        self._checked = np.zeros(-(-count // 8), np.uint8)

    def file(self, shard: int) -> str:
        """Where a shard of it lies."""
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


class SealedStore:
    """A finished store. Indices count the samples that are present, in the order of the plan.

    Where a sample lies follows from the sealed lengths, so no shard index is read. What is read for
    the first time is compared with its CRC: a process reads again what it has found whole. May be
    used by several threads.
    """

    def __init__(
        self,
        root: Path,
        schema: StoreSchema,
        digest: str,
        rows: dict[str, _Rows],
        null_text: TextEmbedding | None,
    ) -> None:
        self.digest = digest
        self.schema = schema
        self.null_text = null_text
        """What dropped text is replaced by, fp32; None in stores that were sealed without it."""
        self._root = root
        self._rows = rows
        self._files = _Files()
        self._shapes = {bucket.name: bucket.shape for bucket in schema.buckets}
        self._arrays = {
            bucket.name: {
                name: _Array(root, bucket.name, name, column, len(bucket.sample_ids))
                for column, name in enumerate(schema.arrays(bucket.name))
            }
            for bucket in schema.buckets
        }

    @classmethod
    def open(cls, root: str | Path, fingerprint: str, digest: str | None = None) -> Self:
        """Open the sealed store; InputError if it is another one than was asked for."""
        root = Path(root)
        if not (root / "zarr.json").exists():
            raise InputError(
                f"latents at {str(root)!r} are not sealed: zarr.json is missing; encode the stage"
            )
        found = json.loads((root / "zarr.json").read_text())["attributes"]
        for word, asked in (("fingerprint", fingerprint), ("digest", digest)):
            if asked is not None and found[word] != asked:
                raise InputError(
                    f"latents at {str(root)!r} have the {word} {found[word]}, the stage needs "
                    f"{asked}: another codec, other weights or other data made them; encode again"
                )
        sealed = json.loads((root / f"manifest-{found['digest']}.json").read_text())
        if canonical_digest(sealed) != found["digest"]:
            raise DamagedStore(
                f"{root}/manifest-{found['digest']}.json is not what its name says; "
                f"delete zarr.json there and encode again"
            )
        schema = load_schema(root)
        rows = {
            bucket.name: _load_rows(root, schema, bucket.name, sealed["arrays"][bucket.name])
            for bucket in schema.buckets
        }
        null_text = read_null_text(root, sealed["null_text"]) if "null_text" in sealed else None
        return cls(root, schema, found["digest"], rows, null_text)

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

    def read(self, bucket: str, index: int, out: Tensor) -> None:
        """Fill `out` (bf16 C,T,H,W, contiguous, on the CPU) with one latent."""
        self._fill_latent(bucket, self._place(bucket, index), out)

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
        texts = []
        for number, index in enumerate(indices):
            place = self._place(bucket, int(index))
            self._fill_latent(bucket, place, out[number])
            self._fill(bucket, "pooled", place, _bytes_of(pooled_BP[number]))
            texts.append(self._text(bucket, place))
            if given_BCTHW is not None:
                self._fill(bucket, "given", place, _bytes_of(given_BCTHW[number]))
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

    def _fill_latent(self, bucket: str, place: _Place, out: Tensor) -> None:
        shape = self._shapes[bucket]
        if out.dtype != torch.bfloat16 or tuple(out.shape) != shape or not out.is_contiguous():
            raise ValueError(
                f"bucket {bucket!r} fills a contiguous bfloat16 tensor {shape}, "
                f"got {out.dtype} {tuple(out.shape)}"
            )
        self._fill(bucket, "latent", place, _bytes_of(out))

    def _text(self, bucket: str, place: _Place) -> Tensor:
        blocks, length = self._rows[bucket].text(place)
        width = self.schema.text_width
        text_LD = torch.empty((-(-length // TEXT_BLOCK) * TEXT_BLOCK, width), dtype=torch.bfloat16)
        start = blocks * 2 * TEXT_BLOCK * width
        self._fill(bucket, "text", place, _bytes_of(text_LD), start)
        return text_LD[:length]

    def _fill(
        self, bucket: str, name: str, place: _Place, out: Bytes, start: int | None = None
    ) -> None:
        """Read the bytes of a sample; the first time, compare their CRC with the sealed one.

        All samples of an array but text take the same space; of text the start is given.
        """
        array = self._arrays[bucket][name]
        try:
            file = self._files.get(array.file(place.shard))
        except FileNotFoundError:
            raise self._damaged(bucket, name, place, "is gone with its shard") from None
        at = place.samples * out.nbytes if start is None else start
        got = 0
        while got < out.nbytes:
            step = os.preadv(file.descriptor, [out[got:].data], at + got)
            if step == 0:
                raise self._damaged(bucket, name, place, f"is cut off after {got} bytes")
            got += step
        if array.is_checked(place.slot):
            return
        found, sealed = crc32c(out), self._rows[bucket].crc(place, array.column)
        if found != sealed:
            what = f"has CRC {found:08x}, sealed was {sealed:08x}"
            raise self._damaged(bucket, name, place, what)
        array.check(place.slot)

    def _damaged(self, bucket: str, array: str, place: _Place, what: str) -> DamagedStore:
        path = self._arrays[bucket][array].file(place.shard)
        number = self._rows[bucket].id(place)
        return DamagedStore(
            f"{path}: {array} of sample {number} (bucket {bucket!r}) {what}; delete that file and "
            "encode the stage again: only this shard is redone"
        )


def read_null_text(root: Path, digest: str | None = None) -> TextEmbedding:
    """The text that stands for no text of a store; DamagedStore if it is another than `digest`."""
    path = root / NULL_TEXT
    data = path.read_bytes() if path.exists() else b""
    if not data or (digest and array_digest(np.frombuffer(data, np.uint8)) != digest):
        raise DamagedStore(
            f"{path} is not what was sealed; delete it and zarr.json there and encode again"
        )
    tensors = load(data)
    return TextEmbedding(tensors["text"].float(), tensors["pooled"].float())


class _File:
    """A descriptor that closes when its last reader lets go of it, in whatever thread."""

    def __init__(self, path: str | Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _Files:
    """The shard files that were used last, kept open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _File] = OrderedDict()

    def get(self, path: str) -> _File:
        with self._lock:
            file = self._open.get(path) or _File(path)
            self._open[path] = file
            self._open.move_to_end(path)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file


def _load_rows(root: Path, schema: StoreSchema, bucket: str, sealed: dict[str, str]) -> _Rows:
    count = len(schema.bucket(bucket).sample_ids)
    ids = _column(root, bucket, "sample_id", (count,), np.dtype("<i8"), sealed)
    lengths = _column(root, bucket, "text_length", (count,), np.dtype("<i4"), sealed)
    columns = (count, len(schema.arrays(bucket)))
    crcs = _column(root, bucket, "crc32c", columns, np.dtype("<u4"), sealed)
    return _Rows(ids, lengths, crcs, _absent(root, bucket, count), schema.samples_per_shard)


def _absent(root: Path, bucket: str, count: int) -> NDArray[np.int64]:
    """The slots without a sample."""
    path = root / bucket / "sample_id" / chunk_name(0, 1)
    found = [np.empty(0, np.int64)]
    for first in range(0, count, _SCAN):
        ids = np.fromfile(path, "<i8", count=min(_SCAN, count - first), offset=8 * first)
        found.append(first + np.flatnonzero(ids < 0))
    return np.concatenate(found)


def _column(
    root: Path,
    bucket: str,
    name: str,
    shape: tuple[int, ...],
    dtype: "np.dtype[_Item]",
    sealed: dict[str, str],
) -> _Column[_Item]:
    path = root / bucket / name / chunk_name(0, len(shape))
    if file_digest(path, without=CHECKSUM_BYTES) != sealed[name]:
        raise DamagedStore(
            f"{path} is not what was sealed; delete zarr.json in {root} and encode again"
        )
    return _Column(path, shape, dtype)


def _bytes_of(tensor: Tensor) -> Bytes:
    """The memory of a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()
