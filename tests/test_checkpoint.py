"""Checkpoints: whole or not there, for any world, never a pickle, never lost to damage."""

import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import HALF, HALF_UPDATES, STAGE, Turn, blank_state, in_turn, whole_bytes, world_of_one
from worlds import run_world

from elastic import checkpoint_store
from elastic.checkpoint import Checkpoints, Fence, NothingToRestore, StaleAttempt, published
from elastic.checkpoint_manifest import problems
from elastic.checkpoint_store import DAMAGED, MANIFEST, LocalStorage
from elastic.data.order import updates_before
from elastic.ema import local
from elastic.files import write_atomic
from elastic.shard import own_part
from elastic.state import Progress, TrainState
from elastic.world import World
from models.fresh import named_generator


class Store(NamedTuple):
    """The checkpoints of one attempt, and the events that it sent."""

    checkpoints: Checkpoints
    events: list[tuple[str, int, str]]
    folder: Path


def _open(world: World, folder: Path) -> Store:
    """Begin an attempt at the stage in a folder; its checkpoints lie one folder below."""
    fence = world.from_first(Fence.take(folder) if world.is_first else None)
    events: list[tuple[str, int, str]] = []

    def event(kind: str, position: int, reason: str, **more: object) -> None:
        events.append((kind, position, reason))

    return Store(Checkpoints(folder, world, fence, event), events, folder / "checkpoints")


def _filled(world: World, samples: int, digest: str = "ab" * 16) -> TrainState:
    """A state in which every tensor has values of its own, the same on any world."""
    state = blank_state(world)
    for name, tensor in state.tensors().items():
        values = torch.randn(tensor.shape, generator=named_generator("filled", name, samples))
        local(tensor).copy_(own_part(values, tensor))
    state.progress.samples = samples
    state.progress.order_digest = digest
    return state


def _save(world: World, folder: Path, *positions: int) -> Store:
    store = _open(world, folder)
    for position in positions:
        store.checkpoints.save(_filled(world, position), "stop")
    return store


def _restored(world: World, folder: Path) -> tuple[TrainState, Store]:
    state, store = blank_state(world), _open(world, folder)
    assert store.checkpoints.restore_latest(state)
    return state, store


def _pass_on(world: World, source: Path, folder: Path) -> tuple[dict[str, bytes], Any, set[float]]:
    """Restore from one folder and save to another: tensors in full, progress, update counts."""
    state, _ = _restored(world, source)
    _open(world, folder).checkpoints.save(state, "stop")
    steps = {float(state.optimizer.state[p]["step"]) for p in state.model.parameters()}
    return whole_bytes(state), state.progress.as_json(), steps


def _begin(world: World, folder: Path) -> dict[str, bytes]:
    state = _filled(world, HALF)
    _open(world, folder).checkpoints.save(state, "stop")
    return whole_bytes(state)


def _kill_at(world: World, folder: Path, point: str) -> None:
    """Publish one checkpoint, then end by SIGKILL at a point of publishing the next."""
    store = _save(world, folder, 11)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "before the manifest":
        checkpoint_store.write_atomic = die  # type: ignore[assignment]  # this process ends here
    elif point == "while the manifest is written":
        os.replace = die  # type: ignore[assignment]  # this process ends here
    else:
        os.rename = die  # type: ignore[assignment]  # this process ends here
    store.checkpoints.save(_filled(world, 22), "stop")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage folder with whole checkpoints at 11 and 22; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved")
    _save(world, folder, 11, 22)
    return folder


@pytest.fixture
def stage_folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "stage"))


