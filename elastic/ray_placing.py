"""A group that is being placed while a node goes: found within a second or two, and placed anew.

Ray starts no worker on a node with notice, and waits for a worker on a node that was lost until the
node is declared dead; meanwhile the controller waits for its workers, and looks at nothing.
"""

import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state as _state
from ray._private.worker import global_worker
from ray.train.v2._internal.execution.worker_group import RayTrainWorker
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_PROBE_S = 1.0
_PROBES = 64


class PlacementWatch:
    """Gives up the start of a group whose nodes have changed, so that it starts on those that stay.

    Runs beside the controller, in its process. A worker that is not up yet is ended, or the
    reservation that waits for room taken back, when that was so in two looks at least.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why the newest start was given up; empty where it was not."""
        return self._reason

    def begin(self) -> None:
        """A group is about to be placed."""
        self.end()
        self._over, self._reason = threading.Event(), ""
        try:
            job, nodes = ray.get_runtime_context().get_job_id(), _schedulable()
        except Exception as error:  # as below
            log.warning("the placing of a group cannot be watched: %s", error)
            return
        about = (job, nodes, self._over)
        threading.Thread(target=self._watch, args=about, daemon=True).start()

    def end(self, is_up: bool = False) -> None:
        """Its workers are up, or it has failed."""
        self._over.set()
        if is_up:
            self._reason = ""

    def _watch(self, job: str, nodes: set[str], over: threading.Event) -> None:
        before, has_given_up = set[str](), False
        while not over.wait(_LOOK_EVERY_S):
            try:
                going = nodes - (_schedulable() - unreachable(nodes))
                doomed = _waits_in_vain(job, going) if going else set()
                if doomed & before and not over.is_set():
                    # Before: the controller may be at its failure at once.
                    self._reason = f"{len(going)} nodes went while the workers were being placed"
                    _give_up(doomed & before)
                    has_given_up = True
                before = doomed
            except Exception as error:  # whatever it is: then the start takes the longer way
                if not has_given_up:
                    self._reason = ""
                log.warning("the placing of a group cannot be watched just now: %s", error)


# The one of this process: a controller's policies and callbacks are sent to it apart.
WATCH = PlacementWatch()


def _schedulable() -> set[str]:
    draining = _state.get_draining_nodes()
    return {n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in draining}


def _waits_in_vain(job: str, going: set[str]) -> set[str]:
    """Ids of the job's workers that will not come up, and of its group if that finds no room."""
    # The id of a group ends with that of its job, which has one at a time.
    table = _state.placement_group_table()  # which keeps those that were removed
    groups = {k: g for k, g in table.items() if k.endswith(job) and g["state"] != "REMOVED"}
    pending = {key for key, group in groups.items() if group["state"] == "PENDING"}
    places = [
        node
        for key, group in groups.items()
        if key not in pending
        for node in group["bundles_to_node_id"].values()
    ]
    if not going & set(places):
        return pending
    waiting, up = _workers(job, "PENDING_CREATION"), _workers(job, "ALIVE")
    silent = unreachable(going & set(places))
    # Which of those that wait is to come up on a node that stays cannot be told: one that has no
    # place yet carries the node of its owner. How many are still to come up there can.
    num_staying = sum(node not in going for node in places)
    num_up = sum(node not in going for node in up.values())
    late = set(waiting) if len(waiting) > num_staying - num_up else set()
    return pending | late | {key for key, node in up.items() if node in silent}


def _workers(job: str, state: str) -> dict[str, str]:
    """Node of each worker of the job that is in this state, by its id."""
    actors = _state.actor_table(None, ray.JobID(bytes.fromhex(job)), state)
    return {
        key: actor["Address"]["NodeID"]
        for key, actor in actors.items()
        if actor["ActorClassName"] == RayTrainWorker.__name__
    }


def _give_up(doomed: set[str]) -> None:
    for key in doomed:
        number = bytes.fromhex(key)
        if len(number) == PlacementGroupID.size():
            remove_placement_group(PlacementGroup(PlacementGroupID(number)))
        else:
            # ray.kill wants a handle; those of the workers are local to Ray Train's start.
            global_worker.core_worker.kill_actor(ray.ActorID(number), True)


def unreachable(nodes: set[str]) -> set[str]:
    """Those of the nodes whose raylet takes no connection.

    The cluster itself takes seconds to declare a node dead, and a group that is sized for it waits
    in vain until its placement times out.
    """
    records = [node for node in ray.nodes() if node["NodeID"] in nodes]
    with ThreadPoolExecutor(max_workers=_PROBES) as pool:
        answers = pool.map(_answers, records)
    return {node["NodeID"] for node, is_up in zip(records, answers, strict=True) if not is_up}


def _answers(node: dict[str, Any]) -> bool:
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    try:
        socket.create_connection(address, timeout=_PROBE_S).close()
    except OSError:
        return False
    return True
