"""A supervisor of one rank, its rally real, with a pipe in place of the training process."""

import threading
from collections.abc import Iterator
from multiprocessing.connection import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic import ray_worker
from elastic.errors import StageBlocked
from elastic.link import SAVE, SETTLED, STOP, Beat, Ended, Failed, Measured, Settle, Told
from elastic.ray_worker import MAX_LIVES, Regroup, Supervisor, Work

DEADLINE_S = 20.0


class Process:
    """The other end of the pipe: what a training process would say and hear."""

    def __init__(self) -> None:
        self.pid = 0
        self.pipe, self.own = Pipe()
        self.code = 0
        self.is_closed = False

    def exit_code(self, timeout_s: float) -> int:
        return self.code

    def close(self) -> None:
        self.is_closed = True
        self.pipe.close()

    def die(self, code: int) -> None:
        self.code = code
        self.own.close()

    def hears(self) -> Any:
        assert self.own.poll(DEADLINE_S), "nothing was said to the process"
        return self.own.recv()


NODES = [
    {"NodeID": "node", "Alive": True, "Resources": {"CPU": 96.0, "GPU": 8.0}},
    {"NodeID": "other", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 4.0}},
]


class Stand:
    """A supervisor at work in a thread, and what it did."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, hang_after: float = 60.0, use_gpu: bool = False
    ) -> None:
        self.events: list[tuple[str, str]] = []
        self.lines: list[Any] = []
        self.settled = 0
        self._forked = threading.Semaphore(0)
        self._processes: list[Process] = []
        self.error: BaseException | None = None
        context = SimpleNamespace(
            get_node_id=lambda: "node", get_job_id=lambda: "01000000",
            get_accelerator_ids=lambda: {},
        )  # fmt: skip
        monkeypatch.setattr(ray_worker.ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(ray_worker.ray, "nodes", lambda: NODES)
        monkeypatch.setattr(ray_worker.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
        monkeypatch.setattr(ray_worker, "broadcast_from_rank_zero", lambda value: value)
        monkeypatch.setattr(ray_worker, "TrackerHandle", lambda name: self)
        monkeypatch.setattr(ray_worker, "wait_for_host", lambda address, seconds: True)
        monkeypatch.setattr(ray_worker, "fork", self._fork)
        monkeypatch.setattr(ray_worker, "_STACKS_S", 0.0)
        monkeypatch.setattr(ray_worker.os, "kill", lambda pid, number: None)
        for flag in (ray_worker._stop, ray_worker._save, ray_worker._stopped):
            flag.clear()
        self.supervisor = Supervisor(Work("stage", "tracker", b"", use_gpu, hang_after), 0, 1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.supervisor.run()
        except BaseException as error:
            self.error = error
        finally:
            self.supervisor.close()

    def _fork(self, address: Path, order: Any, store: Any) -> Process:
        self.order = order
        self._processes.append(Process())
        self._forked.release()
        return self._processes[-1]

    def event(self, kind: str, stage: str, position: int | None, reason: str, **more: Any) -> None:
        self.events.append((kind, reason))

    def metric(self, line: Any) -> None:
        self.lines.append(line)

    def settle(self) -> None:
        self.settled += 1

    def process(self) -> Process:
        """The training process of the next life."""
        assert self._forked.acquire(timeout=DEADLINE_S), "no process was forked"
        return self._processes[-1]

    def end(self) -> BaseException | None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the supervisor goes on"
        return self.error

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    yield Stand(monkeypatch)
    for flag in (ray_worker._stop, ray_worker._save, ray_worker._stopped):
        flag.clear()


def test_what_a_process_tells_reaches_the_journals_and_finishing_ends_the_work(
    stand: Stand,
) -> None:
    process = stand.process()
    process.own.send(Told("start", "stage", 0, "first start", {"attempt": 1}))
    process.own.send(Measured({"position": 8}))
    process.own.send(Settle())
    assert process.hears() == SETTLED
    process.own.send(Ended("finished"))
    assert stand.end() is None
    assert stand.kinds == ["spawn", "start"]
    assert stand.lines == [{"position": 8}]
    assert stand.settled == 1
    assert process.is_closed


@pytest.mark.parametrize(("use_gpu", "expected"), [(False, 1), (True, 12)])
def test_a_process_has_as_many_decoders_as_its_worker_has_cores_of_its_node(
    use_gpu: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(monkeypatch, use_gpu=use_gpu)
    process = stand.process()
    assert stand.order.num_decoders == expected
    process.own.send(Ended("finished"))
    assert stand.end() is None


def test_a_killed_process_is_replaced_and_the_loss_is_told(stand: Stand) -> None:
    first = stand.process()
    first.die(-9)
    second = stand.process()
    assert first.is_closed
    second.own.send(Ended("finished"))
    assert stand.end() is None
    assert stand.kinds == ["spawn", "crash", "spawn"]
    assert stand.events[1][1] == "rank 0: the training process was killed by SIGKILL"


def test_lives_without_a_checkpoint_are_counted_and_one_heals(stand: Stand) -> None:
    for _ in range(MAX_LIVES - 1):
        stand.process().own.send(Failed("crash", "RuntimeError: once more"))
    stand.process().own.send(Told("publish", "stage", 8, "due", {}))
    stand._processes[-1].own.send(Failed("crash", "RuntimeError: once more"))
    for _ in range(MAX_LIVES - 1):
        stand.process().own.send(Failed("crash", "RuntimeError: once more"))
    error = stand.end()
    assert isinstance(error, Regroup)
    assert str(error) == "rank 0: RuntimeError: once more"
    assert stand.kinds.count("crash") == 2 * MAX_LIVES - 1


def test_what_would_only_repeat_is_raised_as_it_is(stand: Stand) -> None:
    stand.process().own.send(Failed("StageBlocked", "lower optimizer.lr"))
    error = stand.end()
    assert isinstance(error, StageBlocked)
    assert str(error) == "lower optimizer.lr"
    assert stand.kinds == ["spawn"]


def test_a_request_to_stop_reaches_the_process_and_its_answer_the_controller(stand: Stand) -> None:
    process = stand.process()
    ray_worker.request_save()
    assert process.hears() == SAVE
    ray_worker.request_stop()
    assert process.hears() == STOP
    assert not ray_worker.has_stopped()
    process.own.send(Ended("stopped"))
    assert ray_worker._stopped.wait(DEADLINE_S)
    stand.supervisor._rally.close()  # as Ray Train ends the worker


def test_a_stop_is_asked_again_of_the_process_that_takes_a_lost_one_s_place(stand: Stand) -> None:
    process = stand.process()
    ray_worker.request_stop()
    assert process.hears() == STOP
    process.die(1)
    again = stand.process()
    assert again.hears() == STOP
    assert not ray_worker.has_stopped()
    again.own.send(Ended("stopped"))
    assert ray_worker._stopped.wait(DEADLINE_S)
    stand.supervisor._rally.close()


def test_a_silent_process_is_a_hang_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, hang_after=0.3)
    process = stand.process()
    for position in (0, 8, 16):
        process.own.send(Beat("train", position))
    stand.process().own.send(Ended("finished"))
    assert stand.end() is None
    assert stand.kinds == ["spawn", "hang", "spawn"]
    assert "in 'train' at 16 samples" in stand.events[1][1]


def test_a_host_that_does_not_answer_costs_a_life_not_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand = Stand(monkeypatch)
    working = stand._fork

    def refusing(*arguments: Any) -> Any:
        monkeypatch.setattr(ray_worker, "fork", working)
        raise ConnectionRefusedError("nobody")

    monkeypatch.setattr(ray_worker, "fork", refusing)
    stand.process().die(1)
    stand.process().own.send(Ended("finished"))
    assert stand.end() is None
    assert stand.kinds.count("spawn") == 3
    assert any("fork host does not answer" in reason for _, reason in stand.events)
