"""What we put into Ray Train's controller: when a group changes its size, and when it gives up.

All three are handed to it in place of its own, or beside them (elastic.ray_train). They are
developer API, so Ray is pinned exactly and tests/test_ray_contract.py names what is relied on.
"""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as _state
from ray.exceptions import GetTimeoutError, RayError
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

from elastic.budget import MAX_CRASHES, Budget
from elastic.errors import InputError, StageBlocked, last_line
from elastic.journal import Event, read_events
from elastic.ray_placing import WATCH, unreachable
from elastic.ray_tracker import TrackerHandle
from elastic.ray_worker import MAX_LIVES, Regroup, has_stopped, request_save, request_stop

log = logging.getLogger(__name__)

_ASK_S = 5.0
_WAIT_S = 1.0
_SAVE_DEADLINE_S = 600.0  # of a large model; a process that hangs is found by its supervisor
_LAST_CALL_S = 10.0  # before a node goes


class Teller:
    """Tells the tracker about one stage, from the controller's process; never fails."""

    def __init__(self, stage: str, tracker: str) -> None:
        self._stage = stage
        self._tracker = tracker

    def __call__(self, kind: str, reason: str, **more: Any) -> None:  # the fields of the kind
        """One event."""
        try:
            TrackerHandle(self._tracker).event(kind, self._stage, None, reason, **more)
        except Exception as error:  # no tracker, or no head: training goes on without it
            log.warning("%s could not be told: %s", kind, error)


