"""The reading side of the latent store: byte ranges straight into the caller's buffers."""

# B sample, C channel, T frame, H, W latent grid, L text token, D text width, P pooled width

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from elastic.data.schema import (
    NULL_TEXT,
    StoreSchema,
    array_digest,
    load_schema,
    shard_file,
)
from elastic.data.shards import Bytes, canonical_digest, chunk_name, crc32c
from elastic.errors import InputError
from models.text import TextEmbedding

_OPEN_FILES = 192
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


class _Rows(NamedTuple):
    """The present samples of a bucket: id, text length, CRCs, shard, and place in each file."""

    sample_id: NDArray[np.int64]
    length: NDArray[np.int64]
    crcs: NDArray[np.uint32]
    shard: NDArray[np.int64]
    start: dict[str, NDArray[np.int64]]


class SealedStore:
    """A finished store. Indices count the samples that are present, in the order of the plan.

    Where a sample lies follows from the sealed lengths, so no shard index is read. May be used
    by several threads.
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
        return len(self._rows[bucket].sample_id)

    def sample_ids(self, bucket: str) -> NDArray[np.int64]:
        """The id of each sample of the bucket."""
        return self._rows[bucket].sample_id

    def read(self, bucket: str, index: int, out: Tensor) -> None:
        """Fill `out` (bf16 C,T,H,W, contiguous, on the CPU) with one latent."""
        shape = self.schema.bucket(bucket).shape
        if out.dtype != torch.bfloat16 or tuple(out.shape) != shape or not out.is_contiguous():
            raise ValueError(
                f"bucket {bucket!r} fills a contiguous bfloat16 tensor {shape}, "
                f"got {out.dtype} {tuple(out.shape)}"
            )
        self._fill(bucket, "latent", index, _bytes_of(out))

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
        for place, index in enumerate(indices):
            self.read(bucket, int(index), out[place])
            self._fill(bucket, "pooled", int(index), _bytes_of(pooled_BP[place]))
            texts.append(self._text(bucket, int(index)))
            if given_BCTHW is not None:
                self._fill(bucket, "given", int(index), _bytes_of(given_BCTHW[place]))
        ids = rows.sample_id[np.asarray(indices, np.int64)]
        return LatentBatch(out, texts, pooled_BP, ids, given_BCTHW)

    def _text(self, bucket: str, index: int) -> Tensor:
        length = self._rows[bucket].length[index]
        stored = self.schema.sample_bytes(bucket, np.asarray([length]))["text"][0]
        text_LD = torch.empty(int(stored) // 2, dtype=torch.bfloat16)
        self._fill(bucket, "text", index, _bytes_of(text_LD))
        return text_LD.view(-1, self.schema.text_width)[:length]

    def _fill(self, bucket: str, array: str, index: int, out: Bytes) -> None:
        """Read the bytes of a sample and compare their CRC with the sealed one."""
        rows = self._rows[bucket]
        if not 0 <= index < len(rows.sample_id):
            raise IndexError(f"bucket {bucket!r} has {len(rows.sample_id)} samples, not {index}")
        path = shard_file(self._root, bucket, array, int(rows.shard[index]))
        what = f"{path}: {array} of sample {rows.sample_id[index]} (bucket {bucket!r}, {index})"
        remedy = "delete that file and encode the stage again: only this shard is redone"
        try:
            file = self._files.get(path)
        except FileNotFoundError:
            raise DamagedStore(f"{what} is gone with its shard; {remedy}") from None
        got, start = 0, int(rows.start[array][index])
        while got < out.nbytes:
            step = os.preadv(file.descriptor, [out[got:].data], start + got)
            if step == 0:
                raise DamagedStore(f"{what} is cut off after {got} bytes; {remedy}")
            got += step
        column = self.schema.arrays(bucket).index(array)
        found, sealed = crc32c(out), int(rows.crcs[index, column])
        if found != sealed:
            raise DamagedStore(f"{what} has CRC {found:08x}, sealed was {sealed:08x}; {remedy}")


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

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _Files:
    """The shard files that were used last, kept open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _File] = OrderedDict()

    def get(self, path: Path) -> _File:
        with self._lock:
            file = self._open.get(path) or _File(path)
            self._open[path] = file
            self._open.move_to_end(path)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file


def _load_rows(root: Path, schema: StoreSchema, bucket: str, sealed: dict[str, str]) -> _Rows:
    count = len(schema.bucket(bucket).sample_ids)
    ids = _load(root, bucket, "sample_id", np.zeros(count, "<i8"), sealed)
    lengths = _load(root, bucket, "text_length", np.zeros(count, "<i4"), sealed).astype(np.int64)
    num_arrays = len(schema.arrays(bucket))
    crcs = _load(root, bucket, "crc32c", np.zeros((count, num_arrays), "<u4"), sealed)
    here = ids >= 0
    shard = np.arange(count)[here] // schema.samples_per_shard
    # The first present sample of each shard: what lies before it lies in other files.
    first = np.searchsorted(shard, shard)
    start = {}
    for array, sizes in schema.sample_bytes(bucket, lengths[here]).items():
        before = np.cumsum(sizes) - sizes
        start[array] = before - before[first]
    return _Rows(ids[here], lengths[here], crcs[here], shard, start)


def _load(
    root: Path, bucket: str, name: str, like: NDArray[_Item], sealed: dict[str, str]
) -> NDArray[_Item]:
    path = root / bucket / name / chunk_name(0, like.ndim)
    data = np.fromfile(path, like.dtype, count=like.size) if path.exists() else like[:0]
    if data.size != like.size or array_digest(data) != sealed[name]:
        raise DamagedStore(
            f"{path} is not what was sealed; delete zarr.json in {root} and encode again"
        )
    return data.reshape(like.shape)


def _bytes_of(tensor: Tensor) -> Bytes:
    """The memory of a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()
