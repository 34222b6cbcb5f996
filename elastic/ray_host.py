"""Keeps a warm fork host on every node of the cluster, new ones included, for the driver's life."""

import logging
import subprocess
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic.lease import address_of, start_host

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_KEEP_EVERY_S = 5.0


class HostKeeper:
    """On one node: owns the host's process, which ends with this actor."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._process: subprocess.Popen[bytes] | None = None
        self.keep()

    def keep(self) -> None:
        """Start the host, or start it again if it has died."""
        if self._process is None or self._process.poll() is not None:
            self._process = start_host(address_of(self._node))


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
            self._keepers[node] = actor.remote(node)
        if self._looked_at - self._kept_at < _KEEP_EVERY_S:
            return
        self._kept_at = self._looked_at
        for keeper in self._keepers.values():
            keeper.keep.remote()
