"""A Ray Train worker: the supervisor of one training process, which it forks, watches and replaces.

It never imports torch, so that a worker group stands within seconds, and it outlives the training
processes: their crashes and hangs are mended in place (elastic.rally).
"""

import logging
import os
import signal
import subprocess
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.train import get_context
from ray.train.collective import broadcast_from_rank_zero

from elastic.errors import InputError, StageBlocked
from elastic.lease import Lease, address_of, fork, start_host, wait_for_host
from elastic.link import SAVE, SETTLED, STOP, Beat, Ended, Failed, Measured, Order, Settle, Told
from elastic.patience import Patience
from elastic.rally import (
    REGROUP,
    REPEATS,
    Abort,
    Address,
    Begin,
    Clear,
    Disband,
    Done,
    Loss,
    Over,
    Rally,
    join,
)
from elastic.ray_nodes import decoders_of_a_task
from elastic.ray_tracker import TrackerHandle

log = logging.getLogger(__name__)

# A group that was asked to stop is ended by the controller within seconds; longer means that the
# resize did not happen, and then the group must start over rather than wait for ever.
_STOPPED_WAIT_S = 120.0
_TICK_S = 0.1
_HOST_S = 45.0  # the node's warm host is being started by the driver
_OWN_HOST_S = 180.0
_OTHER_HOST_S = 60.0  # while the rest of the group waits
_EXIT_S = 5.0
_STACKS_S = 0.5
MAX_LIVES = 3  # lost in a row without a new checkpoint; then a new worker group is tried

_LOST_FIRST = "the supervisor of rank 0 is lost"

_stop = threading.Event()
_save = threading.Event()
_stopped = threading.Event()


class Regroup(RuntimeError):
    """This worker group is given up; a new one goes on from the newest checkpoint."""


_ENDS = {REGROUP: Regroup, "StageBlocked": StageBlocked, "InputError": InputError}


@dataclass(frozen=True)
class Work:
    """Plain data that the driver sends to every supervisor."""

    stage: str
    tracker: str
    job: bytes  # a pickled WorkerJob
    use_gpu: bool
    hang_after: float


def request_stop() -> None:
    """Make the loop save at its next update and stop; runs in the worker's main thread."""
    _stop.set()


def request_save() -> None:
    """Make the loop save at its next update and go on."""
    _save.set()


def has_stopped() -> bool:
    """Whether the loop has published and stopped."""
    return _stopped.is_set()


def train_worker(config: dict[str, Any]) -> None:
    """The training function that Ray Train calls in a thread of every worker."""
    logging.basicConfig(level=logging.INFO)
    context = get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    with closing(Supervisor(config["work"], rank, size)) as supervisor:
        supervisor.run()


