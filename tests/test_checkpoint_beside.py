"""Saves beside the training: what they hold, how they end, and what is left where they cannot."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from small_state import DEADLINE_S, Gated, Refusing, begin, expected, restored, small, whole
from tiny import Turn, in_turn, world_of_one
from worlds import run_world

from elastic.checkpoint import StaleAttempt, published
from elastic.checkpoint_store import Keep, LocalStorage
from elastic.ema import local
from elastic.errors import StageBlocked
from elastic.world import World

SIZES = (1, 2, 3, 4)
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def _save_on(world: World, folder: Path) -> None:
    store = begin(world, folder / str(world.size))
    store.checkpoints.save(small(world, 5), "due")
    store.checkpoints.save(small(world, 10 * world.size), "due")
    store.checkpoints.wait()
    assert [kind for kind, _, _ in store.events] == ["publish", "publish"]


def _restore_all(world: World, folder: Path) -> list[dict[str, bytes]]:
    return [whole(restored(world, folder / str(size))[0]) for size in SIZES]


def test_any_world_restores_what_any_other_saved_beside_its_training(tmp_path: Path) -> None:
    """a -> b for all a, b in 1..4: parameters, average, moments and what every rank has whole."""
    saves = [Turn(size, _save_on, (tmp_path,)) for size in SIZES]
    reads = [Turn(size, _restore_all, (tmp_path,)) for size in SIZES]
    played = run_world(in_turn, max(SIZES), tmp_path, saves + reads)
    for turn, size in enumerate(SIZES, start=len(saves)):
        for rank in range(size):
            assert played[rank][turn] == [expected(10 * a) for a in SIZES]


def test_torchs_own_reader_reads_a_checkpoint(world: World, tmp_path: Path) -> None:
    begin(world, tmp_path).checkpoints.save(small(world, 11), "stop")
    state = small(world, 1)
    reader = dcp.HuggingFaceStorageReader(str(tmp_path / "checkpoints" / "11"))
    dcp.load(cast(dict[str, Any], state.tensors()), storage_reader=reader)
    assert whole(state) == expected(11)


def test_a_save_holds_the_values_of_its_moment_though_updates_go_on(
    world: World, tmp_path: Path
) -> None:
    storage = Gated(tmp_path / "checkpoints")
    store, state = begin(world, tmp_path, storage=storage), small(world, 11)
    store.checkpoints.save(state, "due")
    assert storage.entered.wait(DEADLINE_S)
    for tensor in state.tensors().values():
        local(tensor).mul_(2).add_(1)
    state.progress.samples = 12
    state.progress.guard["late"] = [1.0]
    store.checkpoints.poll()
    assert store.events == []
    assert published(store.folder) == []
    storage.gate.set()
    store.checkpoints.wait()
    assert store.events == [("publish", 11, "due")]
    assert set(store.times[0]) == {"seconds", "background"}
    state, _ = restored(world, tmp_path)
    assert whole(state) == expected(11)
    assert state.progress.guard == {}


def test_the_end_of_a_save_is_told_once_by_the_poll_after_it(world: World, tmp_path: Path) -> None:
    store = begin(world, tmp_path)
    store.checkpoints.save(small(world, 11), "due")
    store.checkpoints.abandon(DEADLINE_S)  # it has ended, and nobody has looked
    assert store.events == []
    store.checkpoints.poll()
    store.checkpoints.poll()
    store.checkpoints.wait()
    assert store.events == [("publish", 11, "due")]


def test_a_last_save_at_the_position_in_flight_finishes_that_one(
    world: World, tmp_path: Path
) -> None:
    storage = Gated(tmp_path / "checkpoints")
    store, state = begin(world, tmp_path, storage=storage), small(world, 11)
    store.checkpoints.save(state, "due")
    storage.gate.set()
    store.checkpoints.save(state, "finished")
    assert store.events == [("publish", 11, "finished")]
    assert store.times[0]["background"] == 0.0
    assert published(store.folder) == [11]


def test_one_save_is_in_flight_at_a_time(world: World, tmp_path: Path) -> None:
    storage = Gated(tmp_path / "checkpoints")
    store = begin(world, tmp_path, storage=storage)
    storage.gate.set()
    for samples in (11, 22, 33):
        store.checkpoints.save(small(world, samples), "due")
    store.checkpoints.save(small(world, 44), "stop")
    assert store.events == [("publish", n, "due") for n in (11, 22, 33)] + [("publish", 44, "stop")]
    assert whole(restored(world, tmp_path)[0]) == expected(44)


def _die_beside(world: World, folder: Path) -> None:
    storage = Gated(folder / "checkpoints")
    storage.gate.set()
    store = begin(world, folder, storage=storage)
    store.checkpoints.save(small(world, 11), "stop")
    storage.gate.clear()
    storage.entered.clear()
    store.checkpoints.save(small(world, 22), "due")
    assert storage.entered.wait(DEADLINE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_during_a_save_beside_the_training_leaves_the_checkpoint_before(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="died without a word"):
        run_world(_die_beside, 1, tmp_path)
    assert list((tmp_path / "checkpoints").glob("22.*.partial")), "it was killed too early or late"
    state, store = restored(world, tmp_path)
    assert whole(state) == expected(11)
    assert store.events == []


def test_an_attempt_that_was_replaced_during_its_save_publishes_nothing(
    world: World, tmp_path: Path
) -> None:
    storage = Gated(tmp_path / "checkpoints")
    old = begin(world, tmp_path, storage=storage)
    old.checkpoints.save(small(world, 22), "due")
    assert storage.entered.wait(DEADLINE_S)
    new = begin(world, tmp_path)
    new.checkpoints.save(small(world, 11), "stop")
    storage.gate.set()
    with pytest.raises(StaleAttempt, match=r"attempt 1 at .* attempt 2 has begun"):
        old.checkpoints.wait()
    assert published(old.folder) == [11]
    with pytest.raises(StaleAttempt):
        old.checkpoints.save(small(world, 33), "stop")
    assert whole(restored(world, tmp_path)[0]) == expected(11)


def test_a_failed_save_is_told_and_the_next_one_is_tried(world: World, tmp_path: Path) -> None:
    errors: list[OSError | None] = [None, FULL, None]
    storage = Refusing(tmp_path / "checkpoints", lambda: errors.pop(0))
    store = begin(world, tmp_path, storage=storage)
    for samples in (11, 22, 33):
        store.checkpoints.save(small(world, samples), "due")
        store.checkpoints.wait()
    assert [(kind, position) for kind, position, _ in store.events] == [
        ("publish", 11), ("save_failed", 22), ("publish", 33),
    ]  # fmt: skip
    assert "No space left" in store.events[1][2]
    assert store.times[1].keys() == store.times[0].keys(), "its time is known as that of others is"
    assert sorted(path.name for path in store.folder.iterdir()) == ["11", "33"]


def test_without_room_nothing_is_written_and_the_numbers_are_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path / "checkpoints")
    monkeypatch.setattr(storage, "free_bytes", lambda: 100_000)
    store = begin(world, tmp_path, storage=storage)
    store.checkpoints.save(small(world, 11), "due")
    store.checkpoints.wait()
    ((kind, _, reason),) = store.events
    assert kind == "save_failed"
    assert "checkpoint 11 needs 0.000 GB, 0.000 GB are free in" in reason
    assert "--keep-last" in reason
    assert not store.folder.exists()


def test_a_last_save_is_tried_until_the_storage_is_back(world: World, tmp_path: Path) -> None:
    errors: list[OSError | None] = [FULL, None]
    storage = Refusing(tmp_path / "checkpoints", lambda: errors.pop(0))
    store = begin(world, tmp_path, storage=storage)
    store.checkpoints.save(small(world, 11), "finished")
    assert [kind for kind, _, _ in store.events] == ["save_failed", "publish"]
    failed, done = store.times
    assert done["seconds"] >= failed["seconds"] + 0.5, "the pause, and what was tried before it"
    assert failed["background"] == done["background"] == 0.0
    assert whole(restored(world, tmp_path)[0]) == expected(11)


def test_a_last_save_that_cannot_be_written_ends_in_one_message(
    world: World, tmp_path: Path
) -> None:
    errors: list[OSError | None] = [None, FULL]
    storage = Refusing(tmp_path / "checkpoints", lambda: errors.pop(0))
    store = begin(world, tmp_path, storage=storage, retry_s=0.0)
    store.checkpoints.save(small(world, 11), "due")
    with pytest.raises(StageBlocked, match=r"22 could not be written .* No space .* 11 is whole"):
        store.checkpoints.save(small(world, 22), "stop")
    assert sorted(path.name for path in store.folder.iterdir()) == ["11"]
    assert whole(restored(world, tmp_path)[0]) == expected(11)


def _fail_on_the_last_rank(world: World, folder: Path) -> list[tuple[str, int, str]]:
    errors: list[OSError | None] = [None, None]
    if world.rank == world.size - 1:
        errors[0] = OSError(errno.EIO, "Input/output error")
    storage = Refusing(folder / "checkpoints", lambda: errors.pop(0))
    store = begin(world, folder, storage=storage)
    for samples in (11, 22):
        store.checkpoints.save(small(world, samples), "due")
        while not store.events or store.events[-1][1] != samples:
            store.checkpoints.poll()
    return store.events


def test_a_rank_whose_write_fails_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    events = run_world(_fail_on_the_last_rank, 2, tmp_path)
    assert events[0] == events[1]
    assert [(kind, position) for kind, position, _ in events[0]] == [
        ("save_failed", 11), ("publish", 22),
    ]  # fmt: skip
    assert published(tmp_path / "checkpoints") == [22]


@settings(deadline=None)
@given(
    st.integers(1, 4), st.none() | st.integers(50, 400), st.integers(20, 200), st.integers(1, 40)
)
def test_no_more_are_kept_than_plan_counts(
    last: int, every: int | None, interval: int, num: int
) -> None:
    keep = Keep(last, every)
    positions = [interval * (n + 1) for n in range(num)]
    assert len(keep.chosen(positions)) <= keep.most(positions[-1])


def test_one_in_so_many_samples_is_kept_for_good(world: World, tmp_path: Path) -> None:
    store = begin(world, tmp_path, keep=Keep(last=1, every=100))
    for samples in (40, 80, 120, 160, 200, 260, 310, 350):
        store.checkpoints.save(small(world, samples), "due")
    store.checkpoints.wait()
    # The first at or after 100, 200 and 300, and the newest.
    assert published(store.folder) == [350, 310, 200, 120]


def test_half_of_a_checkpoint_deleted_is_named_and_the_one_before_restored(
    world: World, tmp_path: Path
) -> None:
    store = begin(world, tmp_path)
    store.checkpoints.save(small(world, 11), "due")
    store.checkpoints.save(small(world, 22), "stop")
    (store.folder / "22" / "00000.safetensors").unlink()
    state, again = restored(world, tmp_path)
    assert whole(state) == expected(11)
    ((kind, position, message),) = again.events
    assert (kind, position) == ("damaged_checkpoint", 22)
    assert "00000.safetensors is missing" in message


def test_a_manifest_that_names_files_elsewhere_is_not_followed(
    world: World, tmp_path: Path
) -> None:
    from elastic.checkpoint_manifest import encode, read_manifest

    store = begin(world, tmp_path)
    store.checkpoints.save(small(world, 11), "due")
    store.checkpoints.save(small(world, 22), "stop")
    manifest = read_manifest(LocalStorage(store.folder), 22)
    astray = {f"../11/{name}": entry for name, entry in manifest.files.items()}
    (store.folder / "22" / "manifest.json").write_bytes(encode(manifest.progress.as_json(), astray))
    state, again = restored(world, tmp_path)
    assert whole(state) == expected(11)
    assert "which is no name of a file of its folder" in again.events[0][2]
