"""The commit log of a latent store: one checksummed line for each shard that is on the disk."""

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from elastic.data.shards import canonical, crc32c

ShardId = tuple[str, int]
"""Bucket name and number of the shard in it."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What one shard holds, slot by slot; `absent` gives the reason for each slot without data.

    `lengths` are text tokens; `crcs` are CRC-32C of a sample's part in each array of the bucket,
    and `num_bytes` the sizes of the arrays' files, in the order of `StoreSchema.arrays`. Absent
    slots have length 0 and CRCs 0.
    """

    bucket: str
    shard: int
    sample_ids: list[int]
    lengths: list[int]
    crcs: list[list[int]]
    absent: dict[int, str]
    num_bytes: list[int]


def append(path: Path, commit: Commit) -> None:
    """Add one line and flush it to the disk; when this returns the shard is committed."""
    body = canonical(asdict(commit))
    # A line of its own even after one that a full disk cut off.
    line = b"\n%08x %s\n" % (crc32c(np.frombuffer(body, np.uint8)), body)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{path}: {written} of {len(line)} bytes were written; is the disk full?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_all(root: Path) -> dict[ShardId, list[Commit]]:
    """All commits of all writers; a shard that was written twice alike is listed once.

    A torn or damaged line counts as not written: its shard is encoded again.
    """
    found: dict[ShardId, list[Commit]] = defaultdict(list)
    for path in sorted(root.glob("manifest-*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            commit = _parse(line)
            if commit is None:
                continue
            others = found[commit.bucket, commit.shard]
            if commit not in others:
                others.append(commit)
    return dict(found)


def _parse(line: bytes) -> Commit | None:
    checksum, _, body = line.partition(b" ")
    if checksum != b"%08x" % crc32c(np.frombuffer(body, np.uint8)):
        return None
    content = json.loads(body)
    content["absent"] = {int(number): why for number, why in content["absent"].items()}
    return Commit(**content)