class Supervisor:
    """One training process after another, as the rally says."""

    def __init__(self, work: Work, rank: int, size: int) -> None:
        self._work = work
        self._rank = rank
        self._size = size
        self._tracker = TrackerHandle(work.tracker)
        self._num_lost = 0  # lives since the newest checkpoint
        self._own_host: subprocess.Popen[bytes] | None = None
        self._lease: Lease | None = None
        self._patience = Patience(work.hang_after)
        self._is_over = False  # this life of the training process
        self._forwarded: set[str] = set()
        self._stopped_at = 0.0
        self._host(_OWN_HOST_S)  # before the group counts on this worker
        self._address_here = ray.util.get_node_ip_address()
        self._num_decoders = _decoders_here(work.use_gpu)
        self._kept = Rally(self._address_here, size, self._may_go_on) if rank == 0 else None
        mine = tuple(self._kept.address) if self._kept else None
        # A plain tuple: Ray's actor in between need not know our classes.
        self._address = Address(*broadcast_from_rank_zero(mine))
        self._rally: Connection[Any, Any] = join(self._address, rank)

    def _say(self, word: Any) -> None:  # Any: one of the rally's words
        try:
            self._rally.send(word)
        except OSError:
            raise Regroup(_LOST_FIRST) from None

    def run(self) -> None:
        """Return when the stage is finished; Regroup, or the error that ended it."""
        while True:
            watched = [self._rally]
            if self._lease and not self._is_over:
                watched.append(self._lease.pipe)
            ready = wait(watched, _TICK_S)
            # The process first: what it said last may explain what the rally says next.
            if self._lease and self._lease.pipe in ready:
                self._hear_process()
            elif self._rally in ready and self._hear_rally():
                return
            self._look()

    def close(self) -> None:
        """End the training process and leave the rally."""
        self._end_process()
        self._rally.close()
        if self._own_host:
            self._own_host.kill()
            self._own_host.communicate()

    def _hear_rally(self) -> bool:
        try:
            word = self._rally.recv()
        except (EOFError, OSError):
            raise Regroup(_LOST_FIRST) from None
        if isinstance(word, Begin):
            self._begin(word)
        elif isinstance(word, Abort):
            if word.is_hang:
                self._print_stacks()
            try:
                self._end_process()
            except TimeoutError as error:  # its GPU or port is not free: nobody may start there
                raise Regroup(str(error)) from None
            self._say(Clear())
        elif isinstance(word, Disband):
            raise _ENDS[word.kind](word.reason)
        return isinstance(word, Done)

    def _begin(self, word: Begin) -> None:
        if self._rank == 0:
            self._tracker.event(
                "spawn", self._work.stage, None, f"life {word.life} of this worker group",
                world=self._size,
            )  # fmt: skip
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        order = Order(
            rank=self._rank,
            size=self._size,
            host=self._address.host,
            port=word.port,
            job=self._work.job,
            supervisor=os.getpid(),
            node=os.getppid(),
            use_gpu=self._work.use_gpu,
            num_threads=int(os.environ.get("OMP_NUM_THREADS", "1")),
            num_decoders=self._num_decoders,
            env=_environment(self._address_here, gpus),
        )
        store = self._kept.store if self._kept else None
        try:
            self._lease = fork(self._host(_OTHER_HOST_S), order, store)
        except OSError as error:
            self._say(Over("crashed", f"the fork host does not answer: {error}", died=True))
            return
        finally:
            if store:
                store.close()  # the training process has it now
        self._patience = Patience(self._work.hang_after)
        self._is_over = False
        self._forwarded = set()
        self._stopped_at = 0.0
        _stopped.clear()

    def _host(self, patience_s: float) -> Path:
        """The address of a host that answers: the node's, or else one of this worker alone."""
        context = ray.get_runtime_context()
        shared = address_of(context.get_node_id(), context.get_job_id())
        if self._own_host is None and wait_for_host(shared, _HOST_S):
            return shared
        own = address_of(f"own-{os.getpid()}", context.get_job_id())
        if self._own_host is None or self._own_host.poll() is not None:
            log.warning("no warm fork host on this node; starting one for this worker alone")
            self._own_host = start_host(own)
        if not wait_for_host(own, patience_s):
            raise ConnectionError(f"no fork host came up within {patience_s:.0f} s")
        return own

    def _hear_process(self) -> None:
        assert self._lease is not None, "heard from a process without a lease"
        try:
            message = self._lease.pipe.recv()
        except (EOFError, OSError):
            self._is_over = True
            code = self._lease.exit_code(_EXIT_S)
            self._say(Over("crashed", _explain(code), died=True))
            return
        self._patience.stirred()
        if isinstance(message, Told):
            self._tracker.event(
                message.kind, message.stage, message.position, message.reason, **message.more
            )
            if message.kind == "publish":
                self._num_lost = 0
        elif isinstance(message, Measured):
            self._tracker.metric(message.line)
        elif isinstance(message, Beat):
            self._patience.heard(message.phase, message.position)
        elif isinstance(message, Settle):
            self._tracker.settle()
            self._lease.pipe.send(SETTLED)
        elif isinstance(message, Ended):
            self._is_over = True
            self._say(Over(message.outcome))
            if message.outcome == "stopped":
                self._stopped_at = time.monotonic()
                _stopped.set()
        elif isinstance(message, Failed):
            self._is_over = True
            outcome = message.kind if message.kind in REPEATS else "crashed"
            self._say(Over(outcome, message.message))

    def _look(self) -> None:
        """What no message brings: requests from the controller, and silence."""
        if self._stopped_at and time.monotonic() - self._stopped_at > _STOPPED_WAIT_S:
            raise Regroup(f"stopped for a resize, but not ended within {_STOPPED_WAIT_S:.0f} s")
        if self._lease is None or self._is_over:
            return
        if _save.is_set():
            _save.clear()
            self._forward(SAVE)
        if _stop.is_set() and STOP not in self._forwarded:
            self._forwarded.add(STOP)
            self._forward(STOP)
        complaint = self._patience.complaint()
        if complaint:
            self._is_over = True
            self._print_stacks()
            state = _state(self._lease.pid)
            self._say(Over("hung", f"{complaint}; process {state}", died=state == "stopped"))

    def _forward(self, request: str) -> None:
        assert self._lease is not None, "nobody to forward to"
        try:
            self._lease.pipe.send(request)
        except OSError:
            log.info("the training process ended before it could be asked to %s", request)

    def _print_stacks(self) -> None:
        """Have the training process print where each of its threads is, to this worker's log."""
        if self._lease is None:
            return
        log.error("process %d is %s; its stacks:", self._lease.pid, _state(self._lease.pid))
        try:
            os.kill(self._lease.pid, signal.SIGUSR1)
        except ProcessLookupError:
            return
        time.sleep(_STACKS_S)  # it prints by itself, and cannot say when it is done

    def _end_process(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()

    def _may_go_on(self, loss: Loss) -> bool:
        """Tell the loss; called in the rally's thread, by rank 0's supervisor alone."""
        kind = "hang" if loss.is_hang else "crash"
        self._tracker.event(kind, self._work.stage, None, f"rank {loss.rank}: {loss.reason}")
        self._num_lost += 1
        return self._num_lost < MAX_LIVES


def _environment(address: str, gpus: list[Any]) -> dict[str, str]:
    """What differs between the training processes of a node: its network, and this one's GPU.

    Without a word gloo listens where the host's name leads, which is often the loopback address.
    """
    found = psutil.net_if_addrs().items()
    cards = [name for name, own in found if address in {one.address for one in own}]
    env = {"GLOO_SOCKET_IFNAME": cards[0]} if cards else {}
    return env | ({"CUDA_VISIBLE_DEVICES": str(gpus[0])} if gpus else {})


def _decoders_here(use_gpu: bool) -> int:
    """As many as this worker has cores: those that Ray has counted, shared with its node's others.

    A worker without a GPU is one core's, whatever its node has.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["NodeID"] == here]
    return decoders_of_a_task(nodes, 1.0 if use_gpu else 0.0)


def _state(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


def _explain(code: int | None) -> str:
    if code is None:
        return "the training process ended, and its fork host as well"
    if code < 0:
        return f"the training process was killed by {signal.Signals(-code).name}"
    return f"the training process ended with exit code {code}"
