"""What we put into Ray Train's controller: its decisions, and what we rely on there."""

import inspect
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution import callback
from ray.train.v2._internal.execution.controller import controller as ray_controller
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, WorkerGroupState
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError

from elastic import ray_policy
from elastic.errors import StageBlocked
from elastic.journal import Event
from elastic.ray_policy import CapacityPolicy, CrashPolicy, cause_of, is_announced, unreachable
from elastic.ray_worker import Regroup


class Told:
    """A teller that keeps what it was told."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def __call__(self, kind: str, reason: str, **more: Any) -> None:
        self.kinds.append(kind)


class Cluster(CapacityPolicy):  # type: ignore[misc]  # Ray has no types
    """The policy with nodes of one CPU each that the test sets, and the test's clock."""

    def __init__(self, min_stay: float = 30.0) -> None:
        self.told = Told()
        scaling = ScalingConfig(num_workers=(2, 4), elastic_resize_monitor_interval_s=1)
        super().__init__(scaling, min_stay, self.told)  # type: ignore[arg-type]
        self.nodes = ["a", "b"]
        self.saved: list[str] = []

    def _maybe_send_resource_request(self) -> None:
        pass

    def _get_reserved_resources(self) -> Any:
        return {node: {"CPU": 1.0} for node in self.nodes if node not in self._draining}

    def size_of(self, members: str, began: float) -> int | None:
        """The size that it wants for a running group; None to leave it."""
        workers = [
            SimpleNamespace(
                metadata=SimpleNamespace(node_id=node),
                execute_async=lambda function, node=node: self.saved.append(node),
            )
            for node in members
        ]
        state = SimpleNamespace(num_workers=len(workers), workers=workers, start_time=began)
        decision = self.make_decision_for_running_worker_group(state, None)  # type: ignore[arg-type]
        return None if isinstance(decision, NoopDecision) else int(decision.num_workers)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(ray_policy, "time_monotonic", lambda: clock.s)
    return clock


def test_a_group_grows_only_after_its_stay_and_onto_nodes_that_have_stood(
    now: SimpleNamespace,
) -> None:
    cluster = Cluster(min_stay=30)
    began = now.s
    now.s += 25
    cluster.nodes = ["a", "b", "c"]
    assert cluster.size_of("ab", began) is None, "too early"
    now.s += 6
    assert cluster.size_of("ab", began) is None, "the node has stood for 6 s, not for 10"
    now.s += 5
    assert cluster.size_of("ab", began) == 3


def test_flapping_capacity_moves_nothing(now: SimpleNamespace) -> None:
    cluster = Cluster(min_stay=30)
    began = now.s - 1000
    for _ in range(20):
        now.s += 5
        cluster.nodes = ["a", "b", "c"]
        assert cluster.size_of("ab", began) is None
        now.s += 5
        cluster.nodes = ["a", "b"]
        assert cluster.size_of("ab", began) is None


def test_a_node_with_notice_is_left_at_once(now: SimpleNamespace) -> None:
    cluster = Cluster()
    cluster.nodes = ["a", "b", "c"]
    now.s += 2
    cluster._draining = {"c"}
    assert cluster.size_of("abc", now.s - 1) == 2
    assert cluster.saved == [], "the resize itself saves"


def test_where_the_rest_would_be_too_few_the_group_saves_once_and_stays(
    now: SimpleNamespace,
) -> None:
    cluster = Cluster()
    cluster._draining = {"b"}
    for _ in range(3):
        now.s += 2
        assert cluster.size_of("ab", now.s) is None
    assert cluster.saved == ["a", "b"]


def test_a_group_waits_for_its_fewest_workers_and_says_so_once() -> None:
    cluster = Cluster()
    cluster.nodes = ["a"]
    for _ in range(3):
        assert isinstance(cluster.make_decision_for_non_running_worker_group(), NoopDecision)
    assert cluster.told.kinds == ["waiting"]
    cluster.nodes = ["a", "b", "c"]
    assert cluster.make_decision_for_non_running_worker_group().num_workers == 3


