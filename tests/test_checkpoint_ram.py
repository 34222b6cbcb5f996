"""Copies in the memory of the node: a restart reads no storage, and never a wrong byte."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_state import begin, expected, restored, small, whole
from tiny import world_of_one
from worlds import run_world

from elastic import checkpoint_ram, checkpoint_read
from elastic.checkpoint_ram import Memory, RamCopies, group_limits
from elastic.world import World

GB = 10**9


@pytest.fixture(autouse=True)
def _roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a node with room, whatever this machine has."""
    monkeypatch.setattr(checkpoint_ram, "memory_for", _much)


def _much(_: Path) -> Memory:
    return Memory(free=10 * GB, total=10 * GB)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


def _ram(stage: Path, shm: Path) -> RamCopies:
    return RamCopies(stage, os.getpid(), shm)


def _copies(shm: Path) -> list[str]:
    """Position and name of each copy that a restore would look at."""
    return sorted(f"{p.parent.name}/{p.name}" for p in shm.glob("*/[0-9]*/*"))


def _saved(world: World, stage: Path, shm: Path) -> None:
    store = begin(world, stage, ram=_ram(stage, shm))
    store.checkpoints.save(small(world, 11), "due")
    store.checkpoints.save(small(world, 22), "stop")


def test_a_restart_on_the_same_node_reads_no_tensor_from_the_storage(
    world: World, tmp_path: Path, shm: Path
) -> None:
    _saved(world, tmp_path, shm)
    assert _copies(shm) == ["22/00000.safetensors"]  # the newest alone
    # What is read is not the storage: the file there has other bytes and the same size.
    stored = tmp_path / "checkpoints/22/00000.safetensors"
    stored.write_bytes(bytes(stored.stat().st_size))
    state, store = restored(world, tmp_path, ram=_ram(tmp_path, shm))
    assert whole(state) == expected(22)
    read = store.checkpoints.restored_from
    assert read.storage == 0 < read.ram
    assert store.events == []


@pytest.mark.parametrize("harm", ["flipped", "cut off", "gone"])
def test_a_copy_that_is_not_what_was_published_is_not_used(
    world: World, tmp_path: Path, shm: Path, harm: str
) -> None:
    _saved(world, tmp_path, shm)
    (copy,) = shm.glob("*/22/*")
    data = bytearray(copy.read_bytes())
    data[-5] ^= 1
    if harm == "gone":
        copy.unlink()
    else:
        copy.write_bytes(data if harm == "flipped" else data[:-1])
    state, store = restored(world, tmp_path, ram=_ram(tmp_path, shm))
    assert whole(state) == expected(22)
    assert store.checkpoints.restored_from.ram == 0
    assert store.events == []


def _on_two_nodes(
    world: World, stage: Path, shm: Path
) -> list[tuple[dict[str, bytes], dict[str, int]]]:
    """Each rank is a node; then one node of two has lost its memory; then the ranks change."""
    with pytest.MonkeyPatch.context() as patch:  # the process plays in other worlds after this
        patch.setattr(checkpoint_ram, "memory_for", _much)
        return _in_turns(world, stage, shm, patch)


def _in_turns(
    world: World, stage: Path, shm: Path, patch: pytest.MonkeyPatch
) -> list[tuple[dict[str, bytes], dict[str, int]]]:
    results = []
    for host in (world.rank, world.rank, 1 - world.rank):
        patch.setattr(checkpoint_read, "host", lambda host=host: f"node-{host}")
        here = shm / str(host)
        here.mkdir(exist_ok=True)
        if not results:
            _saved(world, stage, here)
        state, store = restored(world, stage, ram=_ram(stage, here))
        results.append((whole(state), store.checkpoints.restored_from._asdict()))
        world.barrier()
        if len(results) == 1 and world.rank == 1:
            _ram(stage, here).remove()
        world.barrier()
    return results


def test_each_node_reads_what_it_holds_and_the_storage_for_the_rest(
    tmp_path: Path, shm: Path
) -> None:
    same, lost, swapped = run_world(_on_two_nodes, 2, tmp_path, shm)[0]
    for tensors, _ in (same, lost, swapped):
        assert tensors == expected(22)
    # What every rank has whole lies in one node's file; the other reads it in the storage.
    assert same[1]["ram"] > same[1]["storage"] > 0
    assert same[1]["ram"] > lost[1]["ram"] > 0
    assert lost[1]["storage"] > same[1]["storage"]
    assert sum(same[1].values()) == sum(lost[1].values()) == sum(swapped[1].values())


def test_the_memory_of_an_older_copy_is_used_again_and_no_byte_of_it_is_left(
    world: World, tmp_path: Path, shm: Path
) -> None:
    store = begin(world, tmp_path, ram=_ram(tmp_path, shm))
    held = set()
    for samples in (11, 22, 33, 44, 55):
        store.checkpoints.save(small(world, samples), "due")
        store.checkpoints.wait()
        held |= {path.stat().st_ino for path in shm.rglob("*.safetensors")}
        assert _copies(shm) == [f"{samples}/00000.safetensors"]
    assert len(held) == 2
    state, again = restored(world, tmp_path, ram=_ram(tmp_path, shm))
    assert whole(state) == expected(55)
    assert again.checkpoints.restored_from.storage == 0


