"""What we put into Ray Train's controller: when a group changes its size, and when it gives up.

All three are handed to it in place of its own, or beside them (elastic.ray_train). They are
developer API, so Ray is pinned exactly and tests/test_ray_contract.py names what is relied on.
"""

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2._internal.util import time_monotonic

from elastic.budget import Budget
from elastic.errors import InputError, StageBlocked, last_line
from elastic.journal import Event, read_events
from elastic.ray_tracker import TrackerHandle
from elastic.ray_worker import MAX_LIVES, Regroup, has_stopped, request_save, request_stop

log = logging.getLogger(__name__)

_ASK_S = 5.0
_WAIT_S = 0.2
_PROBE_S = 1.0
_PROBES = 64
_SAVE_DEADLINE_S = 600.0  # of a large model; a process that hangs is found by its supervisor
_ANNOUNCED_S = 300.0  # for so long after a drain notice a loss is put down to it


class Teller:
    """Tells the tracker about one stage, from the controller's process; never fails."""

    def __init__(self, stage: str, tracker: str) -> None:
        self._stage = stage
        self._tracker = tracker

    def __call__(self, kind: str, reason: str, **more: Any) -> None:  # the fields of the kind
        """One event."""
        try:
            TrackerHandle(self._tracker).event(kind, self._stage, None, reason, **more)
        except ValueError as error:  # the actor is gone; training goes on without it
            log.warning("%s could not be told: %s", kind, error)


class CapacityPolicy(ElasticScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """As many workers as fit, seen fresh, without what is about to go; and no thrashing.

    Ray Train's own policy trusts a view of the nodes that is up to 20 s old, counts draining nodes
    as capacity, and grows as soon as anything comes. This one has the coordinator look again each
    time, leaves out nodes with a drain notice, shrinks at once, and grows only when the group has
    had its size for `min_stay` seconds and the new capacity has stood for a third of that.
    """

    def __init__(self, scaling_config: ScalingConfig, min_stay: float, tell: Teller) -> None:
        super().__init__(scaling_config)
        self._min_stay = min_stay
        self._tell = tell
        self._draining: set[str] = set()
        self._warned: set[str] = set()  # draining nodes of the group that it has saved for
        self._looked_at = float("-inf")
        self._larger = (0, 0.0)  # a size that the nodes would allow, and since when they do
        self._is_waiting = False
        self._must_probe = True

    def make_decision_for_non_running_worker_group(self) -> Any:
        """A group as large as the nodes allow now, or none yet."""
        self._must_probe = True
        decision = super().make_decision_for_non_running_worker_group()
        must_wait = isinstance(decision, NoopDecision)
        if must_wait and not self._is_waiting:
            self._tell("waiting", f"for {self.scaling_config.min_workers} workers to be possible")
        if must_wait:
            time.sleep(_WAIT_S)  # the controller asks again at once, in a busy loop
        self._is_waiting = must_wait
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> Any:
        """Shrink at once, grow after a while."""
        self._maybe_send_resource_request()
        now = time_monotonic()
        if now - self._looked_at < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._looked_at = now
        self._must_probe = False  # of a group that runs, every node answers to somebody
        reserved, size = self._get_reserved_resources(), worker_group_state.num_workers
        possible = size if reserved is None else self._count_possible_workers(reserved)
        going = self._draining.intersection(w.metadata.node_id for w in worker_group_state.workers)
        if going - self._warned and not self.scaling_config.min_workers <= possible < size:
            # Too few would be left, or others came: what can be kept just now is the position.
            for worker in worker_group_state.workers:
                worker.execute_async(request_save)
        self._warned = going
        if possible < self.scaling_config.min_workers or possible == size:
            self._larger = (0, now)
            return NoopDecision()
        if possible > size and not self._may_grow(possible, now, worker_group_state.start_time):
            return NoopDecision()
        return self._get_resize_decision(possible)

    def _may_grow(self, possible: int, now: float, began: float) -> bool:
        if self._larger[0] != possible:
            self._larger = (possible, now)
        has_stood = now - self._larger[1] >= self._min_stay / 3
        return has_stood and now - began >= self._min_stay

    def _get_reserved_resources(self) -> Any:
        """The nodes as they are now, without those that are about to go; None if unknown."""
        try:
            reserved = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=_ASK_S,
            )
            draining = set(ray._private.state.state.get_draining_nodes())
        except RayError as error:
            log.warning("the capacity of the cluster is not known just now: %s", error)
            return None
        if draining - self._draining:
            num_new = len(draining - self._draining)
            self._tell("drain", f"{num_new} nodes have notice to go", nodes=num_new)
        self._draining = draining
        gone = unreachable(set(reserved)) if self._must_probe else set()
        return {node: have for node, have in reserved.items() if node not in draining | gone}


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


class ResizeCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]  # no types
    """Has the group save before a planned resize: Ray Train would end it without a word.

    Runs in the controller's process.
    """

    def __init__(self, tell: Teller) -> None:
        self._tell = tell
        self._group: Any = None  # Ray's WorkerGroup while one is up

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Tell that one is being placed."""
        size = worker_group_context.num_workers
        self._tell("launch", f"{size} workers are being placed", world=size)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the workers."""
        self._group = worker_group

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Forget the workers."""
        self._group = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """A broken group cannot be asked to save, though it is shut down only later."""
        self._group = None

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Have the workers save and stop; nothing is lost by the resize that follows."""
        if self._group is None:
            return  # a start, or a restart after a crash: there is nobody to ask
        now = len(self._group.get_workers())
        self._tell(
            "resize_requested", f"{now} -> {resize_decision.num_workers} workers",
            world_from=now, world_to=resize_decision.num_workers,
        )  # fmt: skip
        try:
            self._save(self._group)
        except RayError as error:
            # A worker died while it was asked; the resize goes on, from the last checkpoint.
            self._tell("crash", f"the workers could not save before the resize: {error}")

    def _save(self, group: Any) -> None:
        self._ask(group, request_stop)
        deadline = time.monotonic() + _SAVE_DEADLINE_S
        while time.monotonic() < deadline:
            if all(self._ask(group, has_stopped)):
                return
            status = group.poll_status(timeout=1)
            if status.errors:
                reason = last_line(next(iter(status.errors.values())))
                self._tell("crash", f"while the workers saved before a resize: {reason}")
                return
            if status.finished:
                return
            time.sleep(0.05)
        self._tell("crash", f"the workers did not save within {_SAVE_DEADLINE_S:.0f} s")

    def _ask(self, group: Any, function: Any) -> list[Any]:
        # With a limit: a stopped process answers never, and the controller must not wait for it.
        answers: list[Any] = ray.get(group.execute_async(function), timeout=_ASK_S)
        return answers


class CrashPolicy(FailurePolicy):  # type: ignore[misc]  # Ray has no types
    """Another try, unless it would only repeat the failure or the budget is spent.

    What is known of progress and of drain notices comes from the journal: it outlives controllers.
    """

    def __init__(self, run: Path, stage: str, tell: Teller) -> None:
        super().__init__(FailureConfig())
        self._run = run
        self._stage = stage
        self._tell = tell
        self._budget = Budget()

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Tell the crash, and decide."""
        errors = errors_of(training_failed_error)
        for error in errors:
            if isinstance(error, StageBlocked | InputError):
                self._tell("blocked", str(error))
                return FailureDecision.RAISE
        if any(isinstance(error, WorkerGroupStartupTimeoutError) for error in errors):
            # Somebody else took the machines in between: nothing has broken, and nothing is spent.
            self._tell("waiting", "the workers could not be placed")
            return FailureDecision.RETRY
        events = [e for e in read_events(self._run) if e["stage"] == self._stage]
        self._tell("crash", cause_of(errors))
        if is_announced(events, time.time()):
            return FailureDecision.RETRY
        # A group that gives itself up has lost that many lives in a row.
        num = MAX_LIVES if all(isinstance(error, Regroup) for error in errors) else 1
        if self._budget.crashed(newest_published(events), num):
            return FailureDecision.RETRY
        return FailureDecision.RAISE


def errors_of(failure: Any) -> list[BaseException]:  # Ray's TrainingFailedError
    """What the ranks raised, or what the controller itself ran into."""
    failures = getattr(failure, "worker_failures", None)
    if failures:
        return [getattr(error, "_base_exc", error) for error in failures.values()]
    return [getattr(failure, "controller_failure", failure)]


def cause_of(errors: list[BaseException]) -> str:
    """What the error says that tells most: who died, before those who only lost the others."""
    return last_line(min(errors, key=lambda error: isinstance(error, Regroup)))


def newest_published(events: list[Event]) -> int:
    """Position of the newest checkpoint among a stage's events; -1 for none."""
    return max((e["position"] or 0 for e in events if e["kind"] == "publish"), default=-1)


def is_announced(events: list[Event], wall: float) -> bool:
    """Whether a stage had a drain notice so recently that a loss is put down to it."""
    return any(e["kind"] == "drain" and abs(wall - e["wall"]) < _ANNOUNCED_S for e in events)