class CapacityPolicy(ElasticScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """As many workers as fit, seen fresh, without what is about to go; and no thrashing.

    Ray Train's own policy trusts a view of the nodes that is up to 20 s old, counts draining and
    silent nodes as capacity, and grows as soon as anything comes. This one has the coordinator look
    again each time, asks for as much more as lies on nodes that do not count, leaves a node that
    has notice `leave_before` seconds before its end, and grows only when the group has had its size
    for `min_stay` seconds, the new capacity has stood, free, for a third of that, and the larger
    group `gains` by it. Every size is a `multiple`, as are the fewest and the most. Once a stop is
    wanted it has the group save and moves nothing any more: the driver ends the run.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        min_stay: float,
        leave_before: float,
        tell: Teller,
        stop_wanted: Callable[[], bool],
        multiple: int = 1,
        gains: Callable[[int, int], bool] = lambda now, more: True,
    ) -> None:
        super().__init__(scaling_config)
        self._gains = gains
        self._multiple = multiple
        self._min_stay = min_stay
        self._leave_before = leave_before
        self._tell = tell
        self._stop_wanted = stop_wanted
        self._asked_to_stop: float | None = None  # the group that was, by the time of its start
        self._is_saved = False
        self._draining: dict[str, float] = {}  # node: wall time of its end, 0 where it is not told
        self._ends: dict[str, tuple[float, float]] = {}  # as told, and by the monotonic clock
        self._calls: set[tuple[str, str]] = set()  # saves that were asked for, by node and reason
        self._looked_at = float("-inf")
        self._larger = (0, 0.0)  # a size that the nodes would allow, and since when they do
        self._num_tries = 0  # to place a group, since one ran
        self._is_waiting = False
        self._num_extra = 0  # workers asked for in place of those on nodes that do not count

    def make_decision_for_non_running_worker_group(self) -> Any:
        """A group as large as the nodes allow now, or none yet."""
        if self._stop_wanted():
            self._tell_saved("no group trains")
            time.sleep(_WAIT_S)
            return NoopDecision()
        self._maybe_send_resource_request()
        possible = self._possible(must_answer=True)
        if possible is not None and self._num_tries:
            # Somebody else's work is where the last group did not fit in time.
            possible = self._admissible(min(possible, self._free()))
        if possible is None or possible < self.scaling_config.min_workers:
            if possible is not None and not self._is_waiting:
                self._is_waiting = True
                self._tell("waiting", f"for {self.scaling_config.min_workers} workers to fit")
            time.sleep(_WAIT_S)  # the controller asks again at once, in a busy loop
            return NoopDecision()
        self._is_waiting = False
        self._num_tries += 1
        return self._get_resize_decision(possible)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> Any:
        """Leave a node with notice in time, shrink at once, grow after a while."""
        self._num_tries = 0
        if not self._is_saved:
            self._maybe_send_resource_request()
        now = time_monotonic()
        if now - self._looked_at < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._looked_at = now
        if self._stop_wanted():
            self._stop(worker_group_state)
            return NoopDecision()
        possible, size = self._possible(must_answer=False), worker_group_state.num_workers
        if possible is None:
            return NoopDecision()
        members = [w.metadata.node_id for w in worker_group_state.workers]
        going = self._draining.keys() & set(members)
        self._announce(going)
        if possible < self.scaling_config.min_workers:
            self._save_for(going, worker_group_state)
            return NoopDecision()
        # They work on until they must be left; should they go before, little is lost.
        staying = {node for node in going if (self._time_left(node) or 0.0) > self._leave_before}
        self._save_for(staying, worker_group_state)
        others = sum(node not in staying for node in members)
        if going - staying or possible < self._admissible(others):
            return self._get_resize_decision(possible)
        # The next group has the places of the others and what is free.
        if possible > size:
            possible = min(possible, self._admissible(others + self._free()))
        if possible <= size:
            self._larger = (0, now)
            return NoopDecision()
        may_grow = self._may_grow(possible, now, worker_group_state.start_time)
        if not may_grow or not self._gains(size, possible):
            return NoopDecision()
        return self._get_resize_decision(possible)

    def _stop(self, state: WorkerGroupState) -> None:
        """Have the group save and stop, and tell when all of it has."""
        if self._asked_to_stop != state.start_time:
            self._asked_to_stop = state.start_time
            for worker in state.workers:
                worker.execute_async(request_stop)
        try:
            answers = [worker.execute_async(has_stopped) for worker in state.workers]
            if all(ray.get(answers, timeout=_ASK_S)):
                self._tell_saved(f"{len(answers)} workers have saved and stopped")
        except RayError as error:  # slow, or lost: another group is asked again
            log.info("whether the workers have stopped is not known just now: %s", error)

    def _tell_saved(self, reason: str) -> None:
        if not self._is_saved:
            self._is_saved = True
            self._cancel_resource_request()  # else it would stand for three minutes
            self._tell("stop_saved", reason)

    def _may_grow(self, possible: int, now: float, began: float) -> bool:
        if self._larger[0] != possible:
            self._larger = (possible, now)
        has_stood = now - self._larger[1] >= self._min_stay / 3
        return has_stood and now - began >= self._min_stay

    def _time_left(self, node: str) -> float | None:
        """Seconds until a node with notice goes; None where nobody said when that is.

        Ray tells the wall time of its end, by the clock of whoever drains. It is compared with ours
        once: whatever jumps afterwards moves nothing.
        """
        end = self._draining[node]
        if not end:
            return None
        if self._ends.get(node, (0.0, 0.0))[0] != end:
            self._ends[node] = (end, float(time_monotonic()) + end - time.time())
        return self._ends[node][1] - float(time_monotonic())

    def _announce(self, going: set[str]) -> None:
        new = going - {node for node, _ in self._calls}
        if new:
            self._tell("drain", f"{len(new)} nodes of the group have notice", nodes=len(new))
        self._calls |= {(node, "told") for node in new}

    def _save_for(self, going: set[str], state: WorkerGroupState) -> None:
        """Have the group save at the notice; and shortly before the end, if it is still there."""
        for node in going:
            left = self._time_left(node)
            is_near = left is not None and left < _LAST_CALL_S
            call = (node, "last" if is_near else "first")
            if call not in self._calls:
                self._calls.add(call)
                for worker in state.workers:
                    worker.execute_async(request_save)

    def _possible(self, must_answer: bool) -> int | None:
        """How many workers the nodes that count have room for; None if that is unknown now."""
        try:
            reserved, draining = self._reserved(), _state.get_draining_nodes()
            self._draining = {node: end / 1000 for node, end in draining.items()}
            barred = self._draining.keys() | (unreachable(set(reserved)) if must_answer else set())
            extra = self._count_possible_workers(_only(reserved, barred))
            if extra != self._num_extra:
                self._num_extra = extra
                self._send_resource_request()
                reserved = self._reserved()
        except Exception as error:  # whatever it is: a healthy group must not end by it
            log.warning("the capacity of the cluster is not known just now: %s", error)
            return None
        counted = _only(reserved, reserved.keys() - barred)
        return self._admissible(int(self._count_possible_workers(counted)))

    def _admissible(self, workers: int) -> int:
        """As many of them as a group can have."""
        return workers - workers % self._multiple

    def _reserved(self) -> Any:
        asked = self._autoscaling_coordinator.get_reserved_resources.remote(
            self._requester_id, recompute=True
        )
        return ray.get(asked, timeout=_ASK_S)

    def _free(self) -> int:
        """How many more workers fit onto what nobody uses now; none where that is unknown."""
        try:
            free = available_resources_per_node()
        except Exception as error:  # as above
            log.warning("what is free of the cluster is not known just now: %s", error)
            return 0
        return int(self._count_possible_workers(_only(free, free.keys() - self._draining.keys())))

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.max_workers) + self._num_extra


def _only(resources: dict[str, Any], nodes: Collection[str]) -> dict[str, Any]:
    return {node: have for node, have in resources.items() if node in nodes}


class ResizeCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]  # no types
    """Has the group save before a planned resize: Ray Train would end it without a word.

    Runs in the controller's process.
    """

    def __init__(self, tell: Teller) -> None:
        self._tell = tell
        self._group: Any = None  # Ray's WorkerGroup while one is up

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Tell that one is being placed, and watch its nodes meanwhile."""
        WATCH.begin()
        size = worker_group_context.num_workers
        self._tell("launch", f"{size} workers are being placed", world=size)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the workers."""
        WATCH.end(is_up=True)
        self._group = worker_group

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Forget the workers."""
        self._group = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """A broken group cannot be asked to save, though it is shut down only later."""
        WATCH.end()
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
        group.execute_async(request_stop)
        deadline = time.monotonic() + _SAVE_DEADLINE_S
        while time.monotonic() < deadline:
            status = group.poll_status(timeout=1)
            if status.errors:
                errors = [getattr(error, "_base_exc", error) for error in status.errors.values()]
                for error in errors:
                    if isinstance(error, StageBlocked | InputError):
                        raise error  # to the policy, which ends the stage
                self._tell("crash", f"while they saved for a resize: {cause_of(errors)}")
                return
            if status.finished or self._have_stopped(group):
                return
            time.sleep(0.05)
        self._tell("crash", f"the workers did not save within {_SAVE_DEADLINE_S:.0f} s")

    def _have_stopped(self, group: Any) -> bool:
        try:
            return all(ray.get(group.execute_async(has_stopped), timeout=_ASK_S))
        except GetTimeoutError:
            return False  # slow, or frozen: the poll finds out


class CrashPolicy(FailurePolicy):  # type: ignore[misc]  # Ray has no types
    """Another try, unless it would only repeat the failure or the budget is spent.

    Progress, losses and drain notices come from the journal. A node that had notice excuses one.
    """

    def __init__(self, run: Path, stage: str, tell: Teller) -> None:
        super().__init__(FailureConfig())
        self._run = run
        self._stage = stage
        self._tell = tell
        self._budget = Budget()
        self._num_excused = 0

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
        if WATCH.reason:  # it had not begun: nothing is lost, and nothing is spent
            self._tell("waiting", WATCH.reason)
            return FailureDecision.RETRY
        events = [e for e in read_events(self._run) if e["stage"] == self._stage]
        self._tell("crash", cause_of(errors))
        if self._num_excused < num_announced(events):
            self._num_excused += 1
            return FailureDecision.RETRY
        # The journal outlives controllers; what this one has seen stands in where it has a gap.
        num = MAX_LIVES if all(isinstance(error, Regroup) for error in errors) else 1
        is_within = self._budget.crashed(newest_published(events), num)
        if is_within and crashes_in_a_row(events) < MAX_CRASHES:
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


def crashes_in_a_row(events: list[Event]) -> int:
    """Losses of a stage that its journal holds since the newest checkpoint."""
    kinds = [event["kind"] for event in events]
    newest = max((number for number, kind in enumerate(kinds) if kind == "publish"), default=-1)
    return sum(kind in ("crash", "hang") for kind in kinds[newest + 1 :])


def num_announced(events: list[Event]) -> int:
    """Nodes of a stage's groups that had notice: so many losses are put down to that."""
    return sum(event.get("nodes", 0) for event in events if event["kind"] == "drain")