def test_a_finished_stage_leaves_nothing_in_memory(world: World, tmp_path: Path, shm: Path) -> None:
    _saved(world, tmp_path, shm)
    store = begin(world, tmp_path, ram=_ram(tmp_path, shm))
    store.checkpoints.save(small(world, 33), "finished")
    assert list(shm.iterdir()) == []


def test_copies_of_a_run_that_is_gone_are_removed_and_ones_own_taken_over(
    world: World, tmp_path: Path, shm: Path
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for name in ("mine", "other"):
        with RamCopies(tmp_path / name, gone.pid, shm).create(11, "f.safetensors", 1) as sink:
            assert sink is not None
            sink.write(memoryview(b"x"))
    RamCopies(tmp_path / "alive", os.getpid(), shm)
    assert len(list(shm.iterdir())) == 3
    gone.communicate(b"\n")
    mine = RamCopies(tmp_path / "mine", os.getpid(), shm)
    assert _copies(shm) == ["11/f.safetensors"]
    assert mine.find(11, "f.safetensors", 1) is not None
    assert len(list(shm.iterdir())) == 2


def test_an_owner_is_more_than_a_number_that_the_kernel_gives_again(
    tmp_path: Path, shm: Path
) -> None:
    RamCopies(tmp_path / "old", os.getpid(), shm)
    (mark,) = shm.rglob("owner")
    mark.write_text(json.dumps({"pid": os.getpid(), "started": 1.0}))
    RamCopies(tmp_path / "new", os.getpid(), shm)
    assert len(list(shm.iterdir())) == 1


def test_where_memory_is_short_there_is_no_copy_and_the_save_goes_on(
    world: World, tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_ram, "memory_for", lambda _: Memory(free=GB // 5, total=GB))
    _saved(world, tmp_path, shm)
    assert _copies(shm) == []
    state, store = restored(world, tmp_path, ram=_ram(tmp_path, shm))
    assert whole(state) == expected(22)
    assert store.checkpoints.restored_from.ram == 0


def test_the_ranks_of_a_node_share_its_memory(tmp_path: Path, shm: Path) -> None:
    for ranks, num_bytes, has_room in ((1, 7 * GB, True), (4, 7 * GB, False), (4, GB, True)):
        ram = RamCopies(tmp_path / "stage", os.getpid(), shm, ranks)
        assert ram._has_room(num_bytes) is has_room


def test_the_limit_of_a_control_group_counts_and_so_do_those_above_it(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("0::/pod/job\n")
    for name, limit in ((".", None), ("pod", "1000"), ("pod/job", "max")):
        folder = groups / name
        folder.mkdir(parents=True, exist_ok=True)
        if limit is not None:
            (folder / "memory.max").write_text(limit)
            (folder / "memory.current").write_text("700")
            (folder / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert group_limits(groups, own) == [Memory(free=450, total=1000)]
    assert group_limits(groups / "missing", tmp_path / "missing") == []


def test_memory_is_given_before_a_copy_is_begun_or_the_copy_is_left_out(
    tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with _ram(tmp_path, shm).create(11, "f.safetensors", 100) as sink:
        assert sink is None
    assert list(shm.glob("*/11/*")) == []


def test_memory_of_ranks_that_have_gone_is_given_back(tmp_path: Path, shm: Path) -> None:
    ram = _ram(tmp_path, shm)
    for position, ranks in ((11, 3), (22, 3), (33, 1)):
        for rank in range(ranks):
            with ram.create(position, f"{rank}.safetensors", 1) as sink:
                assert sink is not None
                sink.write(memoryview(b"x"))
        ram.keep_only(position)
    held = sorted(f"{p.parent.name}/{p.name}" for p in shm.rglob("*.safetensors"))
    assert held == ["33/0.safetensors", "spare/0.safetensors"]


def test_a_copy_that_goes_while_it_is_looked_at_is_not_used(
    world: World, tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(world, tmp_path, shm)
    is_good = checkpoint_read._is_good

    def then_gone(source: checkpoint_read.Source, name: str, copy: Path) -> bool:
        good = is_good(source, name, copy)
        copy.unlink()
        return good

    monkeypatch.setattr(checkpoint_read, "_is_good", then_gone)
    state, store = restored(world, tmp_path, ram=_ram(tmp_path, shm))
    assert whole(state) == expected(22)
    assert store.checkpoints.restored_from.ram == 0
    assert store.events == []


def test_memory_that_fills_up_during_a_save_costs_the_copy_alone(
    world: World, tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: memoryview) -> int:
            raise OSError("no space left")

        def close(self) -> None: ...

    start = checkpoint_ram._Copy.__init__

    def begins(copy: checkpoint_ram._Copy, *of: Any) -> None:
        start(copy, *of)
        copy._file.close()
        copy._file = Full()  # type: ignore[assignment]  # a file on a full tmpfs

    monkeypatch.setattr(checkpoint_ram._Copy, "__init__", begins)
    _saved(world, tmp_path, shm)
    assert _copies(shm) == []
    assert whole(restored(world, tmp_path, ram=_ram(tmp_path, shm))[0]) == expected(22)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, shm: Path) -> None:
    RamCopies(tmp_path / "stage", os.getpid(), shm)
    (folder,) = shm.iterdir()
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    with RamCopies(tmp_path / "stage", os.getpid(), shm).create(11, "f", 1) as sink:
        assert sink is None