def test_any_world_restores_what_any_other_saved_bit_for_bit(tmp_path: Path) -> None:
    """1 -> 2 -> 3 -> 2: parameters, average, both moments, position, digest, update count."""
    sizes = (2, 3, 2)
    turns = [Turn(1, _begin, (tmp_path / "0",))]
    for number, size in enumerate(sizes):
        turns.append(Turn(size, _pass_on, (tmp_path / str(number), tmp_path / str(number + 1))))
    first, *rest = run_world(in_turn, 3, tmp_path, turns)[0]
    kinds = {name.split("/")[0] for name in first}
    assert kinds == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert updates_before(STAGE, HALF) == HALF_UPDATES
    for tensors, progress, steps in rest:
        assert tensors == first
        assert progress == Progress("tiny", HALF, "ab" * 16).as_json()
        assert steps == {HALF_UPDATES}
    for number in range(len(sizes) + 1):
        _require_no_world_in(tmp_path / str(number) / "checkpoints" / str(HALF) / MANIFEST)


def _require_no_world_in(manifest: Path) -> None:
    content = json.loads(manifest.read_text())
    assert set(content) == {"schema", "progress", "files", "sha256"}
    assert set(content["progress"]) == {"stage", "samples", "order_digest", "guard", "unjudged"}
    assert not re.search(r"rank|world|step", manifest.read_text())


POINTS = ["before the manifest", "while the manifest is written", "before the rename"]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_while_publishing_leaves_the_checkpoint_before(
    world: World, tmp_path: Path, point: str
) -> None:
    with pytest.raises(RuntimeError, match="died without a word"):
        run_world(_kill_at, 1, tmp_path, point)
    assert list((tmp_path / "checkpoints").glob("22.*.partial")), "it was killed too early or late"
    assert published(tmp_path / "checkpoints") == [11]
    state, store = _restored(world, tmp_path)
    assert whole_bytes(state) == whole_bytes(_filled(world, 11))
    assert store.events == []
    # What the kill left behind hinders nothing and goes away.
    store.checkpoints.save(_filled(world, 22), "stop")
    assert sorted(path.name for path in store.folder.iterdir()) == ["11", "22"]


def _tensor_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def _truncate(folder: Path) -> None:
    file = _tensor_file(folder)
    os.truncate(file, file.stat().st_size - 1)


