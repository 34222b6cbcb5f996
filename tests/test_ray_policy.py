"""What we put into Ray Train's controller: its decisions, and what we rely on there."""

import inspect
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    _AutoscalingCoordinatorActor as Coordinator,
)
from ray.exceptions import GetTimeoutError
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
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
from elastic.ray_policy import CapacityPolicy, CrashPolicy, ResizeCallback, cause_of
from elastic.ray_worker import Regroup

unreachable = ray_policy.unreachable  # the tests of decisions put another in its place


class Told:
    """A teller that keeps what it was told."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def __call__(self, kind: str, reason: str, **more: Any) -> None:
        self.kinds.append(kind)


class Cluster(CapacityPolicy):  # type: ignore[misc]  # Ray has no types
    """The policy on made-up nodes of one CPU each, with Ray's own coordinator in this process."""

    def __init__(
        self,
        min_stay: float = 30.0,
        workers: tuple[int, int] = (2, 4),
        multiple: int = 1,
        gains: Callable[[int, int], bool] = lambda now, more: True,
    ) -> None:
        self.told = Told()
        scaling = ScalingConfig(num_workers=workers, elastic_resize_monitor_interval_s=1)
        stops = lambda: self.stops  # noqa: E731
        super().__init__(scaling, min_stay, 60.0, self.told, stops, multiple, gains)  # type: ignore[arg-type]
        self.stops = False
        self.nodes = ["a", "b"]
        self.draining: dict[str, int] = {}
        self.taken: set[str] = set()  # by somebody else
        self.saved: list[str] = []
        self._members = ""
        self._coordinator = Coordinator(
            send_resources_request=lambda bundles, labels=None: None,
            get_cluster_nodes=lambda: [
                {"NodeID": node, "Alive": True, "Resources": {"CPU": 1.0}, "Labels": {}}
                for node in self.nodes
            ],
        )
        self._send_resource_request()

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        self._coordinator.cancel_request("r")

    def _send_resource_request(self) -> None:
        asked = [{"CPU": 1.0}] * self._get_num_workers_for_resource_request()
        self._coordinator.request_resources(requester_id="r", resources=asked, expire_after_s=1e6)

    def _reserved(self) -> Any:
        return self._coordinator.get_reserved_resources("r", recompute=True)

    def _free(self) -> int:
        return len(set(self.nodes) - set(self._members) - self.taken - self._draining.keys())

    def size_of(self, members: str, began: float) -> int | None:
        """The size that it wants for a running group; None to leave it."""
        self._members = members
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

    def size_now(self) -> int | None:
        """The size that it wants where no group runs; None to wait."""
        self._members = ""
        decision = self.make_decision_for_non_running_worker_group()
        return None if isinstance(decision, NoopDecision) else int(decision.num_workers)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(ray_policy, "time_monotonic", lambda: clock.s)
    return clock


