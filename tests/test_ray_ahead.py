"""Encoding ahead of a later stage's turn, on a real cluster; training comes first."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ahead_plan import plan
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import STAGE

from elastic import ray_ahead
from elastic.data.moving_shapes import write_demo_videos
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.journal import latest_values, read_events, read_metrics
from elastic.ray_ahead import EncodeAhead
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
plan, has_place, held = load_plan(sys.argv[1]), sys.argv[3] != "none", []
cluster = start_cluster(settings, cpus=1)

def watch(course, latest):
    events = read_events(course.folder.root)
    is_encoded = any(e["kind"] == "encode_ahead_end" for e in events)
    if sys.argv[3] == "interrupt" and any(e["kind"] == "encode_ahead" for e in events):
        raise KeyboardInterrupt
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


def wait_until(true: Callable[[], bool], what: str) -> None:
    end, pause = time.monotonic() + 60, threading.Event()
    while not true():
        assert time.monotonic() < end, f"waited for {what}"
        pause.wait(0.05)


def test_what_fails_ahead_is_told_and_reaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []
    tracker = SimpleNamespace(event=lambda *event: told.append(event))
    course: Any = SimpleNamespace(tracker=tracker, gpus=0.0)

    def fail(*_: object) -> None:
        raise InputError("no held-out clip")

    monkeypatch.setattr(ray_ahead, "after", lambda course, stage: iter([STAGE, STAGE]))
    monkeypatch.setattr(ray_ahead, "Tasks", lambda *_: None)
    monkeypatch.setattr(ray_ahead, "_encode", fail)
    with EncodeAhead()(course, STAGE):
        wait_until(lambda: len(told) == 2, "both stages")
    why = "failed, and is tried again at its turn: no held-out clip"
    assert told == [("encode_ahead_end", STAGE.name, None, why)] * 2


def _run(storage: Path, inputs: Path, place: str) -> RunFolder:
    names = {
        "AHEAD_VIDEOS": str(inputs / "videos" / "captions.csv"),
        "AHEAD_WEIGHTS": str(inputs / "codec.safetensors"),
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(HERE / "ahead_plan.py"), str(storage), place],
        env={**os.environ, **names, "PYTHONPATH": PATHS},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    expected = -signal.SIGINT if place == "interrupt" else 0
    assert done.returncode == expected, done.stderr[-4000:]
    return RunFolder(storage / "ahead")


def _trained(folder: RunFolder) -> list[tuple[Any, ...]]:
    """What training computed, line by line, and what it computed on."""
    lines = latest_values(read_metrics(folder.root))
    names = ("loss", "grad_norm", "psnr")
    pinned = (folder.stage("second") / "latents.json").read_text()
    return [
        (pinned, line["stage"], line["position"], line.get("order_digest"), str(line["context"]),
         *(line["values"].get(name) for name in names))
        for line in lines
    ]  # fmt: skip


def _told(folder: RunFolder) -> list[tuple[str, str | None]]:
    return [(event["kind"], event["stage"]) for event in read_events(folder.root)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    assert write_demo_videos(folder / "videos", clips=40).table == folder / "videos/captions.csv"
    model = plan.stages[0].codec.build(device="meta")
    fresh = fresh_parameters(model, lambda name: named_generator(0, name))
    save_file(dict(fresh), folder / "codec.safetensors")
    return folder


@pytest.fixture(scope="module")
def plain(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run on one node, where nothing is encoded ahead."""
    folder = _run(tmp_path_factory.mktemp("plain"), inputs, "none")
    assert not [kind for kind, _ in _told(folder) if kind.startswith("encode_ahead")]
    return folder


@pytest.mark.ray
def test_the_next_stage_is_encoded_on_a_node_beyond_the_most_and_changes_nothing(
    plain: RunFolder, inputs: Path, tmp_path: Path
) -> None:
    ahead = _run(tmp_path, inputs, "place")
    events, told = read_events(ahead.root), _told(ahead)
    begun, ended = (told.index((f"encode_ahead{end}", "second")) for end in ("", "_end"))
    assert told.index(("encode_end", "first")) < begun < ended
    assert ended < told.index(("stage_end", "first")) < told.index(("encode_start", "second"))
    assert events[ended]["reason"].startswith("sealed as ")
    assert events[ended]["shards"] == events[begun]["shards"] > 0
    turn = events[told.index(("encode_end", "second"))]
    assert turn["encoded"] == 0, "its turn found it sealed"
    assert turn["reason"] == events[ended]["reason"]
    assert _trained(ahead) == _trained(plain)


@pytest.mark.ray
def test_a_driver_that_is_interrupted_ends_and_the_next_one_encodes_the_rest(
    plain: RunFolder, inputs: Path, tmp_path: Path
) -> None:
    begun = _run(tmp_path, inputs, "interrupt")
    assert ("encode_ahead", "second") in _told(begun)
    assert ("stage_end", "first") not in _told(begun)
    assert _trained(_run(tmp_path, inputs, "none")) == _trained(plain)
