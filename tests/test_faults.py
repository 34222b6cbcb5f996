"""The faults are real, and what benches read from a run is what happened in it."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import planned_faults
import psutil
import pytest
from elastic_timeline import cost_of, new_updates, rates, recovered

from cluster import faults
from cluster.local import LocalCluster

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


@pytest.fixture
def family() -> Any:
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    yield parent, child
    for pid in (child.pid, parent.pid):
        faults.end_all([pid])
    parent.wait()
    parent.stdout.close()


def test_a_lost_machine_takes_every_process_with_it(family: Any) -> None:
    parent, child = family
    assert faults.kill_tree(parent.pid) == 2
    assert parent.wait(10) == -signal.SIGKILL
    assert faults.when(lambda: not faults.is_alive(child), 10)
    assert faults.kill_tree(parent.pid) == 0, "a machine is lost once"


def test_a_frozen_process_is_alive_and_goes_on_when_thawed(family: Any) -> None:
    parent, _ = family
    process = psutil.Process(parent.pid)
    faults.freeze(parent.pid)
    assert faults.when(lambda: process.status() == psutil.STATUS_STOPPED, 10)
    assert faults.is_alive(process)
    faults.thaw(parent.pid)
    assert faults.when(lambda: process.status() != psutil.STATUS_STOPPED, 10)


def test_waiting_for_what_does_not_come_ends() -> None:
    began = time.monotonic()
    assert not faults.when(lambda: False, 0.05)
    assert time.monotonic() - began < 5


def test_a_save_is_seen_while_it_is_written_and_not_while_an_old_one_is_deleted(
    tmp_path: Path,
) -> None:
    assert not faults.is_saving(tmp_path)
    (tmp_path / "checkpoints" / f"160.{time.time_ns()}.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "320").mkdir()
    assert not faults.is_saving(tmp_path)
    (tmp_path / "checkpoints" / "480.12.partial").mkdir()
    assert faults.is_saving(tmp_path)


@root_only
def test_a_small_disk_is_full_until_it_is_freed(tmp_path: Path) -> None:
    with faults.small_disk(tmp_path / "disk", 1_000_000) as disk:
        disk.fill(leave_bytes=8192)
        (disk.path / "small").write_bytes(bytes(100))
        with pytest.raises(OSError, match="No space left"):
            (disk.path / "large").write_bytes(bytes(100_000))
        disk.free()
        (disk.path / "large").write_bytes(bytes(100_000))
    assert not list((tmp_path / "disk").iterdir()), "its content went with it"


@root_only
def test_a_folder_refuses_writes_only_while_it_is_asked_to(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("content")
    with (tmp_path / "open").open("w") as before, faults.refusing_writes(tmp_path):
        before.write("what was open stays so")
        assert (tmp_path / "there").read_text() == "content"
        with pytest.raises(OSError, match="Read-only") as caught:
            (tmp_path / "new").write_text("")
        assert caught.value.errno == errno.EROFS
    (tmp_path / "new").write_text("")


def test_a_planned_fault_happens_once_and_not_before_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned_faults.take("dit", 100) is None, "nothing is planned where nothing is set"
    monkeypatch.setenv(planned_faults.FOLDER, str(tmp_path))
    path = planned_faults.plan(tmp_path, "exit", "dit", 64, code=7)
    assert planned_faults.take("dit", 63) is None
    assert planned_faults.take("codec", 64) is None
    planned = planned_faults.take("dit", 72)
    assert planned is not None
    assert planned["code"] == 7
    assert not path.exists()
    assert planned_faults.take("dit", 80) is None


def test_a_drain_notice_names_the_node_and_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []
    answer = [True, ""]

    class Client:
        def __init__(self, address: str) -> None:
            assert address == "127.0.0.1:1"

        def drain_node(self, *fields: Any) -> list[Any]:
            told.append(fields)
            return answer

    monkeypatch.setattr("ray._raylet.GcsClient", Client)
    monkeypatch.setattr(LocalCluster, "address", "127.0.0.1:1")
    cluster = object.__new__(LocalCluster)
    node = type("Node", (), {"node_id": "ab12"})
    cluster.drain(node, 8.0)
    (name, reason, _, deadline_ms) = told[0]
    assert (name, reason) == ("ab12", 2)  # preemption, not idleness: work is moved, not waited for
    assert 7000 < deadline_ms - time.time() * 1000 <= 8001  # whole milliseconds
    answer[:] = [False, "unknown node"]
    with pytest.raises(RuntimeError, match="ab12: unknown node"):
        cluster.drain(node, 8.0)


def metric(wall: float, position: int, attempt: int, world: int) -> Any:
    return {"wall": wall, "stage": "dit", "attempt": attempt, "position": position,
            "world": world, "context": {}, "values": {"loss": 1.0}}  # fmt: skip


def event(wall: float, kind: str, position: int | None = None, **more: Any) -> Any:
    return {"wall": wall, "kind": kind, "stage": "dit", "position": position, "reason": "", **more}


# Updates of 8 samples a second; killed at 4.5 with a checkpoint at 16; goes on at 10.
METRICS = [
    *(metric(float(k), 8 * k, 1, 2) for k in range(1, 5)),
    *(metric(10.0 + 0.5 * k, 16 + 8 * k, 2, 1) for k in range(1, 5)),
]
EVENTS = [
    event(0.5, "start", 0),
    event(2.1, "publish", 16),
    event(5.0, "crash"),
    event(5.5, "launch"),
    event(8.0, "spawn"),
    event(10.0, "start", 16, phases={"restore": 0.3}),
]


def test_updates_done_again_are_not_new() -> None:
    assert [u.position for u in new_updates(METRICS, "dit")] == [8, 16, 24, 32, 40, 48]
    assert rates(METRICS, "dit", 8) == {2: 8.0, 1: 16.0}


def test_the_cost_of_a_crash_is_what_was_done_again_and_the_time_to_new_updates() -> None:
    cost = cost_of(EVENTS, METRICS, "dit", 4.5, batch=8)
    assert cost.stopped_s == 11.5 - 4.0
    assert (cost.lost_updates, cost.lost_s, cost.world) == (2, 1.0, 1)
    assert cost.phases_s == {
        "detect": 0.5, "teardown": 0.5, "launch": 2.5, "start": 2.0, "start.restore": 0.3,
        "redo": 1.0, "first_update": 0.5,
    }  # fmt: skip


def test_a_run_has_recovered_only_with_new_updates_of_a_new_attempt() -> None:
    assert recovered(EVENTS, METRICS, "dit", 4.5)
    assert not recovered(EVENTS, METRICS[:6], "dit", 4.5), "it has only done updates again"
    assert not recovered(EVENTS, METRICS[:4], "dit", 3.5), "the old attempt goes on"


def test_the_replayed_trace_has_the_nodes_that_were_counted() -> None:
    # By its path: on sys.path it would stand before Python's own `trace`.
    path = Path(__file__).parent / "bench" / "trace.py"
    spec = importlib.util.spec_from_file_location("bench_trace", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    steps = bench.schedule(56, 15.0, seed=0)
    levels = [bench.scaled(count) for count, ticks in bench.COUNTS for _ in range(ticks)]
    assert len(levels) == 56
    for tick, level in enumerate(levels):
        # Just before the next tick, when those drained for it have had their notice.
        done = [step for step in steps if step.after_s <= tick * 15.0]
        assert 1 + sum(1 if do == "add" else -1 for _, do, _ in done) == level
