"""The latent store: written shard by shard by many processes, then sealed to a digest.

A standard zarr v3 group for each bucket, with these arrays over its N planned samples:
`latent` [N,C,T,H,W] and `text` [N,L,D] and `pooled` [N,P], bf16 kept as uint16, in shards of
`samples_per_shard`; `sample_id` [N], -1 for an absent sample; `text_length` [N]; `crc32c`, one for
each of these arrays. Where frames are given in training, `given` [N,C,2,H,W] holds their stills.
Text is ragged on the disk: chunks of 8 tokens, those beyond a sample's length are absent.
"""

# B sample, C channel, T frame, H, W latent grid, L text token, D text width, P pooled width

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from elastic.data import manifest
from elastic.data.manifest import Commit, ShardId
from elastic.data.packing import CODEC, DamagedIndex
from elastic.data.rows import DamagedStore
from elastic.data.schema import (
    AXES,
    NULL_TEXT,
    PLAN,
    SEAL,
    BucketPlan,
    StoreSchema,
    array_digest,
    fingerprint,
    load_schema,
    plan_json,
    save_plan,
    sealed_file,
    shard_file,
)
from elastic.data.sealed import LatentBatch, SealedStore
from elastic.data.shards import (
    Bytes,
    canonical_digest,
    chunk_name,
    crc32c,
    group_json,
    json_bytes,
    plain_bytes,
    plain_json,
    sharded_json,
)
from elastic.data.store_folder import StoreFolder, folder_at
from elastic.errors import InputError
from models.text import TextEmbedding

__all__ = [
    "Absent",
    "BucketPlan",
    "DamagedStore",
    "Fault",
    "LatentBatch",
    "LatentStore",
    "Sample",
    "SealedStore",
    "ShardId",
    "StoreSchema",
    "fingerprint",
]

PER_SAMPLE = {"sample_id": "B", "text_length": "B", "crc32c": "BA"}
_DTYPES = {"sample_id": np.int64, "text_length": np.int32, "crc32c": np.uint32}


class Sample(NamedTuple):
    """One encoded clip, all bf16 on the CPU: latent C,T,H,W, text L,D of its true length."""

    sample_id: int
    latent_CTHW: Tensor
    text_LD: Tensor
    pooled_P: Tensor
    given_CTHW: Tensor | None = None  # stills of the first and last frame, where the plan has them


class Absent(NamedTuple):
    """A planned clip that could not be encoded."""

    sample_id: int
    reason: str


class Fault(NamedTuple):
    """A file that is not what was committed, and what is wrong with it."""

    name: str
    what: str


