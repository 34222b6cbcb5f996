"""Encoding ahead of a later stage's turn, on a real cluster; training comes first."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cluster.local import LocalCluster
from elastic.data.moving_shapes import write_demo_videos
from elastic.folders import RunFolder
from elastic.journal import latest_values, read_events, read_metrics
from elastic.ray_ahead import Stopped, Tasks
from elastic.ray_nodes import Spare, slots
from models.fresh import fresh_parameters, named_generator

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE.parent), str(HERE)])
# Holds the first stage's training process while the second one is encoded, if there is a place.
DRIVER = """
import os, signal, sys
from elastic.course import train_plan
from elastic.drive import run_course, start_cluster
from elastic.journal import read_events
from elastic.settings import read_settings
from stages.plan import load_plan

settings = read_settings(storage=sys.argv[2], hang_after=600, aim=False)
plan, has_place, held = load_plan(sys.argv[1]), sys.argv[3] == "place", []
cluster = start_cluster(settings, cpus=1)

def watch(course, latest):
    events = read_events(course.folder.root)
    is_encoded = any(e["kind"] == "encode_ahead_end" for e in events)
    if has_place and latest.get("pids") and not held and not is_encoded:
        held.append(latest["pids"][0])
        os.kill(held[0], signal.SIGSTOP)
    if held and is_encoded and held[0]:
        os.kill(held[0], signal.SIGCONT)
        held[0] = 0

try:
    if has_place:
        cluster.add_node()
    run_course(plan, settings, train_plan, cluster, watch)
finally:
    cluster.stop()
"""


@pytest.mark.parametrize("gpus", [False, True])
def test_slots_are_what_a_worker_fits_into(gpus: bool) -> None:
    have = {"a": {"CPU": 8.0, "GPU": 2.0}, "b": {"CPU": 3.5}, "c": {"memory": 9.0}}
    per = {"GPU": 1.0, "CPU": 1.0} if gpus else {"CPU": 1.0}
    assert slots(have, per) == ({"a": 2, "b": 0, "c": 0} if gpus else {"a": 8, "b": 3, "c": 0})


@given(
    most=st.integers(1, 6),
    looks=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6)), min_size=1, max_size=30),
)
def test_training_finds_its_most_whatever_is_taken(most: int, looks: list[tuple[int, int]]) -> None:
    """Slots come and go, and the group has some of them; tasks obey every look."""
    spare, tasks = Spare(most), 0
    for total, wanted in looks:
        tasks = min(tasks, total)  # others went with their node
        for _ in range(4):  # nothing else changes for four looks
            held = min(wanted, most, total - tasks)
            change = spare.look(total - tasks - held, held)
            tasks = max(0, tasks + change)
            if change:
                spare.changed()
        assert tasks == max(0, total - most)


def test_what_one_look_sees_alone_moves_nothing() -> None:
    spare = Spare(2)
    assert spare.look(free=4, held=0) == 0
    assert spare.look(free=1, held=0) == 0, "between two groups"
    assert spare.look(free=4, held=0) == 0
    assert spare.look(free=3, held=2) == 2
    spare.changed()
    assert spare.look(free=3, held=2) == 0, "the view may be older than what was taken"


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", PATHS)  # workers import this file
    cluster = LocalCluster(cpus=2)
    cluster.connect()
    yield
    ray.shutdown()
    cluster.stop()


def wait_until(true: Callable[[], bool], what: str) -> None:
    end, pause = time.monotonic() + 60, threading.Event()
    while not true():
        assert time.monotonic() < end, f"waited for {what}"
        pause.wait(0.05)


def _alone(marks: str, number: int) -> int:
    """A task that leaves its process's id and, the first time, goes on until it is ended."""
    path = Path(marks) / f"{number}-{os.getpid()}"
    path.touch()
    while len(list(Path(marks).glob(f"{number}-*"))) < 2:
        time.sleep(0.05)
    return number


@ray.remote(num_cpus=1)
class Somebody:
    """Somebody else's work."""

    def ready(self) -> bool:
        return True


@pytest.mark.ray
@pytest.mark.usefixtures("two_cpus")
def test_a_task_gives_way_at_once_and_is_done_when_there_is_a_place_again(tmp_path: Path) -> None:
    tasks, found = Tasks(most=1, gpus=0.0, stop=threading.Event()), []

    def run() -> None:
        found.extend(tasks.all(_alone, [(str(tmp_path), 0)]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 1, "the task")
    (first,) = (int(path.name.split("-")[1]) for path in tmp_path.iterdir())
    other = Somebody.remote()
    assert ray.get(other.ready.remote(), timeout=60)
    wait_until(lambda: not Path(f"/proc/{first}").exists(), "the end of the task")
    assert not found
    ray.kill(other)
    thread.join(60)
    assert found == [0]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.ray
@pytest.mark.usefixtures("two_cpus")
def test_nothing_runs_where_training_may_take_all_and_a_stop_is_obeyed(tmp_path: Path) -> None:
    stop = threading.Event()
    tasks = Tasks(most=2, gpus=0.0, stop=stop)
    timer = threading.Timer(5.0, stop.set)  # several looks
    timer.start()
    with pytest.raises(Stopped):
        tasks.one(_alone, str(tmp_path), 0)
    assert list(tmp_path.iterdir()) == []


def _run(storage: Path, videos: Path, weights: Path, place: str) -> RunFolder:
    names = {"AHEAD_VIDEOS": str(videos), "AHEAD_WEIGHTS": str(weights)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(HERE / "ahead_plan.py"), str(storage), place],
        env={**os.environ, **names, "PYTHONPATH": PATHS},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return RunFolder(storage / "ahead")


def _trained(folder: RunFolder) -> list[tuple[Any, ...]]:
    """What training computed, line by line."""
    lines = latest_values(read_metrics(folder.root))
    names = ("loss", "grad_norm", "psnr")
    return [
        (line["stage"], line["position"], line.get("order_digest"), json.dumps(line["context"]),
         *(line["values"].get(name) for name in names))
        for line in lines
    ]  # fmt: skip


@pytest.mark.ray
def test_the_next_stage_is_encoded_on_a_node_beyond_the_most_and_changes_nothing(
    tmp_path: Path,
) -> None:
    from ahead_plan import plan

    videos = write_demo_videos(tmp_path / "videos", clips=40).table
    model = plan.stages[0].codec.build(device="meta")
    weights = tmp_path / "codec.safetensors"
    save_file(dict(fresh_parameters(model, lambda name: named_generator(0, name))), weights)
    plain = _run(tmp_path / "plain", videos, weights, "none")
    ahead = _run(tmp_path / "ahead", videos, weights, "place")
    assert not [e for e in read_events(plain.root) if e["kind"].startswith("encode_ahead")]
    events = read_events(ahead.root)
    told = [(e["kind"], e["stage"]) for e in events]
    begun, ended = (
        told.index(("encode_ahead", "second")),
        told.index(("encode_ahead_end", "second")),
    )
    assert told.index(("encode_end", "first")) < begun < ended
    assert ended < told.index(("stage_end", "first")) < told.index(("encode_start", "second"))
    assert events[ended]["reason"].startswith("sealed as ")
    assert events[ended]["shards"] == events[begun]["shards"] > 0
    turn = events[told.index(("encode_end", "second"))]
    assert turn["encoded"] == 0, "its turn found it sealed"
    assert turn["reason"] == events[ended]["reason"]
    assert _trained(ahead) == _trained(plain)
    pins = [
        json.loads((one.stage("second") / "latents.json").read_text()) for one in (plain, ahead)
    ]
    assert pins[0] == pins[1]