@pytest.fixture(autouse=True)
def notices(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Nodes with notice, and milliseconds of the wall clock at which they go."""
    told: dict[str, int] = {}
    monkeypatch.setattr(ray_policy, "_state", SimpleNamespace(get_draining_nodes=lambda: told))
    monkeypatch.setattr(ray_policy, "_WAIT_S", 0.0)
    monkeypatch.setattr(ray_policy, "unreachable", lambda nodes: nodes & {"silent"})
    return told


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


def test_a_node_with_notice_is_left_at_once(now: SimpleNamespace, notices: dict[str, int]) -> None:
    cluster = Cluster()
    cluster.nodes = ["a", "b", "c"]
    notices["c"] = 0
    assert cluster.size_of("abc", now.s) == 2
    assert cluster.told.kinds == ["drain"]
    assert cluster.saved == [], "the resize itself saves"


def test_a_node_with_a_long_notice_is_saved_for_at_once_and_left_a_minute_before_it_goes(
    now: SimpleNamespace, notices: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = SimpleNamespace(s=5000.0)
    monkeypatch.setattr(ray_policy.time, "time", lambda: wall.s)
    cluster = Cluster()
    cluster.nodes = ["a", "b", "c"]
    notices["c"] = 5_120_000
    for _ in range(30):
        assert cluster.size_of("abc", now.s) is None
        now.s += 2
        wall.s -= 100  # a clock that is set back moves nothing
    assert cluster.saved == ["a", "b", "c"], "once, at the notice"
    assert cluster.size_of("abc", now.s) == 2
    assert cluster.told.kinds == ["drain"]


def test_while_a_node_with_notice_works_on_another_loss_shrinks_the_group_at_once(
    now: SimpleNamespace, notices: dict[str, int]
) -> None:
    cluster = Cluster()
    cluster.nodes = ["a", "b", "c", "d"]
    notices["d"] = int((time.time() + 1000) * 1000)
    assert cluster.size_of("abcd", now.s) is None
    cluster.nodes = ["a", "b", "d"]
    now.s += 2
    assert cluster.size_of("abcd", now.s) == 2


def test_while_a_node_with_notice_works_on_a_new_one_is_taken_in_its_place_in_time(
    now: SimpleNamespace, notices: dict[str, int]
) -> None:
    cluster = Cluster(min_stay=30)
    began = now.s - 100
    cluster.nodes = ["a", "b", "c"]
    notices["c"] = int((time.time() + 1000) * 1000)
    for _ in range(10):  # as many as before: no reason to move yet
        now.s += 10
        assert cluster.size_of("abc", began) is None
        cluster.nodes = ["a", "b", "c", "d"]
    cluster.nodes = ["a", "b", "c", "d", "e"]
    now.s += 2
    assert cluster.size_of("abc", began) is None
    now.s += 15
    assert cluster.size_of("abc", began) == 4, "more than before, and without the one that goes"


def test_no_more_workers_are_asked_for_than_the_next_group_has_places(
    now: SimpleNamespace, notices: dict[str, int]
) -> None:
    """The places of nodes with notice, which work on, are none of the next group's."""
    cluster = Cluster(min_stay=1, workers=(2, 8))
    cluster.nodes, cluster.taken = list("abcdefgh"), {"e", "f"}
    notices["c"] = notices["d"] = int((time.time() + 1000) * 1000)
    for _ in range(5):
        assert cluster.size_of("abcd", 0.0) is None, "a, b, g and h: no more than now"
        now.s += 10


def test_a_node_with_notice_is_left_for_another_one_though_the_size_stays(
    now: SimpleNamespace, notices: dict[str, int]
) -> None:
    """The nodes that go must not take the places of those that are free either."""
    cluster = Cluster(workers=(2, 2))
    cluster.nodes = ["a", "b", "c"]
    notices["a"] = 0
    assert cluster.size_of("ab", now.s) == 2
    now.s += 2
    assert cluster.size_of("bc", now.s) is None


def test_where_the_rest_would_be_too_few_the_group_saves_at_the_notice_and_near_the_end(
    now: SimpleNamespace, notices: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = SimpleNamespace(s=5000.0)
    monkeypatch.setattr(ray_policy.time, "time", lambda: wall.s)
    cluster = Cluster()
    notices["b"] = 5_060_000
    for _ in range(3):
        now.s += 2
        assert cluster.size_of("ab", now.s) is None
    assert cluster.saved == ["a", "b"]
    now.s += 50
    for _ in range(3):
        now.s += 2
        assert cluster.size_of("ab", now.s) is None
    assert cluster.saved == ["a", "b"] * 2


def test_a_node_that_somebody_else_uses_is_no_reason_to_grow(now: SimpleNamespace) -> None:
    cluster = Cluster(min_stay=1)
    cluster.nodes, cluster.taken = ["a", "b", "c"], {"c"}
    for _ in range(5):
        now.s += 10
        assert cluster.size_of("ab", 0.0) is None
    cluster.taken = set()
    now.s += 10
    cluster.size_of("ab", 0.0)
    now.s += 10
    assert cluster.size_of("ab", 0.0) == 3


def test_a_group_does_not_grow_to_where_no_update_is_shorter(now: SimpleNamespace) -> None:
    asked: list[tuple[int, int]] = []

    def gains(size: int, more: int) -> bool:
        asked.append((size, more))
        return more > 3

    cluster = Cluster(min_stay=30, gains=gains)
    cluster.nodes = ["a", "b", "c"]
    for _ in range(5):
        now.s += 12
        assert cluster.size_of("ab", 0.0) is None
    assert set(asked) == {(2, 3)}
    cluster.nodes = ["a", "b", "c", "d"]
    now.s += 12
    assert cluster.size_of("ab", 0.0) is None, "it has not stood yet"
    now.s += 12
    assert cluster.size_of("ab", 0.0) == 4
    assert cluster.size_now() == 4, "a start takes what is there"
    cluster.nodes = ["a", "b", "c"]
    assert cluster.size_now() == 3


def test_a_group_that_could_not_be_placed_is_tried_on_what_is_free() -> None:
    cluster = Cluster()
    cluster.nodes = ["a", "b", "c"]
    assert cluster.size_now() == 3
    cluster.taken = {"c"}
    assert cluster.size_now() == 2
    cluster.taken = {"b", "c"}
    assert cluster.size_now() is None
    assert cluster.told.kinds == ["waiting"]


def test_a_group_starts_with_a_multiple_of_what_its_stage_asks_for() -> None:
    cluster = Cluster(workers=(2, 8), multiple=2)
    cluster.nodes = list("abcde")
    assert cluster.size_now() == 4
    cluster.taken = {"b", "c"}  # the group did not fit in time
    assert cluster.size_now() == 2
    cluster.taken = {"a", "b", "c", "d"}
    assert cluster.size_now() is None
    assert cluster.told.kinds == ["waiting"]


def test_one_node_more_is_no_reason_to_grow_where_two_are_needed(now: SimpleNamespace) -> None:
    cluster = Cluster(min_stay=1, workers=(2, 8), multiple=2)
    for nodes in ("abc", "ab", "abc", "abc", "abc"):
        cluster.nodes = list(nodes)
        assert cluster.size_of("ab", 0.0) is None
        now.s += 10
    cluster.nodes, cluster.taken = list("abcd"), {"d"}
    for _ in range(3):
        assert cluster.size_of("ab", 0.0) is None
        now.s += 10
    cluster.taken = set()
    assert cluster.size_of("ab", 0.0) is None, "it has not stood yet"
    now.s += 10
    assert cluster.size_of("ab", 0.0) == 4


def test_a_lost_node_takes_another_one_along_and_the_rest_stays(now: SimpleNamespace) -> None:
    cluster = Cluster(workers=(2, 8), multiple=2)
    cluster.nodes = list("abc")
    assert cluster.size_of("abcd", now.s) == 2
    for _ in range(5):
        now.s += 100
        assert cluster.size_of("ab", 0.0) is None


def test_a_node_with_a_long_notice_works_on_where_sizes_are_multiples(
    now: SimpleNamespace, notices: dict[str, int]
) -> None:
    cluster = Cluster(workers=(2, 8), multiple=2)
    cluster.nodes = list("abcd")
    notices["d"] = int((time.time() + 1000) * 1000)
    for _ in range(5):
        assert cluster.size_of("abcd", now.s) is None
        now.s += 2
    notices["d"] = int((time.time() + 10) * 1000)
    assert cluster.size_of("abcd", now.s) == 2


def test_a_silent_node_takes_no_place_from_one_that_answers() -> None:
    cluster = Cluster(workers=(1, 2))
    cluster.nodes = ["a", "silent", "b"]
    assert cluster.size_now() == 2


def test_a_group_waits_for_its_fewest_workers_and_says_so_once() -> None:
    cluster = Cluster()
    cluster.nodes = ["a"]
    for _ in range(3):
        assert cluster.size_now() is None
    assert cluster.told.kinds == ["waiting"]
    cluster.nodes = ["a", "b", "c"]
    assert cluster.size_now() == 3


def test_a_view_that_fails_moves_nothing(now: SimpleNamespace) -> None:
    cluster = Cluster()
    cluster._reserved = lambda: 1 / 0
    assert cluster.size_of("ab", now.s) is None
    assert cluster.size_now() is None
    assert cluster.told.kinds == []


def test_where_nobody_knows_what_is_free_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_policy, "available_resources_per_node", lambda: 1 / 0)
    assert CapacityPolicy._free(Cluster()) == 0


def test_a_node_that_takes_no_connection_is_no_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_each_node_that_had_notice_excuses_one_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    notice = event("drain")
    notice["nodes"] = 2
    policy, _ = policy_with(monkeypatch, [notice])
    assert decisions(policy, failure(RuntimeError("gone")), 11) == [True] * 10 + [False]


def test_another_controller_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [event("crash"), event("publish", 100), *[event("crash"), event("hang")] * 4]
    policy, _ = policy_with(monkeypatch, events)
    assert decisions(policy, failure(RuntimeError("gone")), 1) == [False]
    policy, _ = policy_with(monkeypatch, events[:-1])
    assert decisions(policy, failure(RuntimeError("gone")), 1) == [True]


def test_workers_that_cannot_be_placed_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, told = policy_with(monkeypatch, [])
    late = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    assert all(decisions(policy, late, 30))
    assert set(told.kinds) == {"waiting"}


def test_a_start_that_was_given_up_for_nodes_that_went_costs_no_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, told = policy_with(monkeypatch, [])
    monkeypatch.setattr(ray_policy, "WATCH", SimpleNamespace(reason="1 nodes went"))
    cut = ControllerError(WorkerGroupStartupFailedError("a worker actor failed to initialize"))
    assert all(decisions(policy, cut, 30))
    assert set(told.kinds) == {"waiting"}


def test_what_would_only_repeat_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, told = policy_with(monkeypatch, [])
    assert decisions(policy, failure(StageBlocked("lower optimizer.lr")), 1) == [False]
    assert told.kinds == ["blocked"]


class Group:
    """Workers that answer as the test says."""

    def __init__(self, answers: list[Any], errors: dict[int, BaseException] | None = None) -> None:
        self._answers = answers
        self._errors = errors or {}

    def get_workers(self) -> list[int]:
        return [0, 1]

    def execute_async(self, function: Any) -> Any:
        return function.__name__

    def poll_status(self, timeout: float) -> Any:
        return SimpleNamespace(errors=self._errors, finished=False)

    def answer(self, asked: str, timeout: float) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def resize(monkeypatch: pytest.MonkeyPatch, group: Group) -> Told:
    told = Told()
    monkeypatch.setattr(ray_policy.ray, "get", group.answer)
    hook = ResizeCallback(told)  # type: ignore[arg-type]
    hook.after_worker_group_start(group)
    hook.before_controller_execute_resize_decision(SimpleNamespace(num_workers=3))
    return told


def test_a_resize_waits_for_a_worker_that_is_slow_to_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [[False, False], GetTimeoutError("slow"), [True, False], [True, True]]
    group = Group(answers)
    assert resize(monkeypatch, group).kinds == ["resize_requested"]
    assert not answers


def test_what_would_only_repeat_ends_the_stage_during_a_resize_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group([], {0: Regroup("lost"), 1: StageBlocked("make room")})
    with pytest.raises(StageBlocked, match="make room"):
        resize(monkeypatch, group)


def test_a_worker_lost_while_it_saves_does_not_hold_up_the_resize(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group([], {1: RuntimeError("the actor died")})
    assert resize(monkeypatch, group).kinds == ["resize_requested", "crash"]


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
    assert "recompute" in inspect.signature(Coordinator.get_reserved_resources).parameters
    assert "requester_id" in inspect.signature(Coordinator.cancel_request).parameters
    assert "callbacks" in inspect.signature(RunConfig).parameters


def test_a_group_that_is_to_stop_is_asked_once_and_told_of_when_all_of_it_has(
    now: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither grows nor shrinks meanwhile."""
    stopped = {"a": False, "b": False}
    asked: list[str] = []

    def execute(node: str, function: Any) -> Any:
        if function is ray_policy.request_stop:
            asked.append(node)
        return stopped[node]

    monkeypatch.setattr(ray_policy.ray, "get", lambda answers, timeout: answers)
    cluster = Cluster(min_stay=0)
    workers = [
        SimpleNamespace(execute_async=lambda function, node=node: execute(node, function))
        for node in stopped
    ]
    cluster.stops = True
    cluster.nodes = ["a", "b", "c"]

    def look(start_time: float) -> Any:
        now.s += 20
        state = SimpleNamespace(num_workers=2, workers=workers, start_time=start_time)
        return cluster.make_decision_for_running_worker_group(state, None)  # type: ignore[arg-type]

    assert isinstance(look(0.0), NoopDecision)
    stopped["a"] = True
    look(0.0)
    assert cluster.told.kinds == []
    assert asked == ["a", "b"]
    look(1.0)  # another group, after a crash
    assert asked == ["a", "b"] * 2
    stopped["b"] = True
    look(1.0)
    look(1.0)
    assert cluster.told.kinds == ["stop_saved"]
    assert not cluster._reserved(), "the next driver does not wait for what this one has claimed"


def test_where_no_group_runs_nothing_is_started_for_a_stop(now: SimpleNamespace) -> None:
    cluster = Cluster()
    cluster.stops = True
    assert cluster.size_now() is None
    assert cluster.size_now() is None
    assert cluster.told.kinds == ["stop_saved"]
