"""The commit log of a latent store: one checksummed line for each shard that is on the disk."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np

from elastic.data.shards import canonical, crc32c
from elastic.data.store_folder import StoreFolder

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


def line_of(commit: Commit) -> bytes:
    """One line for the log."""
    body = canonical(asdict(commit))
    # A line of its own even after one that a full disk cut off.
    return b"\n%08x %s\n" % (crc32c(np.frombuffer(body, np.uint8)), body)


def read_all(folder: StoreFolder) -> dict[ShardId, list[Commit]]:
    """All commits of all writers; a shard that was written twice alike is listed once.

    A torn or damaged line counts as not written: its shard is encoded again.
    """
    found: dict[ShardId, list[Commit]] = defaultdict(list)
    for log in folder.logs():
        for line in log.split(b"\n"):
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
