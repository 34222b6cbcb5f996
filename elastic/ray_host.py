"""Keeps a warm fork host on every node of the cluster, new ones included, for the driver's life."""

import logging
import subprocess
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic.lease import address_of, start_host, wait_for_host

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_KEEP_EVERY_S = 5.0


class HostKeeper:
    """On one node: owns the host's process, which ends with this actor."""

    def __init__(self, node: str, job: str) -> None:
        self._address = address_of(node, job)
        self._processes: list[subprocess.Popen[bytes]] = []  # the last is the one in use
        self._has_answered = False
        self.keep()

    def keep(self) -> None:
        """Start the host, or another one if it has died or somebody has taken its name.

        One that only lost its name stays: processes that it has forked live as long as it does.
        """
        is_up = bool(self._processes) and self._processes[-1].poll() is None
        answers = is_up and wait_for_host(self._address, 0)
        if not is_up or (self._has_answered and not answers):
            self._processes.append(start_host(self._address))
        self._has_answered = answers  # until it does for the first time, it is still importing


class Hosts:
    """The keepers of all nodes; `keep` never waits."""

    def __init__(self) -> None:
        self._keepers: dict[str, Any] = {}  # node id: Ray's actor handle
        self._looked_at = self._kept_at = float("-inf")

    def keep(self) -> None:
        """Give nodes that came a keeper, forget those that went, and have dead hosts restarted."""
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            self._look()
        except RayError as error:  # no reason to end a run that is healthy
            log.warning("the fork hosts could not be looked after: %s", error)

    def _look(self) -> None:
        job = ray.get_runtime_context().get_job_id()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node in self._keepers.keys() - alive:
            del self._keepers[node]
        for node in alive - self._keepers.keys():
            log.info("starting a fork host on node %s", node)
            actor = ray.remote(HostKeeper).options(
                num_cpus=0,
                max_restarts=-1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            self._keepers[node] = actor.remote(node, job)
        if self._looked_at - self._kept_at < _KEEP_EVERY_S:
            return
        self._kept_at = self._looked_at
        for keeper in self._keepers.values():
            keeper.keep.remote()
