"""What a latent store will hold, fixed before encoding: samples, shapes, and the fingerprint."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from elastic.data.shards import as_bytes, canonical_digest, chunk_name, publish, publish_json
from elastic.errors import InputError

SCHEMA = 1
TEXT_BLOCK = 8  # tokens; one by one the index would grow as large as short embeddings
AXES = {"latent": "BCTHW", "text": "BLD", "pooled": "BP", "given": "BCTHW"}
NULL_TEXT = "null_text.safetensors"  # in the root: what dropped text is replaced by
_PIECE = 2**22  # bytes hashed at once
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIZES = ("samples_per_shard", "text_tokens", "text_width", "pooled_width")


def fingerprint(fields: Mapping[str, object]) -> str:
    """32 hex digits that stand for the fields, whatever their order; values are JSON values."""
    return canonical_digest(dict(fields))


class StoredIds(Sequence[int]):
    """The ids of a plan file, read where they are asked for: a plan may have 10^9 of them."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[int, ...]: ...
    def __getitem__(self, at: int | slice) -> int | tuple[int, ...]:
        places = range(self._count)[at]
        if not isinstance(places, range):
            return int(np.fromfile(self._path, "<i8", 1, offset=8 * places)[0])
        if not len(places):
            return ()
        low, high = min(places[0], places[-1]), max(places[0], places[-1])
        found = np.fromfile(self._path, "<i8", high - low + 1, offset=8 * low).tolist()
        return tuple(found[place - low] for place in places)

    def __array__(
        self, dtype: "np.dtype[Any] | None" = None, copy: bool | None = None
    ) -> NDArray[Any]:
        """All at one go, for numpy, which would ask for one after the other."""
        return np.fromfile(self._path, "<i8", self._count).astype(dtype or np.int64, copy=False)

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

    def sample_bytes(self, name: str, lengths: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Bytes that each present sample takes in each array, given its number of text tokens."""
        fixed = {array: 2 * int(np.prod(s)) for array, (s, _) in self.shapes(name).items()}
        blocks = -(-lengths // TEXT_BLOCK)
        ragged = {"text": blocks * (TEXT_BLOCK * self.text_width * 2)}
        return {**{a: np.full_like(lengths, size) for a, size in fixed.items()}, **ragged}


def shard_file(root: Path, bucket: str, array: str, shard: int) -> Path:
    """Where a shard of an array lies."""
    return root / bucket / array / chunk_name(shard, len(AXES[array]))


def save_plan(root: Path, schema: StoreSchema) -> None:
    """Write the plan of a store, or check the one there; InputError if they differ."""
    plan = plan_json(schema)
    if (root / "plan.json").exists():
        _require_same(root, json.loads((root / "plan.json").read_text()), plan)
        return
    for bucket in schema.buckets:
        ids = np.asarray(bucket.sample_ids, "<i8")
        publish(root / f"plan-{bucket.name}.i64", [as_bytes(ids)])
    # Last: it says that the ids are there.
    publish_json(root / "plan.json", plan)


def load_schema(root: Path) -> StoreSchema:
    """The schema that a store was started with; InputError where its files are damaged."""
    try:
        plan = json.loads((root / "plan.json").read_text())
        sizes = {name: plan[name] for name in _SIZES}
        buckets = tuple(_load_bucket(root, name, known) for name, known in plan["buckets"].items())
        return StoreSchema(fingerprint=plan["fingerprint"], buckets=buckets, **sizes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged_plan(root, "plan.json", f"it cannot be read ({error!r})") from error


def _load_bucket(root: Path, name: str, known: dict[str, Any]) -> BucketPlan:  # Any: a JSON tree
    path = root / f"plan-{name}.i64"
    if file_digest(path) != known["sample_ids"]:
        raise _damaged_plan(root, path.name, "its digest is not that of plan.json")
    given = tuple(known["given"]) if "given" in known else None
    ids = StoredIds(path, known["num_samples"])
    return BucketPlan(name=name, shape=tuple(known["shape"]), sample_ids=ids, given=given)


def _damaged_plan(root: Path, name: str, why: str) -> InputError:
    return InputError(
        f"{str(root)!r}: {name} is damaged, {why}, and nothing else says what should be there; put "
        "it back from a copy, or delete the folder and encode again"
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
    return {"schema": SCHEMA, "fingerprint": schema.fingerprint, **sizes, "buckets": buckets}


def _require_same(root: Path, found: dict[str, object], asked: dict[str, object]) -> None:
    differing = [name for name in asked if found.get(name) != asked[name]]
    if not differing:
        return
    shown = "; ".join(f"{name} is {found.get(name)}, asked {asked[name]}" for name in differing)
    raise InputError(
        f"latents at {str(root)!r} were planned otherwise: {shown}. A store keeps the plan it was "
        f"started with: restore the table and the stage file, or encode to another folder"
    )


def file_digest(path: Path, without: int = 0) -> str:
    """`array_digest` of the bytes of a file but the last few; of none where there is no file."""
    digest = hashlib.blake2b(digest_size=16)
    if path.exists():
        left = path.stat().st_size - without
        with open(path, "rb") as file:
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()


def array_digest(array: NDArray[np.generic]) -> str:
    """32 hex digits of the bytes of an array."""
    return hashlib.blake2b(as_bytes(array).data, digest_size=16).hexdigest()
