"""A Ray cluster of this machine alone: real raylets on 127.0.0.1, started and ended by us."""

import logging
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from cluster.token import own_token

log = logging.getLogger(__name__)

# Read by Ray when its processes start, so they must stand in the environment before that.
# The controller looks at its workers four times a second instead of every two seconds; a silent
# node is declared dead after about 2 s instead of 20 to 55; a wrong guess of the size costs 20 s,
# not 60; a worker that does not answer is given up after a minute, not ten. Drain notices are read
# by our own policy: Ray Train's watcher would wait for the deadline before it does anything.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Without a GPU a task must see none; said ahead because Ray's default is about to change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A resolver of its own in each worker would install the environment again.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_PREFIX = "restage-ray-"
_LOOPBACK = "127.0.0.1"
_STAY_LOCAL = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # named for where Ray stays at home by default
_ANSWER_S = 10.0
_STORE_BYTES = 150_000_000  # tensors never pass through Ray


def prepare_environment() -> None:
    """Set what Ray reads at start; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def join(address: str) -> None:
    """Make this process a driver of the cluster whose head is at HOST:PORT.

    AuthenticationError, at once, if its token is missing or wrong: Ray alone would try for long
    and then say something else.
    """
    import ray
    from ray._private import auto_init_hook, services
    from ray._private.authentication import authentication_token_setup
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # made by Cython

    # A thread that is still at work when the driver has left would join whatever cluster it finds.
    auto_init_hook.enable_auto_connect = False
    # As ray.init does: a token in the user's home is used where nothing else is said.
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    nodes = GcsClient(address=address).get_all_node_info(timeout=_ANSWER_S).values()
    is_here = {node.node_manager_address for node in nodes} == {_LOOPBACK}
    resolve = services.resolve_ip_for_localhost
    if is_here:
        # Ray replaces 127.0.0.1 by the address of a network card, where nothing listens here.
        services.resolve_ip_for_localhost = lambda host: host
    try:
        ray.init(
            address=address,
            _node_ip_address=_LOOPBACK if is_here else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    finally:
        services.resolve_ip_for_localhost = resolve


class LocalCluster:
    """A head with its own CPUs, and further nodes on the same machine, all on 127.0.0.1.

    The kernel ends each process when the thread that started it ends; so start and grow the
    cluster from a thread that lives as long as the cluster, and SIGKILL of the driver leaves
    nothing behind. Ray's own `ray start` is not used because it moves off the loopback address.
    Who has not its token is sent away; this process has it until `stop`.
    """

    def __init__(self, cpus: int, gpus: int = 0, takes_jobs: bool = False) -> None:
        prepare_environment()
        _sweep()
        # A short path: the sockets below it may be at most 107 bytes long.
        self.temp_dir = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        (self.temp_dir / "owner").write_text(str(os.getpid()))
        # Ray notes the address of the newest head below RAY_TMPDIR, for whoever asks for "auto";
        # the common /tmp/ray would lead other programs of this machine to this cluster.
        os.environ["RAY_TMPDIR"] = str(self.temp_dir)
        (self.temp_dir / "ray").mkdir()
        self._while_up = ExitStack()
        self._while_up.enter_context(own_token(self.temp_dir))
        # Its agents and the drivers of jobs would look for the head at a network card's address.
        os.environ[_STAY_LOCAL] = "0"
        self._while_up.callback(os.environ.pop, _STAY_LOCAL, None)
        from ray.cluster_utils import Cluster  # after the environment is set

        self._nodes: list[Any] = []  # Ray's own node records
        self._takes_jobs = takes_jobs
        self._num_added = 0
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "node_ip_address": _LOOPBACK,
                "num_cpus": cpus,
                "num_gpus": gpus,
                "include_dashboard": takes_jobs,  # the job API is a part of it
                "dashboard_host": _LOOPBACK,
                "dashboard_port": 0,
                "dashboard_agent_listen_port": 0,  # its fixed one may be another cluster's
                "temp_dir": str(self.temp_dir),
                "object_store_memory": _STORE_BYTES,
            },
        )

    @property
    def address(self) -> str:
        """What `ray.init(address=...)` takes."""
        return str(self._cluster.address)

    @property
    def jobs_address(self) -> str:
        """Where jobs are submitted, if the cluster takes any."""
        return f"http://{self._cluster.webui_url}"

    def connect(self) -> None:
        """Make this process a driver of the cluster."""
        join(self.address)

    def add_node(self, cpus: int = 1) -> Any:  # Any: Ray's own node record
        """Start one more raylet, wait until it takes work, and return Ray's record of the node."""
        node = self._cluster.add_node(
            node_ip_address=_LOOPBACK,
            num_cpus=cpus,
            num_gpus=0,
            object_store_memory=_STORE_BYTES,
            wait=True,
            **self._own_folder(),
        )
        self._nodes.append(node)
        return node

    def _own_folder(self) -> dict[str, str]:
        """Each node unpacks what a job carries; in one folder it would take it from under another,
        and from under the job.
        """
        if not self._takes_jobs:
            return {}
        self._num_added += 1
        return {"temp_dir": str(self.temp_dir / f"node-{self._num_added}")}

    def drain(self, node: Any, notice_s: float) -> None:
        """Announce that a node will be gone in `notice_s` seconds, as a spot market does.

        Only the notice is given: who has it ended at the deadline is the caller. RuntimeError if
        Ray does not take it. From any thread.
        """
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # made by Cython
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = round((time.time() + notice_s) * 1000)
        client = GcsClient(address=self.address)
        taken, why = client.drain_node(node.node_id, reason, "announced loss", deadline_ms)
        if not taken:
            raise RuntimeError(f"Ray does not drain node {node.node_id}: {why}")

    def remove_node(self) -> None:
        """Kill the node that came last, without notice."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def stop(self) -> None:
        """End every process of the cluster and remove its files."""
        self._cluster.shutdown()
        for process in processes_of(self.temp_dir):
            process.kill()
        self._while_up.close()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def _sweep() -> None:
    """End and remove what clusters of killed drivers left: Ray's agents outlive a killed raylet
    for a minute or two, and the temp folder stays.
    """
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
        try:
            owner = int((folder / "owner").read_text())
        except (OSError, ValueError):
            continue  # being made by somebody just now, or not ours to read
        if not Path(f"/proc/{owner}").exists():
            log.info("removing %s of a driver that is gone", folder)
            for process in processes_of(folder):
                process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def processes_of(temp_dir: Path) -> list[psutil.Process]:
    """Processes that carry this cluster's mark in their environment, this one aside.

    Ray's agents have put their names where their marks were: those that keep files of it open.
    """
    found = []
    for process in psutil.process_iter():
        try:
            is_marked = process.environ().get("RAY_TMPDIR") == str(temp_dir)
            is_ours = is_marked or _is_agent_of(process, temp_dir)
        except psutil.Error:
            continue  # it has ended, or belongs to somebody else
        if is_ours and process.pid != os.getpid():
            found.append(process)
    return found


def _is_agent_of(process: psutil.Process, temp_dir: Path) -> bool:
    command = process.cmdline()
    if not command or not command[0].startswith("ray::"):
        return False
    return any(file.path.startswith(f"{temp_dir}/") for file in process.open_files())