class LatentStore:
    """The writing side. Any number of processes may hold the same store open."""

    def __init__(self, folder: StoreFolder, schema: StoreSchema) -> None:
        self.folder = folder
        self.schema = schema
        self._writer = uuid.uuid4().hex

    @classmethod
    def create(cls, root: str | Path, schema: StoreSchema) -> Self:
        """Start a store, or go on with the one there; InputError if that has another plan.

        One that is there stays packed, or not packed, as it was begun.
        """
        folder = folder_at(root)
        return cls(folder, replace(schema, packed=save_plan(folder, schema)))

    @classmethod
    def open(cls, root: str | Path) -> Self:
        """The store that was started at `root`, a path or URL; InputError if there is none."""
        folder = folder_at(root)
        try:
            return cls(folder, load_schema(folder))
        except FileNotFoundError:
            raise InputError(
                f"{folder.where!r} holds no latent store: {PLAN} is missing; encode"
            ) from None

    def has_null_text(self) -> bool:
        """Whether the text that stands for no text has been published."""
        return self.folder.size(NULL_TEXT) is not None

    def publish_null_text(self, null: TextEmbedding) -> None:
        """Keep the text that stands for no text, so that training needs no text encoder."""
        text_LD, pooled_P = (tensor.bfloat16().contiguous() for tensor in null)
        data = save({"text": text_LD, "pooled": pooled_P})
        self.folder.publish(NULL_TEXT, [np.frombuffer(data, np.uint8)])

    def shard_ids(self) -> list[ShardId]:
        """All shards of the plan, in order."""
        k = self.schema.samples_per_shard
        return [
            (bucket.name, shard)
            for bucket in self.schema.buckets
            for shard in range(-(-len(bucket.sample_ids) // k))
        ]

    def planned(self, shard: ShardId) -> tuple[int, ...]:
        """The sample ids of a shard, slot by slot."""
        return tuple(map(int, self.schema.bucket(shard[0]).sample_ids[self.slots(shard)]))

    def slots(self, shard: ShardId) -> slice:
        """The places of a shard's samples in its bucket."""
        k = self.schema.samples_per_shard
        return slice(shard[1] * k, (shard[1] + 1) * k)

    def missing(self) -> list[ShardId]:
        """Shards that are not committed, or whose files are not there in the right size."""
        committed = self._committed()
        return [shard for shard in self.shard_ids() if shard not in committed]

    def not_there(self, shards: Sequence[ShardId]) -> list[ShardId]:
        """Those of some shards that are not committed; the log is read only where files are."""
        arrays = {bucket: self.schema.arrays(bucket) for bucket, _ in shards}
        there = [
            shard
            for shard in shards
            if all(
                self.folder.size(shard_file(shard[0], array, shard[1])) is not None
                for array in arrays[shard[0]]
            )
        ]
        missing = set(self.missing()) if there else set()
        return [shard for shard in shards if shard not in there or shard in missing]

    def quarantined(self) -> dict[int, str]:
        """The samples that could not be encoded, with the reason, of all committed shards."""
        commits = self._committed().values()
        return {number: why for commit in commits for number, why in commit.absent.items()}

    def has_held(self, shard: ShardId, sample_id: int) -> bool:
        """Whether a sample was present when its shard was committed."""
        commits = manifest.read_all(self.folder).get(shard, [])
        return any(
            sample_id in commit.sample_ids and sample_id not in commit.absent for commit in commits
        )

    def write_shard(self, bucket: str, shard: int, samples: Sequence[Sample | Absent]) -> None:
        """Publish a whole shard and commit it; samples come in the planned order.

        Safe to call again, and by two processes at once: content is a function of the plan.
        """
        ids = self.planned((bucket, shard))
        given = tuple(sample.sample_id for sample in samples)
        if given != ids or not ids:
            raise ValueError(f"shard {shard} of {bucket!r} is planned as {ids}, got {given}")
        parts = [self._parts(bucket, sample) for sample in samples]
        num_bytes, crcs = [], []
        for array in self.schema.arrays(bucket):
            layout = self.schema.layout(bucket, array)
            stored = [layout.stored(part[array]) for part in parts]
            pieces = [*(data for data, _ in stored), layout.index(sizes for _, sizes in stored)]
            self.folder.publish(shard_file(bucket, array, shard), pieces)
            num_bytes.append(sum(piece.nbytes for piece in pieces))
            crcs.append([crc32c(data) for data, _ in stored])
        commit = Commit(
            bucket=bucket,
            shard=shard,
            sample_ids=list(ids),
            lengths=[s.text_LD.shape[0] if isinstance(s, Sample) else 0 for s in samples],
            crcs=[list(of_sample) for of_sample in zip(*crcs, strict=True)],
            absent={s.sample_id: s.reason for s in samples if isinstance(s, Absent)},
            num_bytes=num_bytes,
        )
        # Last: the line says that the files are whole and on the disk.
        self.folder.append(self._writer, manifest.line_of(commit))

    def seal(self) -> str:
        """Publish the digest of the finished store; from here zarr and `SealedStore` can read it.

        Called once, by one process, when no other one writes. The same content gives the same
        digest. ValueError while shards are missing.
        """
        committed = self._committed()
        missing = [shard for shard in self.shard_ids() if shard not in committed]
        if missing:
            raise ValueError(f"{len(missing)} shards are missing, the first is {missing[0]}")
        self.folder.tidy()
        content: dict[str, Any] = {
            **plan_json(self.schema),
            "arrays": {},
            "absent": {},
        }  # Any: JSON
        for bucket in self.schema.buckets:
            arrays = _per_sample(bucket, [c for s, c in committed.items() if s[0] == bucket.name])
            content["arrays"][bucket.name] = {name: array_digest(a) for name, a in arrays.items()}
            self._describe(bucket, arrays)
        for commit in committed.values():
            content["absent"].update({str(n): why for n, why in commit.absent.items()})
        if self.has_null_text():
            null = np.frombuffer(self.folder.read(NULL_TEXT), np.uint8)
            content["null_text"] = array_digest(null)
        digest = canonical_digest(content)
        self.folder.publish(sealed_file(digest), json_bytes(content))
        # Last: this file is what `SealedStore.open` looks for.
        attributes: dict[str, object] = {"fingerprint": self.schema.fingerprint, "digest": digest}
        self.folder.publish(SEAL, json_bytes(group_json(attributes)))
        return digest

    def _describe(self, bucket: BucketPlan, arrays: dict[str, NDArray[np.generic]]) -> None:
        """Write the per-sample arrays and the zarr metadata of a bucket."""
        for name, array in arrays.items():
            self.folder.publish(per_sample_file(bucket.name, name), plain_bytes(array))
        for name, metadata in self.metadata(bucket).items():
            self.folder.publish(name, json_bytes(metadata))

    def metadata(self, bucket: BucketPlan) -> dict[str, dict[str, object]]:
        """The content of each zarr.json of a bucket, by its name; the last one is the group's."""
        home, found = bucket.name, {}
        count, k = len(bucket.sample_ids), self.schema.samples_per_shard
        columns = {"A": len(self.schema.arrays(bucket.name)), "B": count}
        for name, axes in PER_SAMPLE.items():
            like = np.empty([columns[axis] for axis in axes], _DTYPES[name])
            found[f"{home}/{name}/zarr.json"] = plain_json(like, list(axes))
        for name, (sample, chunk) in self.schema.shapes(bucket.name).items():
            shown = (self.schema.text_tokens, sample[1]) if name == "text" else sample
            found[f"{home}/{name}/zarr.json"] = sharded_json(
                (count, *shown),
                (k, *sample),
                (1, *chunk),
                list(AXES[name]),
                [CODEC] if self.schema.packed else [],
            )
        found[f"{home}/zarr.json"] = group_json({"bucket": bucket.name})
        return found

    def _committed(self) -> dict[ShardId, Commit]:
        """The commit of each shard that is whole, in plan order."""
        found = manifest.read_all(self.folder)
        whole, bucket, sizes = {}, "", dict[str, int]()
        for shard in self.shard_ids():
            if shard[0] != bucket:
                bucket, sizes = shard[0], self.folder.sizes(shard[0])
            fitting = [commit for commit in found.get(shard, []) if self._fits(commit, sizes)]
            if len(fitting) > 1:
                # Two machines rounded differently: only the files know whose shard this is.
                fitting = [commit for commit in fitting if not next(self.faults(commit), None)]
            if fitting:
                whole[shard] = fitting[0]
        return whole

    def _fits(self, commit: Commit, sizes: Mapping[str, int]) -> bool:
        if tuple(commit.sample_ids) != self.planned((commit.bucket, commit.shard)):
            return False
        return all(sizes.get(name) == size for name, size in self._files(commit))

    def faults(self, commit: Commit) -> Iterator[Fault]:
        """Every way in which a shard's files are not what the line says; reads the whole shard."""
        here = [number not in commit.absent for number in commit.sample_ids]
        lengths = np.asarray(commit.lengths, np.int64)
        sizes = self.schema.sample_bytes(commit.bucket, lengths)
        arrays = self.schema.arrays(commit.bucket)
        for place, (array, (name, num_bytes)) in enumerate(
            zip(arrays, self._files(commit), strict=True)
        ):
            try:
                data = np.frombuffer(self.folder.read(name), np.uint8)
            except FileNotFoundError:
                yield Fault(name, "is gone")
                continue
            if len(data) != num_bytes:
                yield Fault(name, f"has {len(data):,} bytes, committed were {num_bytes:,}")
                continue
            given = [int(size) * is_here for size, is_here in zip(sizes[array], here, strict=True)]
            layout = self.schema.layout(commit.bucket, array)
            try:
                for slot, stored in enumerate(layout.samples(data, given)):
                    found, committed = crc32c(stored), commit.crcs[slot][place]
                    if found != committed:
                        what = f"{array} of sample {commit.sample_ids[slot]} has CRC {found:08x}"
                        yield Fault(name, f"{what}, committed was {committed:08x}")
            except DamagedIndex:
                yield Fault(name, f"the index of its {array} is damaged")

    def _files(self, commit: Commit) -> list[tuple[str, int]]:
        """The names of a shard's files, and the bytes that were committed of each."""
        arrays = self.schema.arrays(commit.bucket)
        names = [shard_file(commit.bucket, array, commit.shard) for array in arrays]
        return list(zip(names, commit.num_bytes, strict=True))

    def _parts(self, bucket: str, sample: Sample | Absent) -> dict[str, Bytes]:
        """The bytes of a sample in each array; text is filled up to whole blocks with zeros."""
        schema = self.schema
        if isinstance(sample, Absent):
            return dict.fromkeys(schema.arrays(bucket), np.empty(0, np.uint8))
        length = sample.text_LD.shape[0]
        tensors = {"latent": sample.latent_CTHW, "text": sample.text_LD, "pooled": sample.pooled_P}
        if sample.given_CTHW is not None:
            tensors["given"] = sample.given_CTHW
        if tuple(tensors) != schema.arrays(bucket):
            raise ValueError(
                f"sample {sample.sample_id}: bucket {bucket!r} keeps {schema.arrays(bucket)}, "
                f"got {tuple(tensors)}"
            )
        shapes = {array: sample_shape for array, (sample_shape, _) in schema.shapes(bucket).items()}
        for array, tensor in tensors.items():
            shape = (length, schema.text_width) if array == "text" else shapes[array]
            if tensor.dtype != torch.bfloat16 or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"sample {sample.sample_id}, {array}: must be bfloat16 {shape}, "
                    f"is {tensor.dtype} {tuple(tensor.shape)}"
                )
        if length > schema.text_tokens:
            raise ValueError(f"sample {sample.sample_id}: {length} > {schema.text_tokens} tokens")
        parts = {array: _bytes_of(tensor) for array, tensor in tensors.items()}
        size = int(schema.sample_bytes(bucket, np.asarray([length]))["text"][0])
        parts["text"] = np.pad(parts["text"], (0, size - parts["text"].nbytes))
        return parts


def per_sample_file(bucket: str, name: str) -> str:
    """The name of an array of one value, or a few, for each sample of a bucket."""
    return f"{bucket}/{name}/{chunk_name(0, len(PER_SAMPLE[name]))}"


def _per_sample(bucket: BucketPlan, commits: list[Commit]) -> dict[str, NDArray[np.generic]]:
    ids = [
        -1 if number in commit.absent else number
        for commit in commits
        for number in commit.sample_ids
    ]
    return {
        "sample_id": np.asarray(ids, _DTYPES["sample_id"]),
        "text_length": np.asarray([n for c in commits for n in c.lengths], _DTYPES["text_length"]),
        "crc32c": np.asarray([row for c in commits for row in c.crcs], _DTYPES["crc32c"]),
    }


def _bytes_of(tensor: Tensor) -> Bytes:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy()
