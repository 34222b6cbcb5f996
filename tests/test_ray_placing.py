"""A group whose nodes go while it is placed, on a real cluster; and what a watch makes of looks."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from elastic import ray_placing
from elastic.ray_placing import PlacementWatch

HOME = Path(__file__).parent.parent
# A group of two workers is started as Ray Train starts one, and loses a node meanwhile.
DRIVER = """
import json, sys, time
import ray
from cluster import faults
from cluster.local import LocalCluster, processes_of

how, head = sys.argv[1], int(sys.argv[2])
cluster = LocalCluster(cpus=head)
try:
    nodes = [cluster.add_node() for _ in range(2 - head)]
    cluster.connect()
    from ray.train.v2._internal.execution.worker_group import RayTrainWorker
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Into
    from elastic.ray_placing import WATCH

    Worker = ray.remote(num_cpus=1)(RayTrainWorker)
    found = {}

    def start():
        if how == "no room":
            cluster.drain(nodes[-1], 600)
        group = placement_group([{"CPU": 1}] * 2, strategy="SPREAD")
        assert group.wait(60)
        if how == "notice":
            cluster.drain(nodes[-1], 600)
        elif how == "lost":
            [raylet] = [
                p for p in processes_of(cluster.temp_dir)
                if p.name().startswith("raylet") and nodes[-1].node_id in " ".join(p.cmdline())
            ]
            faults.kill_tree(raylet.pid)
        into = [Into(placement_group=group, placement_group_bundle_index=i) for i in range(2)]
        workers = [Worker.options(scheduling_strategy=one).remote() for one in into]
        return ray.get([worker.get_metadata.remote() for worker in workers])

    WATCH.begin()
    began = time.monotonic()
    try:
        start()
    except Exception as error:
        found = {"error": type(error).__name__, "seconds": time.monotonic() - began}
    WATCH.end()
    print(json.dumps({**found, "reason": WATCH.reason}))
finally:
    ray.shutdown()
    cluster.stop()
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("how", "head"),
    [("nothing", 0), ("notice", 0), ("lost", 0), ("no room", 0), ("notice", 1), ("lost", 1)],
)
def test_a_start_is_given_up_when_a_node_of_it_goes_and_only_then(how: str, head: int) -> None:
    """With the controller's own node in the group, and without."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, how, str(head)],
        env={**os.environ, "PYTHONPATH": str(HOME), "PYTHONWARNINGS": "default"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if how == "nothing":
        assert found == {"reason": ""}
    else:
        assert found["reason"] == "1 nodes went while the workers were being placed"
        assert found["seconds"] < 20, "of the 600 that the node still had"


class Workers(NamedTuple):
    """Nodes of workers that wait and of those that are up, by their ids."""

    waiting: dict[str, str]
    up: dict[str, str]


class Looks:
    """A cluster that changes from look to look, in place of Ray's tables."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: list[Workers]) -> None:
        self._looks = looks
        self._seen = threading.Event()
        self.given_up: list[set[str]] = []
        self._alive = [set("ab"), *[set("a")] * 100]
        monkeypatch.setattr(ray_placing, "_LOOK_EVERY_S", 0.001)
        monkeypatch.setattr(ray_placing, "_schedulable", lambda: self._alive.pop(0))
        monkeypatch.setattr(ray_placing, "unreachable", lambda nodes: set())
        monkeypatch.setattr(ray_placing, "_give_up", self.given_up.append)
        tables = SimpleNamespace(placement_group_table=self._groups, actor_table=self._actors)
        monkeypatch.setattr(ray_placing, "_state", tables)
        context = SimpleNamespace(get_job_id=lambda: "01000000")
        monkeypatch.setattr(ray_placing.ray, "get_runtime_context", lambda: context)

    def _groups(self) -> dict[str, Any]:
        return {
            "aa01000000": {"state": "CREATED", "bundles_to_node_id": {0: "a", 1: "b"}},
            "bb01000000": {"state": "REMOVED", "bundles_to_node_id": {0: "a", 1: "a"}},  # before
            "aa02000000": {"state": "PENDING", "bundles_to_node_id": {}},  # of another job
        }

    def _actors(self, actor: None, job: Any, state: str) -> dict[str, Any]:
        if not self._looks:
            self._seen.set()
            return {}
        # Those that wait are asked for first.
        found = self._looks[0].waiting if state != "ALIVE" else self._looks.pop(0).up
        return {
            key: {"ActorClassName": "RayTrainWorker", "Address": {"NodeID": node}}
            for key, node in found.items()
        }

    def play(self) -> PlacementWatch:
        self.watch = PlacementWatch()
        self.watch.begin()
        assert self._seen.wait(20)
        self.watch.end()
        return self.watch


def test_workers_that_may_come_up_on_nodes_that_stay_are_left_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Workers({"1": "b", "2": "a"}, {})  # two wait, and one node stays
    none = Workers({"2": "a"}, {"1": "b"})  # it came up on the node that goes
    looks = Looks(monkeypatch, [one, none, none, none, one])
    assert looks.play().reason == ""
    assert looks.given_up == []


@pytest.mark.parametrize("node", ["b", "owner's"])
def test_a_worker_that_waits_twice_with_no_place_to_come_up_is_ended(
    monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    looks = Looks(
        monkeypatch, [Workers({"1": node, "2": "a"}, {}), Workers({"1": node}, {"2": "a"})]
    )
    assert looks.play().reason
    assert looks.given_up == [{"1"}]
    assert looks.watch.reason, "of a start that failed"
    looks.watch.end(is_up=True)
    assert looks.watch.reason == ""


def test_a_watch_that_can_see_nothing_gives_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, [])
    alive = [set("ab")]
    blind = threading.Event()

    def schedulable() -> set[str]:
        if not alive:
            blind.set()
        return alive.pop()  # IndexError from the second on

    monkeypatch.setattr(ray_placing, "_schedulable", schedulable)
    watch = PlacementWatch()
    watch.begin()
    assert blind.wait(20)
    watch.end()
    assert (watch.reason, looks.given_up) == ("", [])