def test_a_node_that_takes_no_connection_is_no_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening
        ports = {"up": raylet.getsockname()[1], "down": nobody.getsockname()[1], "other": 1}
        nodes = [
            {"NodeID": name, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for name, port in ports.items()
        ]
        monkeypatch.setattr(ray_policy.ray, "nodes", lambda: nodes)
        assert unreachable({"up", "down"}) == {"down"}


def event(kind: str, position: int | None = None, age_s: float = 0.0) -> Event:
    return Event(
        wall=time.time() - age_s, kind=kind, stage="s", position=position,
        attempt=None, world=None, reason="",
    )  # fmt: skip


def policy_with(monkeypatch: pytest.MonkeyPatch, events: list[Event]) -> tuple[CrashPolicy, Told]:
    told = Told()
    monkeypatch.setattr(ray_policy, "read_events", lambda run: events)
    return CrashPolicy(None, "s", told), told  # type: ignore[arg-type]


def failure(*errors: BaseException) -> Any:
    return SimpleNamespace(worker_failures=dict(enumerate(errors)))


def decisions(policy: CrashPolicy, error: Any, num: int) -> list[bool]:
    return [policy.make_decision(error) is FailureDecision.RETRY for _ in range(num)]


def test_crashes_in_a_row_end_the_stage_and_a_checkpoint_heals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = [event("publish", 100)]
    policy, told = policy_with(monkeypatch, events)
    lost = failure(RuntimeError("the actor died"), Regroup("the supervisor of rank 0 is lost"))
    assert decisions(policy, lost, 8) == [True] * 8
    events.append(event("publish", 200))
    assert decisions(policy, lost, 9) == [True] * 8 + [False]
    assert told.kinds == ["crash"] * 17


def test_a_group_that_gave_itself_up_has_spent_several_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, _ = policy_with(monkeypatch, [])
    assert decisions(policy, failure(Regroup("rank 1: exit code 1")), 3) == [True, True, False]


def test_announced_losses_spend_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = policy_with(monkeypatch, [event("drain", age_s=60)])
    assert all(decisions(policy, failure(RuntimeError("gone")), 30))
    policy, _ = policy_with(monkeypatch, [event("drain", age_s=3600)])
    assert not all(decisions(policy, failure(RuntimeError("gone")), 30))
    assert not is_announced([event("crash")], time.time())


def test_workers_that_cannot_be_placed_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, told = policy_with(monkeypatch, [])
    late = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    assert all(decisions(policy, late, 30))
    assert set(told.kinds) == {"waiting"}


def test_what_would_only_repeat_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, told = policy_with(monkeypatch, [])
    assert decisions(policy, failure(StageBlocked("lower optimizer.lr")), 1) == [False]
    assert told.kinds == ["blocked"]


def test_the_cause_is_who_died_not_who_lost_the_others() -> None:
    errors = [Regroup("the supervisor of rank 1 is lost"), RuntimeError("Trace\n  killed by OOM")]
    assert cause_of(errors) == "killed by OOM"


def test_ray_has_what_we_rely_on() -> None:
    """The contract with the pinned Ray: hooks, arguments and fields that are developer API."""
    source = inspect.getsource(ray_controller.TrainController)
    for hook in (
        "before_controller_execute_resize_decision",
        "before_controller_execute_failure_decision",
    ):
        assert f'"{hook}"' in source
        assert hasattr(callback.ControllerCallback, hook)
    for hook in ("before_worker_group_start", "after_worker_group_start"):
        assert hasattr(callback.WorkerGroupCallback, hook)
    # A resize is announced before the old group is shut down.
    resize = inspect.getsource(ray_controller.TrainController._execute_resize_decision)
    hook = resize.index("before_controller_execute_resize_decision")
    assert hook < resize.index("_shutdown_worker_group")
    # fit() makes the policies and hands them over here, where ours take their place.
    fit = inspect.getsource(DataParallelTrainer.fit)
    assert all(f"{name}=" in fit for name in ("scaling_policy", "failure_policy"))
    assert "**controller_init_kwargs" in inspect.getsource(
        DataParallelTrainer._initialize_and_run_controller
    )
    for method in ("_count_possible_workers", "_get_resize_decision", "_get_reserved_resources"):
        assert hasattr(ElasticScalingPolicy, method)
    assert inspect.isabstract(FailurePolicy)
    assert {"num_workers", "workers", "start_time"} <= set(dir(WorkerGroupState)) | set(
        WorkerGroupState.__annotations__
    )
    for method in ("execute_async", "poll_status", "get_workers"):
        assert hasattr(WorkerGroup, method)
    assert hasattr(Worker, "execute_async")
    actor = default_autoscaling_coordinator._AutoscalingCoordinatorActor
    assert "recompute" in inspect.signature(actor.get_reserved_resources).parameters
    assert "requester_id" in inspect.signature(actor.cancel_request).parameters
    assert "callbacks" in inspect.signature(RunConfig).parameters
