"""Checkpoints on S3: a real server over a socket, and the same promises as on a local path."""

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from s3_server import BUCKET, s3_server  # noqa: F401  # a fixture
from small_state import begin, expected, restored, small, whole
from tiny import world_of_one
from worlds import run_world

from elastic.checkpoint import NothingToRestore, StaleAttempt, load_subset
from elastic.checkpoint_manifest import FileEntry, encode
from elastic.checkpoint_place import open_storage, settle
from elastic.checkpoint_store import DAMAGED, MANIFEST, Draft
from elastic.state import Progress
from elastic.world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.fixture
def url(server: str, tmp_path: Path) -> str:
    return f"s3://{BUCKET}{tmp_path}/checkpoints"


def _names(url: str) -> list[str]:
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    listed = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return sorted(item["Key"].removeprefix(prefix) for item in listed.get("Contents", []))


def _put(url: str, name: str, data: bytes) -> None:
    key = url.removeprefix(f"s3://{BUCKET}/") + f"/{name}"
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=data)


def _delete(url: str, name: str) -> None:
    key = url.removeprefix(f"s3://{BUCKET}/") + f"/{name}"
    boto3.client("s3").delete_object(Bucket=BUCKET, Key=key)


def _save(world: World, folder: Path, url: str, *positions: int) -> list[tuple[str, int, str]]:
    store = begin(world, folder, storage=open_storage(url))
    for position in positions:
        store.checkpoints.save(small(world, position), "due")
    store.checkpoints.wait()
    return store.events


def _round(world: World, folder: Path, url: str) -> tuple[dict[str, bytes], dict[str, int]]:
    _save(world, folder, url, 11, 22, 33)
    state, store = restored(world, folder, storage=open_storage(url))
    return whole(state), store.checkpoints.restored_from._asdict()


def test_a_world_of_two_saves_and_restores_there(tmp_path: Path, url: str) -> None:
    for tensors, read in run_world(_round, 2, tmp_path, url):
        assert tensors == expected(33)
        assert read["ram"] == 0 < read["storage"]
    kept = ["1-00000.safetensors", "1-00001.safetensors", MANIFEST]
    assert _names(url) == [f"{position}/{name}" for position in (22, 33) for name in kept]
    assert not (tmp_path / "checkpoints").exists()


def _flip(url: str) -> None:
    data = bytearray(_storage_bytes(url, "1-00000.safetensors"))
    data[-3] ^= 1
    _put(url, "22/1-00000.safetensors", bytes(data))


def _storage_bytes(url: str, name: str) -> bytes:
    return open_storage(url).read(22, name)


DAMAGES = {
    "a flipped bit": (_flip, "does not have the listed SHA-256"),
    "cut off": (lambda url: _put(url, "22/1-00000.safetensors", b"short"), "has 5 bytes, not"),
    "no manifest": (lambda url: _delete(url, f"22/{MANIFEST}"), "manifest.json cannot be read"),
    "half a manifest": (lambda url: _put(url, f"22/{MANIFEST}", b'{"schema"'), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_skipped_and_kept(
    world: World, tmp_path: Path, url: str, damage: str
) -> None:
    harm, message = DAMAGES[damage]
    _save(world, tmp_path, url, 11, 22)
    harm(url)
    before = _names(url)
    state, store = restored(world, tmp_path, storage=open_storage(url))
    assert whole(state) == expected(11)
    ((kind, position, reason),) = store.events
    assert (kind, position) == ("damaged_checkpoint", 22)
    assert message in reason
    for samples in (15, 16, 22, 33, 44, 55):
        store.checkpoints.save(small(world, samples), "due")
    store.checkpoints.wait()
    # What was damaged is set aside for the one at the same position, and outlives that one.
    left = {name.partition(".json")[0] for name in before if name.startswith("22/")}
    kept = {name.partition(".json")[0] for name in _names(url)}
    assert left <= kept
    assert any(name.startswith(f"22/{DAMAGED}.") for name in kept)
    assert {name for name in kept if name.startswith("22/2-")} == set()
    assert open_storage(url).positions() == [55, 44]
    assert whole(restored(world, tmp_path, storage=open_storage(url))[0]) == expected(55)


def test_a_draft_is_discarded_though_an_older_manifest_lies_at_its_position(url: str) -> None:
    storage = open_storage(url)
    entry = FileEntry(1, "")
    storage.publish(Draft(11, 1), encode(Progress("small", 11).as_json(), {"1-a": entry}))
    for name in ("1-a", "2-a"):
        _put(url, f"11/{name}", b"x")
    storage.discard(Draft(11, 2))
    storage.discard(Draft(11, 1))  # published after all
    assert _names(url) == ["11/1-a", f"11/{MANIFEST}"]


def test_what_was_never_published_is_not_there_and_goes_away(
    world: World, tmp_path: Path, url: str
) -> None:
    _save(world, tmp_path, url, 11)
    _put(url, "22/1-00000.safetensors", b"the attempt was killed while it wrote this")
    assert open_storage(url).positions() == [11]
    state, store = restored(world, tmp_path, storage=open_storage(url))
    assert whole(state) == expected(11)
    assert store.events == []
    store.checkpoints.save(small(world, 33), "stop")
    assert {name.partition("/")[0] for name in _names(url)} == {"11", "33"}


def test_an_attempt_that_was_replaced_publishes_nothing(
    world: World, tmp_path: Path, url: str
) -> None:
    old = begin(world, tmp_path, storage=open_storage(url))
    _save(world, tmp_path, url, 11)
    old.checkpoints.save(small(world, 22), "due")
    with pytest.raises(StaleAttempt):
        old.checkpoints.wait()
    assert open_storage(url).positions() == [11]


def test_a_manifest_is_put_only_where_there_is_none(url: str) -> None:
    """Two at once: the one that comes second is refused, though it saw no manifest before."""
    storage = open_storage(url)
    storage.publish(Draft(11, 1), b"first")
    late = open_storage(url)
    late._fs.exists = lambda path: False  # type: ignore[attr-defined]  # what it saw before
    with pytest.raises(FileExistsError):
        late.publish(Draft(11, 2), b"second")
    assert storage.read(11, MANIFEST) == b"first"


def test_a_bucket_that_refuses_is_told_and_the_run_goes_on(
    world: World, tmp_path: Path, server: str
) -> None:
    events = _save(world, tmp_path, "s3://no-such-bucket/runs", 11, 22)
    assert [(kind, position) for kind, position, _ in events] == [
        ("save_failed", 11), ("save_failed", 22),
    ]  # fmt: skip
    assert "bucket" in events[0][2].lower()


def test_another_stage_starts_from_a_checkpoint_there(
    world: World, tmp_path: Path, server: str
) -> None:
    stage = tmp_path / "plan" / "stages" / "small"
    stage.mkdir(parents=True)
    storage = open_storage(settle(stage, f"s3://{BUCKET}{tmp_path}", "me"))
    assert storage.where == f"s3://{BUCKET}{tmp_path}/plan/stages/small/checkpoints"
    begin(world, stage, storage=storage).checkpoints.save(small(world, 11), "stop")
    state = small(world, 1)
    load_subset(stage, 11, state.tensors(), world)
    assert whole(state) == expected(11)
    storage.note(11, MANIFEST, json.dumps({"schema": 1}))
    with pytest.raises(NothingToRestore, match=r"checkpoint 11 of 'small' .* manifest.json"):
        load_subset(stage, 11, state.tensors(), world)
