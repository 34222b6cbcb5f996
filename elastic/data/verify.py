"""Every damage of a latent store, found by reading all of it once."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from elastic.data import manifest
from elastic.data.captions import captions_file, captions_fit
from elastic.data.schema import (
    NULL_TEXT,
    PLAN,
    SEAL,
    array_digest,
    fingerprint,
    ids_file,
    plan_json,
    sealed_file,
)
from elastic.data.shards import (
    CHECKSUM_BYTES,
    canonical,
    canonical_digest,
    crc32c,
    group_json,
)
from elastic.data.store import Fault, LatentStore, ShardId, per_sample_file
from elastic.data.store_folder import StoreFolder
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
        return any(fault.name == NULL_TEXT for fault in self.seal)


def verify(root: str | Path, progress: Progress = lambda done, total: None) -> Verdict:
    """Compare every file of a store with what was committed and sealed; nothing is changed.

    InputError where there is no store, or where its plan is damaged: then nothing says what should
    be there. Of a store that is being written, what was committed when this began is looked at.
    """
    store, verdict = LatentStore.open(root), Verdict()
    sealed = _sealed(store, verdict)
    committed = manifest.read_all(store.folder)
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
            verdict.shards[shard] = [Fault("manifest-*.jsonl", what)]
        elif not found:
            verdict.missing.append(shard)
        elif all(found):
            verdict.shards[shard] = min(found, key=len)
    progress(len(shards), len(shards))
    if sealed is not None:
        verdict.seal += _seal_faults(store, sealed)
    verdict.seal += _caption_faults(store)
    fields = _read(store.folder, FIELDS)
    if fields is not None and not _stands_for(fields, store.schema.fingerprint):
        verdict.seal.append(Fault(FIELDS, "is not what the fingerprint stands for"))
    return verdict


def verdict_lines(root: str, verdict: Verdict) -> list[str]:
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
        *(f"  {fault.name} {fault.what}" for fault in verdict.faults),
    ]


def _sealed(store: LatentStore, verdict: Verdict) -> dict[str, Any] | None:  # Any: a JSON tree
    """What was sealed, if the store is sealed and that can be read; faults go into the verdict.

    InputError where plan.json is not what was sealed.
    """
    folder, planned = store.folder, plan_json(store.schema)
    if _read(folder, PLAN) != canonical(planned):
        raise InputError(f"{folder.where!r}: {PLAN} is damaged; put it back from a copy")
    for bucket in store.schema.buckets:
        # This machine may go on with a copy of it; others will miss it.
        ids = np.frombuffer(_read(folder, ids_file(bucket.name)) or b"", np.uint8)
        if array_digest(ids) != planned["buckets"][bucket.name]["sample_ids"]:
            raise InputError(
                f"{folder.where!r}: {ids_file(bucket.name)} is damaged; put it back from a copy"
            )
    seal = _read(folder, SEAL)
    verdict.is_sealed = seal is not None
    if seal is None:
        return None
    try:
        digest = str(json.loads(seal)["attributes"]["digest"])
    except (ValueError, KeyError, TypeError):
        digest = ""
    named = sealed_file(digest)
    data = _read(folder, named)
    sealed = _manifest(data, digest)
    if sealed is not None:
        # First, as nothing can be judged by a plan that is not the one that was sealed.
        differing = [name for name in planned if sealed.get(name) != planned[name]]
        if differing:
            raise InputError(
                f"{folder.where!r}: {PLAN} is damaged: {', '.join(differing)} differ from what was "
                f"sealed in {named}, which has the right values; put it back from a copy"
            )
    attributes: dict[str, object] = {"fingerprint": store.schema.fingerprint, "digest": digest}
    names_another = data is None and any(map(_is_manifest, folder.sizes("")))
    if names_another or seal != canonical(group_json(attributes)):
        verdict.seal.append(Fault(SEAL, "is not what was sealed"))
    elif sealed is None:
        verdict.seal.append(Fault(named, "is gone, or is not what its name says"))
    return sealed


def _is_manifest(name: str) -> bool:
    return "/" not in name and name.startswith("manifest-") and name.endswith(".json")


def _manifest(data: bytes | None, digest: str) -> dict[str, Any] | None:  # Any: a JSON tree
    """What was sealed under this digest; None where the file is not that."""
    try:
        content: dict[str, Any] = json.loads(data or b"")
        is_whole = canonical_digest(content) == digest and data == canonical(content)
    except ValueError:
        return None
    return content if is_whole else None


def _seal_faults(store: LatentStore, sealed: dict[str, Any]) -> Iterator[Fault]:  # Any: JSON
    folder = store.folder
    for bucket in store.schema.buckets:
        for name, wanted in sealed["arrays"][bucket.name].items():
            path = per_sample_file(bucket.name, name)
            data = np.frombuffer(_read(folder, path) or b"", np.uint8)
            own, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:].tobytes()
            if array_digest(own) != wanted or checksum != struct.pack("<I", crc32c(own)):
                yield Fault(path, "is not what was sealed")
        for path, metadata in store.metadata(bucket).items():
            if _read(folder, path) != canonical(metadata):
                yield Fault(path, "is not what was sealed")
    if "null_text" in sealed:
        null = np.frombuffer(_read(folder, NULL_TEXT) or b"", np.uint8)
        if array_digest(null) != sealed["null_text"]:
            yield Fault(NULL_TEXT, "is not what was sealed")


def _caption_faults(store: LatentStore) -> Iterator[Fault]:
    for bucket in store.schema.buckets:
        data = _read(store.folder, captions_file(bucket.name))
        # Stores of before captions were kept have none.
        if data is not None and not captions_fit(data, bucket.sample_ids):
            yield Fault(captions_file(bucket.name), "is damaged, or not of the planned samples")


def _stands_for(fields: bytes, wanted: str) -> bool:
    try:
        return fingerprint(json.loads(fields)) == wanted
    except (ValueError, TypeError):
        return False


def _read(folder: StoreFolder, name: str) -> bytes | None:
    """A file in full; None where there is none."""
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None
