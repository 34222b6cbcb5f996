"""Every damage of a latent store, found by reading all of it once."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from elastic.data import manifest
from elastic.data.schema import NULL_TEXT, array_digest, fingerprint, plan_json
from elastic.data.shards import (
    CHECKSUM_BYTES,
    Bytes,
    canonical,
    canonical_digest,
    crc32c,
    group_json,
)
from elastic.data.store import Fault, LatentStore, ShardId
from elastic.errors import InputError

FIELDS = "fingerprint.json"  # what the fingerprint of the store stands for
Progress = Callable[[int, int], None]  # shards looked at, shards in all


class Verdict:
    """What `verify` found: files of shards and of the seal, and shards that nobody has encoded."""

    def __init__(self) -> None:
        self.shards: dict[ShardId, list[Fault]] = {}
        self.seal: list[Fault] = []
        self.missing: list[ShardId] = []
        self.num_shards = 0
        self.is_sealed = False

    @property
    def faults(self) -> list[Fault]:
        """All of them."""
        return [*(fault for faults in self.shards.values() for fault in faults), *self.seal]

    @property
    def is_whole(self) -> bool:
        """Whether the store is finished and every byte of it is what was committed."""
        return self.is_sealed and not self.faults and not self.missing

    @property
    def lost_null_text(self) -> bool:
        """Whether the text that stands for no text is damaged."""
        return any(fault.path.name == NULL_TEXT for fault in self.seal)


def verify(root: Path, progress: Progress = lambda done, total: None) -> Verdict:
    """Compare every file of a store with what was committed and sealed; nothing is changed.

    InputError where there is no store, or where its plan is damaged: then nothing says what should
    be there. Of a store that is being written, what was committed when this began is looked at.
    """
    store, verdict = LatentStore.open(root), Verdict()
    sealed = _sealed(store, verdict)
    committed = manifest.read_all(root)
    shards = store.shard_ids()
    verdict.num_shards = len(shards)
    for done, shard in enumerate(shards):
        progress(done, len(shards))
        # Of several machines that rounded differently the files are those of one.
        found = [
            list(store.faults(commit))
            for commit in committed.get(shard, [])
            if tuple(commit.sample_ids) == store.planned(shard)
        ]
        if not found and verdict.is_sealed:
            what = f"has no line for shard {shard[1]} of {shard[0]!r} any more"
            verdict.shards[shard] = [Fault(root / "manifest-*.jsonl", what)]
        elif not found:
            verdict.missing.append(shard)
        elif all(found):
            verdict.shards[shard] = min(found, key=len)
    progress(len(shards), len(shards))
    if sealed is not None:
        verdict.seal += _seal_faults(store, sealed)
    path = root / FIELDS
    if path.exists() and not _stands_for(path, store.schema.fingerprint):
        verdict.seal.append(Fault(path, "is not what the fingerprint stands for"))
    return verdict


def verdict_lines(root: Path, verdict: Verdict) -> list[str]:
    """What was found, for people; one line a fault."""
    head = f"{root}: {verdict.num_shards} shards, {'' if verdict.is_sealed else 'not '}sealed"
    if verdict.missing:
        head += f", {len(verdict.missing)} not encoded yet"
    if verdict.shards:
        head += f", {len(verdict.shards)} damaged"
    if verdict.seal:
        head += ", the seal damaged"
    return [
        f"{head}{': whole' if verdict.is_whole else ''}",
        *(f"  {fault.path.relative_to(root)} {fault.what}" for fault in verdict.faults),
    ]


def _sealed(store: LatentStore, verdict: Verdict) -> dict[str, Any] | None:  # Any: a JSON tree
    """What was sealed, if the store is sealed and that can be read; faults go into the verdict.

    InputError where plan.json is not what was sealed.
    """
    root, planned = store.root, plan_json(store.schema)
    if _read(root / "plan.json").tobytes() != canonical(planned):
        raise InputError(f"{str(root)!r}: plan.json is damaged; put it back from a copy")
    path = root / "zarr.json"
    verdict.is_sealed = path.exists()
    if not verdict.is_sealed:
        return None
    try:
        digest = str(json.loads(path.read_text())["attributes"]["digest"])
    except (ValueError, KeyError, TypeError):
        digest = ""
    named = root / f"manifest-{digest}.json"
    sealed = _manifest(named, digest)
    if sealed is not None:
        # First, as nothing can be judged by a plan that is not the one that was sealed.
        differing = [name for name in planned if sealed.get(name) != planned[name]]
        if differing:
            raise InputError(
                f"{str(root)!r}: plan.json is damaged: {', '.join(differing)} differ from what was "
                f"sealed in {named.name}, which has the right values; put it back from a copy"
            )
    attributes: dict[str, object] = {"fingerprint": store.schema.fingerprint, "digest": digest}
    names_another = sealed is None and not named.exists() and any(root.glob("manifest-*.json"))
    if names_another or _read(path).tobytes() != canonical(group_json(attributes)):
        verdict.seal.append(Fault(path, "is not what was sealed"))
    elif sealed is None:
        verdict.seal.append(Fault(named, "is gone, or is not what its name says"))
    return sealed


def _manifest(path: Path, digest: str) -> dict[str, Any] | None:  # Any: a JSON tree
    """What was sealed under this digest; None where the file is not that."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        is_whole = canonical_digest(content) == digest and path.read_bytes() == canonical(content)
    except (OSError, ValueError):
        return None
    return content if is_whole else None


def _seal_faults(store: LatentStore, sealed: dict[str, Any]) -> Iterator[Fault]:  # Any: JSON
    root = store.root
    for bucket in store.schema.buckets:
        for name, wanted in sealed["arrays"][bucket.name].items():
            path = store.per_sample_file(bucket.name, name)
            data = _read(path)
            own, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:].tobytes()
            if array_digest(own) != wanted or checksum != struct.pack("<I", crc32c(own)):
                yield Fault(path, "is not what was sealed")
        for path, metadata in store.metadata(bucket).items():
            if _read(path).tobytes() != canonical(metadata):
                yield Fault(path, "is not what was sealed")
    if "null_text" in sealed and array_digest(_read(root / NULL_TEXT)) != sealed["null_text"]:
        yield Fault(root / NULL_TEXT, "is not what was sealed")


def _stands_for(path: Path, wanted: str) -> bool:
    try:
        return fingerprint(json.loads(path.read_text())) == wanted
    except (OSError, ValueError, TypeError):
        return False


def _read(path: Path) -> Bytes:
    return np.fromfile(path, np.uint8) if path.exists() else np.empty(0, np.uint8)
