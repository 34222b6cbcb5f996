"""Latent stores in a bucket: what is read by ranges, copied, gathered, and asked for again."""

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import Gate, asked_once, s3_server  # noqa: F401  # fixtures
from store_places import Place, a_bucket  # noqa: F401  # fixtures
from test_store import PRINT, VIDEO, _check, _fill, _schema, _write

from elastic.data import store_url
from elastic.data.schema import shard_file
from elastic.data.store import DamagedStore, LatentStore, SealedStore, per_sample_file


@pytest.fixture
def place(bucket: Place) -> Place:
    """A prefix of the bucket that nothing has been put to."""
    return bucket.below(uuid.uuid4().hex)


def _sealed(place: Place) -> tuple[LatentStore, str]:
    store = LatentStore.create(place.root, _schema())
    _fill(store)
    return store, store.seal()


def test_a_batch_is_asked_for_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = _sealed(place)
    sealed = SealedStore.open(place.root, PRINT)
    asked: list[int] = []
    folder = sealed._folder
    assert isinstance(folder, store_url.UrlFolder)
    ranges = folder._fs.cat_ranges

    def counting(names: list[str], *more: Any, **by: Any) -> list[bytes]:
        asked.append(len(names))
        found: list[bytes] = ranges(names, *more, **by)
        return found

    monkeypatch.setattr(folder._fs, "cat_ranges", counting)
    batch = sealed.read_batch(VIDEO, [9, 2, 5])
    without_text = sum(not len(text_LD) for text_LD in batch.texts_LD)
    assert asked == [3 * len(store.schema.arrays(VIDEO)) - without_text]


@pytest.fixture
def gate(
    server: str,
    asked_once: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Gate]:
    """What lies between this process and the server, for clients that are made from now on."""
    with Gate(server) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.address)
        yield found


def test_what_cannot_be_had_for_some_seconds_is_asked_for_again(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sealed(place)
    sealed = SealedStore.open(place.root, PRINT)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        gate.is_open = len(waited) == 2

    monkeypatch.setattr(store_url, "_pause", wait)
    gate.is_open = False
    batch = sealed.read_batch(VIDEO, range(11))
    assert len(waited) == 2
    assert batch.sample_ids.tolist() == list(range(100, 111))


def test_what_cannot_be_had_at_all_is_no_damage(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sealed(place)
    sealed = SealedStore.open(place.root, PRINT)
    monkeypatch.setattr(store_url, "_PATIENCE_S", 0.0)
    gate.is_open = False
    with pytest.raises(OSError, match=rf"{place.root}/{VIDEO}/latent/c\.0.*: "):
        sealed.read_batch(VIDEO, range(11))


def _copies() -> list[Path]:
    return list((Path(tempfile.gettempdir()) / f"restage-{os.getuid()}").iterdir())


def test_small_files_are_copied_once_for_all_processes_and_compared_each_time(
    place: Place,
) -> None:
    store, digest = _sealed(place)
    SealedStore.open(place.root, PRINT)
    column = per_sample_file(VIDEO, "sample_id")
    before = place.read(column)
    place.flip(column, 0, 1)
    SealedStore.open(place.root, PRINT)  # this machine has what was sealed
    (copy,) = [path for path in _copies() if path.read_bytes() == before]
    assert copy.parent.stat().st_mode & 0o077 == 0
    copy.write_bytes(before[:-9])
    with pytest.raises(DamagedStore, match=f"{column} is not what was sealed"):
        SealedStore.open(place.root, PRINT)
    assert not copy.exists()
    assert store.seal() == digest
    copy.write_bytes(before[:-9])
    _check(place.root, store.schema)
    assert copy.read_bytes() == before


def test_a_reader_keeps_its_copies_when_the_machine_is_swept(place: Place) -> None:
    store, _ = _sealed(place)
    sealed, plan = SealedStore.open(place.root, PRINT), LatentStore.open(place.root).schema
    for path in _copies():
        path.unlink()
    assert sealed.sample_ids(VIDEO).tolist() == list(range(100, 111))
    assert plan == store.schema


def test_copies_that_nobody_used_for_a_month_are_removed(place: Place, bucket: Place) -> None:
    _sealed(place)
    SealedStore.open(place.root, PRINT)
    old = time.time() - 31 * 86400
    for path in _copies():
        os.utime(path, (old, old))
    other = LatentStore.create(bucket.below(uuid.uuid4().hex).root, _schema(videos=5))
    LatentStore.open(other.folder.where)
    assert len(_copies()) == len(other.schema.buckets)


def test_copies_are_not_kept_where_others_could_change_them(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _sealed(place)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"restage-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"restage-{os.getuid()}").chmod(0o777)
    with pytest.raises(OSError, match="not this user's alone"):
        SealedStore.open(place.root, PRINT)


def test_sealing_gathers_the_log_in_one_object(place: Place) -> None:
    store, digest = _sealed(place)
    assert len(place.logs()) == 1
    assert store.missing() == []
    place.remove(shard_file(VIDEO, "latent", 1))
    assert store.missing() == [(VIDEO, 1)]
    _write(LatentStore.open(place.root), (VIDEO, 1))
    assert len(place.logs()) == 2
    assert store.seal() == digest
    assert len(place.logs()) == 1


def test_a_log_that_was_gathered_and_not_removed_says_the_same(place: Place) -> None:
    store, digest = _sealed(place)
    ((name, lines),) = place.logs().items()
    place.write(name.replace("all", "other"), lines)
    assert store.missing() == []
    assert store.seal() == digest