def _flip(folder: Path) -> None:
    file = _tensor_file(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _change_manifest(old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / MANIFEST).read_text()
        assert old in text
        (folder / MANIFEST).write_text(text.replace(old, new))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (_truncate, r"safetensors has \d+ bytes, not \d+"),
    "a flipped bit": (_flip, "safetensors does not have the listed SHA-256"),
    "a missing file": (lambda folder: _tensor_file(folder).unlink(), "safetensors is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 90), "cannot be read"),
    "a list for a manifest": (
        lambda folder: (folder / MANIFEST).write_text("[]"),
        "manifest.json cannot be read",
    ),
    "a changed digest": (_change_manifest("abab", "acab"), "manifest.json does not have the SHA"),
    "a misspelt word": (_change_manifest('"bytes"', '"bytds"'), "manifest.json does not have"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_skipped_and_kept(
    world: World, stage_folder: Path, damage: str
) -> None:
    harm, expected = DAMAGES[damage]
    newest = stage_folder / "checkpoints/22"
    harm(newest)
    left = {path.name: path.read_bytes() for path in newest.iterdir()}
    state, store = _restored(world, stage_folder)
    assert state.progress.samples == 11
    assert whole_bytes(state) == whole_bytes(_filled(world, 11))
    ((kind, position, message),) = store.events
    assert (kind, position) == ("damaged_checkpoint", 22)
    assert message.startswith("checkpoint 22 is damaged and skipped: ")
    assert re.search(expected, message)
    # Later ones come and go; the damaged one stays, with a word about why.
    for samples in (15, 16, 33, 44):
        store.checkpoints.save(_filled(world, samples), "stop")
    assert published(store.folder) == [44, 33, 22]
    assert (newest / DAMAGED).read_text().strip() == message
    (newest / DAMAGED).unlink()
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == left


def test_a_checkpoint_at_the_position_of_a_damaged_one_sets_it_aside(
    world: World, stage_folder: Path
) -> None:
    _flip(stage_folder / "checkpoints/22")
    state, store = _restored(world, stage_folder)
    store.checkpoints.save(_filled(world, 22), "stop")
    assert problems(LocalStorage(store.folder), 22, thorough=True) == []
    (aside,) = store.folder.glob("22.*.replaced")
    assert (aside / DAMAGED).exists()
    assert "SHA-256" in (aside / DAMAGED).read_text()
    assert _restored(world, stage_folder)[0].progress.samples == 22
    assert state.progress.samples == 11


def test_many_damaged_ones_do_not_push_out_the_one_just_saved(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    _save(world, tmp_path, 11)
    for position in (50, 60, 70):
        shutil.copytree(folder / "11", folder / str(position))
        _flip(folder / str(position))
    _, store = _restored(world, tmp_path)
    assert [position for _, position, _ in store.events] == [70, 60, 50]
    store.checkpoints.save(_filled(world, 12), "stop")
    assert published(folder) == [70, 60, 50, 12, 11]


def test_where_nothing_whole_is_left_the_stage_does_not_silently_start_over(
    world: World, stage_folder: Path
) -> None:
    for position in ("11", "22"):
        _truncate(stage_folder / "checkpoints" / position)
    store = _open(world, stage_folder)
    with pytest.raises(NothingToRestore, match=r"none of the checkpoints 22, 11 .* move"):
        store.checkpoints.restore_latest(blank_state(world))
    assert [position for _, position, _ in store.events] == [22, 11]
    assert published(store.folder) == [22, 11]


def test_a_stage_without_checkpoints_has_none(world: World, tmp_path: Path) -> None:
    store = _open(world, tmp_path)
    assert published(store.folder) == []
    assert not store.checkpoints.restore_latest(blank_state(world))
    assert store.events == []


def test_the_newest_is_the_one_with_most_samples_not_the_last_name(
    world: World, tmp_path: Path
) -> None:
    _save(world, tmp_path, 99, 100)
    assert published(tmp_path / "checkpoints") == [100, 99]
    assert _restored(world, tmp_path)[0].progress.samples == 100


def test_the_last_two_whole_ones_are_kept(world: World, tmp_path: Path) -> None:
    store = _save(world, tmp_path, 11, 22, 33, 44)
    assert sorted(path.name for path in store.folder.iterdir()) == ["33", "44"]


def test_a_position_is_saved_once(world: World, tmp_path: Path) -> None:
    store = _save(world, tmp_path, 11)
    before = (store.folder / "11").stat().st_ino
    store.checkpoints.save(_filled(world, 11), "stop")
    assert (store.folder / "11").stat().st_ino == before
    assert [kind for kind, _, _ in store.events] == ["publish"]


def test_an_attempt_that_a_newer_one_replaced_publishes_nothing(
    world: World, tmp_path: Path
) -> None:
    old = _save(world, tmp_path, 11)
    new = _open(world, tmp_path)
    with pytest.raises(StaleAttempt, match=r"attempt 1 at .* may not publish: attempt 2 has begun"):
        old.checkpoints.save(_filled(world, 22), "stop")
    assert published(old.folder) == [11]
    new.checkpoints.save(_filled(world, 22), "stop")
    assert published(new.folder) == [22, 11]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_no_pickle_in_a_checkpoint_is_ever_run(
    world: World, stage_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, mark = stage_folder / "checkpoints/22", stage_folder / "went-off"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the bomb does not work, so its silence would say nothing"
    mark.unlink()
    assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json"}
    # Where torch.distributed.checkpoint's own format keeps its pickles.
    for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
        (newest / name).write_bytes(bomb)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint was read with torch.load")

    monkeypatch.setattr(torch, "load", refuse)
    state, _ = _restored(world, stage_folder)
    assert state.progress.samples == 22
    assert not mark.exists()


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "below" / "file"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
