"""Every damage of a latent store, found by reading all of it once."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from elastic.data import manifest
from elastic.data.schema import NULL_TEXT, array_digest
from elastic.data.shards import Bytes, canonical, canonical_digest, crc32c
from elastic.data.store import Fault, LatentStore, ShardId

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


def verify(root: Path, progress: Progress = lambda done, total: None) -> Verdict:
    """Compare every file of a store with what was committed and sealed; nothing is changed.

    InputError where there is no store, or where its plan itself is damaged: then nothing says
    what should be there.
    """
    store, verdict = LatentStore.open(root), Verdict()
    committed = manifest.read_all(root)
    shards = store.shard_ids()
    verdict.num_shards, verdict.is_sealed = len(shards), (root / "zarr.json").exists()
    for done, shard in enumerate(shards):
        progress(done, len(shards))
        # Of several machines that rounded differently the files are those of one.
        found = [
            list(store.faults(commit))
            for commit in committed.get(shard, [])
            if tuple(commit.sample_ids) == store.planned(shard)
        ]
        if not found:
            verdict.missing.append(shard)
        elif all(found):
            verdict.shards[shard] = min(found, key=len)
    progress(len(shards), len(shards))
    if verdict.is_sealed:
        verdict.seal = list(_seal_faults(store))
    return verdict


def discard(root: Path, verdict: Verdict) -> int:
    """Delete the files of damaged shards, so that encoding makes them anew; how many there were.

    What belongs to the seal needs no more: sealing writes all of it again. Only damaged text that
    stands for no text is deleted too.
    """
    for fault in verdict.faults:
        is_null_text = fault.path.name == NULL_TEXT
        if is_null_text or fault not in verdict.seal:
            fault.path.unlink(missing_ok=True)
    return len(verdict.shards)


def _seal_faults(store: LatentStore) -> Iterator[Fault]:
    root = store.root
    try:
        attributes = json.loads((root / "zarr.json").read_text())["attributes"]
        digest, found = attributes["digest"], attributes["fingerprint"]
    except (ValueError, KeyError):
        yield Fault(root / "zarr.json", "is no seal that can be read")
        return
    if found != store.schema.fingerprint:
        planned = store.schema.fingerprint
        yield Fault(root / "zarr.json", f"has the fingerprint {found}, planned was {planned}")
    path = root / f"manifest-{digest}.json"
    try:
        sealed = json.loads(path.read_text())
    except (OSError, ValueError):
        yield Fault(path, "is gone, or cannot be read")
        return
    if canonical_digest(sealed) != digest:
        yield Fault(path, "is not what its name says")
        return
    for bucket in store.schema.buckets:
        for name, wanted in sealed["arrays"][bucket.name].items():
            path = store.per_sample_file(bucket.name, name)
            data = _read(path)
            own, checksum = data[:-4], data[-4:].tobytes()
            if array_digest(own) != wanted or checksum != struct.pack("<I", crc32c(own)):
                yield Fault(path, "is not what was sealed")
        for path, metadata in store.metadata(bucket).items():
            if _read(path).tobytes() != canonical(metadata):
                yield Fault(path, "is not what was sealed")
    if "null_text" in sealed and array_digest(_read(root / NULL_TEXT)) != sealed["null_text"]:
        yield Fault(root / NULL_TEXT, "is not what was sealed")


def _read(path: Path) -> Bytes:
    return np.fromfile(path, np.uint8) if path.exists() else np.empty(0, np.uint8)
