"""Where checkpoints lie and whose the place is; what is damage, and what only does not answer."""

import ctypes
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import BUCKET, s3_server  # noqa: F401  # a fixture
from small_state import begin, expected, restored, small, whole
from tiny import world_of_one

from elastic import checkpoint_store
from elastic.checkpoint import Fence, NothingToRestore, published
from elastic.checkpoint_manifest import _digest_of
from elastic.checkpoint_place import (
    HOME,
    Register,
    check_place,
    open_storage,
    place_for,
    settle,
    storage_of,
)
from elastic.checkpoint_read import Part, unfit
from elastic.checkpoint_store import DAMAGED, MANIFEST, Draft, Keep, LocalStorage
from elastic.errors import InputError, StageBlocked
from elastic.settings import read_settings
from elastic.world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def _in_stage(world: World, stage: Path, place: str) -> None:
    begin(world, stage, storage=open_storage(place)).checkpoints.save(small(world, 11), "stop")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The folder of a stage in the run folder of one plan."""
    folder = tmp_path / "runs" / "plan" / "stages" / "small"
    folder.mkdir(parents=True)
    return folder


def test_a_setting_that_would_hide_checkpoints_is_refused(
    world: World, tmp_path: Path, stage: Path
) -> None:
    _in_stage(world, stage, settle(stage, None, "me"))
    elsewhere = str(tmp_path / "elsewhere")
    with pytest.raises(StageBlocked, match=r"'small' has its checkpoints \(newest: 11\) in .*"):
        settle(stage, elsewhere, "me")
    (stage / "checkpoints").rename(tmp_path / "unmounted")
    with pytest.raises(StageBlocked, match=r"'small' has its checkpoints \(newest: 11\) in .*"):
        settle(stage, elsewhere, "me")
    (tmp_path / "unmounted").rename(stage / "checkpoints")
    assert storage_of(stage).positions() == [11]


def test_checkpoints_lie_where_the_setting_says_on_a_local_path_too(
    world: World, tmp_path: Path, stage: Path
) -> None:
    _in_stage(world, stage, settle(stage, str(tmp_path / "fast"), "me"))
    there = tmp_path / "fast/plan/stages/small/checkpoints"
    assert (there / "11" / MANIFEST).exists()
    place = settle(stage, f"file://{tmp_path}/fast", "me")
    assert open_storage(place).positions() == [11]
    assert not (there / "11" / DAMAGED).exists()


@pytest.fixture(params=["a folder", "a URL"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "a folder":
        return str(tmp_path / "shared")
    request.getfixturevalue("server")
    return f"s3://{BUCKET}{tmp_path}/shared"


def test_a_place_belongs_to_the_run_that_asked_for_it_first(tmp_path: Path, shared: str) -> None:
    first, second = (tmp_path / name / "plan" / "stages" / "small" for name in "ab")
    for stage in (first, second):
        stage.mkdir(parents=True)
    place = settle(first, shared, "first")
    for _ in range(2):
        with pytest.raises(StageBlocked, match=f"holds the checkpoints of {first}; give another"):
            settle(second, shared, "second")
    assert settle(first, shared, "first") == place
    assert storage_of(second).where == str(second / "checkpoints")
    # A run folder that was removed and begun again is another run.
    with pytest.raises(StageBlocked, match="holds the checkpoints of"):
        settle(first, shared, "third")


def test_checkpoints_without_a_mark_are_taken_over_by_the_run_that_names_their_place(
    world: World, tmp_path: Path, stage: Path
) -> None:
    place = place_for(str(tmp_path / "shared"), stage)
    _in_stage(world, stage, place)
    with pytest.raises(StageBlocked, match=r"checkpoints \(newest: 11\) of a run that left no"):
        settle(tmp_path / "other" / "plan" / "stages" / "small", str(tmp_path / "shared"), "other")
    (stage / HOME).write_text(place)
    assert settle(stage, str(tmp_path / "shared"), "me") == place
    assert open_storage(place).positions() == [11]


def test_the_attempts_of_a_stage_have_one_name_and_other_stages_others(tmp_path: Path) -> None:
    first, again = Fence.take(tmp_path / "a"), Fence.take(tmp_path / "a")
    assert (first.attempt, again.attempt) == (1, 2)
    assert first.run == again.run != Fence.take(tmp_path / "b").run
    (tmp_path / "a" / "attempt.json").write_text('{"attempt": 7}')  # of an earlier version
    assert Fence.take(tmp_path / "a").attempt == 8


def test_a_place_for_checkpoints_is_checked_before_anything_starts() -> None:
    settings = read_settings(checkpoints="s3://bucket/runs", keep_last=3, keep_every=1000)
    assert (settings.checkpoints, settings.keep_last, settings.keep_every) == (
        "s3://bucket/runs", 3, 1000,
    )  # fmt: skip
    place = place_for("s3://bucket/runs/", Path("/x/plan/stages/one"))
    assert place == "s3://bucket/runs/plan/stages/one/checkpoints"
    check_place(None)
    check_place("/fast/disk")
    with pytest.raises(InputError, match=r"checkpoints 'nosuch://x'"):
        check_place("nosuch://x")
    with pytest.raises(InputError, match="empty"):
        check_place("")
    with pytest.raises(InputError, match="keep_last"):
        read_settings(keep_last=0)


def test_a_storage_that_does_not_answer_is_no_damage(world: World, tmp_path: Path) -> None:
    class Silent(LocalStorage):
        def read_into(self, position: int, name: str, start: int, into: memoryview) -> None:
            raise OSError(errno.EIO, "Input/output error")

    store = begin(world, tmp_path)
    store.checkpoints.save(small(world, 11), "due")
    store.checkpoints.save(small(world, 22), "stop")
    again = begin(world, tmp_path, storage=Silent(store.folder), retry_s=0.0)
    with pytest.raises(StageBlocked, match=r"storage unreachable: .*Input/output error"):
        again.checkpoints.restore_latest(small(world, 1))
    assert again.events == []
    assert not list(store.folder.rglob("damaged.txt"))
    assert whole(restored(world, tmp_path)[0]) == expected(22)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(world, tmp_path).checkpoints.save(small(world, 11), "stop")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    store = begin(world, tmp_path, retry_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(StageBlocked, match="Permission denied"):
            store.checkpoints.restore_latest(small(world, 1))
    assert store.checkpoints.restore_latest(small(world, 1))


def test_a_place_that_has_lost_all_that_was_published_is_no_reason_to_start_over(
    world: World, tmp_path: Path
) -> None:
    begin(world, tmp_path).checkpoints.save(small(world, 11), "stop")
    (tmp_path / "checkpoints").rename(tmp_path / "unmounted")
    store = begin(world, tmp_path)
    with pytest.raises(NothingToRestore, match=r"newest: 11.* nothing is in .*published.json"):
        store.checkpoints.restore_latest(small(world, 1))
    (tmp_path / "published.json").unlink()
    assert not store.checkpoints.restore_latest(small(world, 1))


def test_a_checkpoint_that_has_gone_is_named_and_the_one_before_restored(
    world: World, tmp_path: Path
) -> None:
    store = begin(world, tmp_path)
    for samples in (5, 11, 22):
        store.checkpoints.save(small(world, samples), "stop")
    (store.folder / "22").rename(tmp_path / "gone")
    state, again = restored(world, tmp_path)
    assert whole(state) == expected(11)
    ((kind, position, message),) = again.events
    assert (kind, position) == ("damaged_checkpoint", 22)
    assert "manifest.json cannot be read" in message


def test_old_ones_are_deleted_without_the_fence_and_drafts_of_newer_attempts_spared(
    world: World, tmp_path: Path
) -> None:
    class Deleting(LocalStorage):
        def delete(self, position: int) -> None:
            newer = Fence.take(tmp_path)  # would wait for ever if the fence were held
            self.prepare(Draft(99, newer.attempt))
            super().delete(position)

    storage = Deleting(tmp_path / "checkpoints")
    store = begin(world, tmp_path, storage=storage, keep=Keep(last=1))
    store.checkpoints.save(small(world, 11), "stop")
    store.checkpoints.save(small(world, 22), "stop")
    assert published(store.folder) == [22]
    assert [path.name for path in store.folder.glob("*.partial")] == ["99.2.partial"]
    assert Register(tmp_path).positions() == {22}


def _change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.__setitem__(key, value)


FIELDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no schema": lambda content: content.pop("schema"),
    "no progress": lambda content: content.pop("progress"),
    "another progress": _change("progress", {"samples": 22, "steps": 1}),
    "files as a list": _change("files", ["00000.safetensors"]),
    "files without a size": _change("files", {"00000.safetensors": {}}),
    "a size in words": _change("files", {"00000.safetensors": {"bytes": "many", "sha256": ""}}),
    "another stage": lambda content: content["progress"].update(stage="other"),
}


@pytest.mark.parametrize("change", FIELDS)
def test_a_manifest_with_a_right_digest_and_wrong_fields_is_damage(
    world: World, tmp_path: Path, change: str
) -> None:
    store = begin(world, tmp_path)
    store.checkpoints.save(small(world, 11), "due")
    store.checkpoints.save(small(world, 22), "stop")
    path = store.folder / "22" / MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    FIELDS[change](content)
    content["sha256"] = _digest_of(content)
    path.write_text(json.dumps(content))
    state, again = restored(world, tmp_path)
    assert whole(state) == expected(11)
    assert [(kind, position) for kind, position, _ in again.events] == [("damaged_checkpoint", 22)]
    again.checkpoints.save(small(world, 33), "stop")
    assert published(store.folder) == [33, 22, 11]


Tensors = dict[str, torch.Tensor]
STATES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "another dtype": (lambda live: live.update({"critic/w": live["critic/w"].double()}), "float32"),
    "another shape": (lambda live: live.update({"critic/w": torch.zeros(3, 3)}), r"\(3, 2\)"),
    "one more": (lambda live: live.update(new=torch.zeros(2)), "new is in none of its files"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_that_does_not_fit_the_state_is_damage_and_loads_nothing(
    world: World, tmp_path: Path, state: str
) -> None:
    change, message = STATES[state]
    begin(world, tmp_path).checkpoints.save(small(world, 11), "stop")
    other, store = small(world, 1), begin(world, tmp_path)
    change(other.tensors())
    before = whole(other)
    with pytest.raises(NothingToRestore):
        store.checkpoints.restore_latest(other)
    assert re.search(message, store.events[0][2])
    assert whole(other) == before


def test_rows_that_are_missing_are_seen_before_anything_is_loaded() -> None:
    def part(begin: int, rows: int) -> Part:
        return Part("f", torch.float32, (rows, 2), (begin, 0), 0)

    def fault_of(*parts: Part) -> str:
        held = {("w", p.offsets): p for p in parts}
        return "; ".join(unfit(held, {"w": torch.zeros(4, 2)}))

    assert fault_of(part(0, 1), part(1, 3)) == ""
    assert "rows 1 to 2" in fault_of(part(0, 1), part(2, 2))
    assert "rows 3 to 4" in fault_of(part(0, 3))
    assert "(5, 2)" in fault_of(part(0, 5))


class Killed(BaseException):
    """A process ends here."""


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("last", range(5))
def test_a_kill_while_one_replaces_another_at_its_position_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, in_one_step: bool
) -> None:
    """Killed before the rename of that number; without the exchange there is one weak moment."""
    storage, folder = LocalStorage(tmp_path / "checkpoints"), tmp_path / "checkpoints"
    storage.prepare(Draft(22, 1))
    storage.publish(Draft(22, 1), b"damaged")
    storage.prepare(Draft(22, 2))
    left, rename, library = [last], os.rename, ctypes.CDLL(None, use_errno=True)

    def step(do: Callable[..., Any], *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return do(*args)

    class Library:
        if in_one_step:

            def renameat2(self, *args: Any) -> Any:
                return step(library.renameat2, *args)

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library())
    monkeypatch.setattr(os, "rename", lambda *args: step(rename, *args))
    with suppress(Killed):
        storage.publish(Draft(22, 2), b"good")
    held = {path.parent.name: path.read_bytes() for path in folder.rglob(MANIFEST)}
    assert sorted(held.values()) == [b"damaged", b"good"]
    if in_one_step:
        assert held["22"] == (b"damaged" if last < 2 else b"good")
    else:
        assert held.get("22") == {2: None, 3: b"good", 4: b"good"}.get(last, b"damaged")


def test_the_folder_that_is_made_survives_a_loss_of_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(checkpoint_store, "fsync_dir", flushed.append)
    LocalStorage(tmp_path / "run" / "checkpoints").prepare(Draft(11, 1))
    assert flushed == [tmp_path, tmp_path / "run"]


def test_a_file_that_the_storage_cannot_hold_is_said_before_anything_is_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStorage, "largest_file", 2**20 + 500)
    store = begin(world, tmp_path)
    store.checkpoints.save(small(world, 11), "due")
    store.checkpoints.wait()
    ((kind, _, reason),) = store.events
    assert kind == "save_failed"
    assert "checkpoint 11 has a file of 0.000 GB, 0.001 GB are the most in" in reason
    assert not store.folder.exists()
    monkeypatch.setattr(LocalStorage, "largest_file", 2**21)
    store.checkpoints.save(small(world, 22), "stop")
    assert published(store.folder) == [22]
