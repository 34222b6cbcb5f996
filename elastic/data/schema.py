"""What a latent store will hold, fixed before encoding: samples, shapes, and the fingerprint."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from elastic.data.packing import Layout
from elastic.data.shards import as_bytes, canonical_digest, chunk_name, json_bytes
from elastic.data.store_folder import OpenFile, StoreFolder
from elastic.errors import InputError

SCHEMA = 1
PLAN = "plan.json"
SEAL = "zarr.json"  # of the root: published when the store is finished
TEXT_BLOCK = 8  # tokens; one by one the index would grow as large as short embeddings
AXES = {"latent": "BCTHW", "text": "BLD", "pooled": "BP", "given": "BCTHW"}
NULL_TEXT = "null_text.safetensors"  # in the root: what dropped text is replaced by
_ID = np.dtype("<i8")
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PACKED = "packed"
_SIZES = ("samples_per_shard", "text_tokens", "text_width", "pooled_width")


def fingerprint(fields: Mapping[str, object]) -> str:
    """32 hex digits that stand for the fields, whatever their order; values are JSON values."""
    return canonical_digest(dict(fields))


class StoredIds(Sequence[int]):
    """The ids of a plan file, read where they are asked for: a plan may have 10^9 of them."""

    def __init__(self, file: OpenFile, count: int) -> None:
        self._file, self._count = file, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[int, ...]: ...
    def __getitem__(self, at: int | slice) -> int | tuple[int, ...]:
        places = range(self._count)[at]
        if not isinstance(places, range):
            return int(self._file.array(_ID, 1, places)[0])
        if not len(places):
            return ()
        low, high = min(places[0], places[-1]), max(places[0], places[-1])
        found = self._file.array(_ID, high - low + 1, low).tolist()
        return tuple(found[place - low] for place in places)

    def __array__(
        self, dtype: "np.dtype[Any] | None" = None, copy: bool | None = None
    ) -> NDArray[Any]:
        """All at one go, for numpy, which would ask for one after the other."""
        return self._file.array(_ID, self._count).astype(dtype or np.int64, copy=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and self[:] == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as a list's


@dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """The samples of a bucket in the order of the store, and the shape C,T,H,W of a latent.

    `given` is the shape C,2,H,W of the stills of a clip's first and last frame, if they are kept.
    """

    name: str
    shape: tuple[int, int, int, int]
    sample_ids: Sequence[int] | NDArray[np.int64]
    given: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if not _SAFE.fullmatch(self.name):
            raise InputError(
                f"bucket {self.name!r} becomes a folder; a name is letters, digits, dot, dash and "
                f"underscore, and starts with a letter or digit"
            )
        if not len(self.sample_ids):
            raise InputError(
                f"bucket {self.name!r} has no samples; no clip is long enough for it: "
                f"ask for fewer frames, or add longer clips"
            )
        if isinstance(self.sample_ids, StoredIds):
            return  # they were checked when they were planned, and have the digest of then
        ids = np.asarray(self.sample_ids)
        if len(np.unique(ids)) != len(ids) or ids.min() < 0:
            raise ValueError(f"bucket {self.name!r}: sample ids must be distinct and not negative")


@dataclass(frozen=True, kw_only=True)
class StoreSchema:
    """All that is known before encoding: what makes the latents, which samples, which shapes."""

    fingerprint: str
    buckets: tuple[BucketPlan, ...]
    samples_per_shard: int
    text_tokens: int
    text_width: int
    pooled_width: int
    packed: bool = False  # whether chunks are compressed: the same values in fewer bytes

    def __post_init__(self) -> None:
        if not _SAFE.fullmatch(self.fingerprint):
            raise ValueError(f"fingerprint {self.fingerprint!r} must be usable as a folder name")
        names = [bucket.name for bucket in self.buckets]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"bucket names must be distinct and at least one, got {names}")
        sizes = (self.samples_per_shard, self.text_tokens, self.text_width, self.pooled_width)
        if min(sizes) < 1:
            raise ValueError(f"samples_per_shard, text and pooled sizes must be >= 1, got {sizes}")

    def bucket(self, name: str) -> BucketPlan:
        """The bucket of that name."""
        return next(bucket for bucket in self.buckets if bucket.name == name)

    def arrays(self, name: str) -> tuple[str, ...]:
        """The arrays of the bucket that hold a part of every sample, in the order of its CRCs."""
        return tuple(self.shapes(name))

    def shapes(self, name: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each array of the bucket: shape of one sample as stored, and of one inner chunk."""
        blocks, bucket = -(-self.text_tokens // TEXT_BLOCK), self.bucket(name)
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "latent": (bucket.shape, bucket.shape),
            "text": ((blocks * TEXT_BLOCK, self.text_width), (TEXT_BLOCK, self.text_width)),
            "pooled": ((self.pooled_width,), (self.pooled_width,)),
        }
        if bucket.given is not None:
            shapes["given"] = (bucket.given, bucket.given)
        return shapes

    def layout(self, bucket: str, array: str) -> Layout:
        """The form of the array's shards."""
        sample, chunk = self.shapes(bucket)[array]
        chunks = int(np.prod(sample)) // int(np.prod(chunk))
        chunk_bytes = 2 * int(np.prod(chunk))
        return Layout(self.samples_per_shard, chunks, chunk_bytes, self.packed)

    def sample_bytes(self, name: str, lengths: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Bytes that each present sample takes in each array, given its number of text tokens."""
        fixed = {array: 2 * int(np.prod(s)) for array, (s, _) in self.shapes(name).items()}
        blocks = -(-lengths // TEXT_BLOCK)
        ragged = {"text": blocks * (TEXT_BLOCK * self.text_width * 2)}
        return {**{a: np.full_like(lengths, size) for a, size in fixed.items()}, **ragged}


def shard_file(bucket: str, array: str, shard: int) -> str:
    """The name of a shard of an array."""
    return f"{bucket}/{array}/{chunk_name(shard, len(AXES[array]))}"


def sealed_file(digest: str) -> str:
    """The name of the file with what was sealed under a digest."""
    return f"manifest-{digest}.json"


def save_plan(folder: StoreFolder, schema: StoreSchema) -> bool:
    """Write the plan of a store, or check the one there; InputError if they differ.

    Whether the store is packed: one that was begun stays as it is.
    """
    plan = plan_json(schema)
    with suppress(FileNotFoundError):
        found = json.loads(folder.read(PLAN))
        is_packed = found.pop(_PACKED, False)
        _require_same(folder, found, {n: value for n, value in plan.items() if n != _PACKED})
        return bool(is_packed)
    for bucket in schema.buckets:
        ids = np.asarray(bucket.sample_ids, _ID)
        folder.publish(ids_file(bucket.name), [as_bytes(ids)])
    # Last: it says that the ids are there.
    folder.publish(PLAN, json_bytes(plan))
    return schema.packed


def load_schema(folder: StoreFolder, sealed: Mapping[str, object] | None = None) -> StoreSchema:
    """The schema that a store was started with; InputError where its files are damaged.

    Or where it is not the one in `sealed`, the content of the seal.
    """
    data = folder.read(PLAN)
    try:
        plan = json.loads(data)
        # The digest that a run has pinned is of the seal: without this, not of shapes.
        if sealed is not None and any(sealed.get(name) != value for name, value in plan.items()):
            raise InputError(
                f"{folder.where!r}: {PLAN} is not what was sealed; put it back from a copy, or "
                "delete the folder and encode again"
            )
        sizes = {name: plan[name] for name in _SIZES}
        buckets = tuple(_load_bucket(folder, *named) for named in plan["buckets"].items())
        packed = bool(plan.get(_PACKED, False))
        return StoreSchema(fingerprint=plan["fingerprint"], buckets=buckets, packed=packed, **sizes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged_plan(folder, PLAN, f"it cannot be read ({error!r})") from error


def _load_bucket(folder: StoreFolder, name: str, known: dict[str, Any]) -> BucketPlan:  # JSON
    file = folder.kept(ids_file(name), known["sample_ids"])
    if file is None:
        why = f"its digest is not that of {PLAN}"
        raise _damaged_plan(folder, ids_file(name), why)
    given = tuple(known["given"]) if "given" in known else None
    ids = StoredIds(file, known["num_samples"])
    return BucketPlan(name=name, shape=tuple(known["shape"]), sample_ids=ids, given=given)


def ids_file(bucket: str) -> str:
    """The name of the file with the planned ids of a bucket."""
    return f"plan-{bucket}.i64"


def _damaged_plan(folder: StoreFolder, name: str, why: str) -> InputError:
    return InputError(
        f"{folder.where!r}: {name} is damaged, {why}, and nothing else says what should be there; "
        "put it back from a copy, or delete the folder and encode again"
    )


def plan_json(schema: StoreSchema) -> dict[str, Any]:  # Any: a JSON tree
    """The plan as JSON: sizes, and shape, count and digest of the ids of each bucket."""
    sizes = {name: getattr(schema, name) for name in _SIZES}
    buckets = {
        bucket.name: {
            "shape": list(bucket.shape),
            "num_samples": len(bucket.sample_ids),
            "sample_ids": array_digest(np.asarray(bucket.sample_ids, "<i8")),
            **({"given": list(bucket.given)} if bucket.given is not None else {}),
        }
        for bucket in schema.buckets
    }
    packed = {_PACKED: True} if schema.packed else {}
    fixed = {"schema": SCHEMA, "fingerprint": schema.fingerprint}
    return {**fixed, **sizes, **packed, "buckets": buckets}


def _require_same(folder: StoreFolder, found: dict[str, object], asked: dict[str, object]) -> None:
    differing = [name for name in asked if found.get(name) != asked[name]]
    if not differing:
        return
    shown = "; ".join(f"{name} is {found.get(name)}, asked {asked[name]}" for name in differing)
    raise InputError(
        f"latents at {folder.where!r} were planned otherwise: {shown}. A store keeps the plan it "
        f"was started with: restore the table and the stage file, or encode to another folder"
    )


def array_digest(array: NDArray[np.generic]) -> str:
    """32 hex digits of the bytes of an array."""
    return hashlib.blake2b(as_bytes(array).data, digest_size=16).hexdigest()
