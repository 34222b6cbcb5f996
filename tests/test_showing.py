"""Films of a stage's end: what goes wrong with them is told, and the course goes on."""

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import NodeDiedError

from elastic import course as course_module
from elastic.cli import main
from elastic.course import Course, train_plan
from elastic.errors import StageBlocked
from elastic.files import write_atomic
from elastic.folders import RunFolder
from elastic.journal import EVENTS, Journal, read_events
from elastic.ray_train import Limits
from elastic.record import write_record
from elastic.report import write_report
from elastic.showing import MOST_TRIES, Made, Showing, tries_of, why_missing
from elastic.tries import Tries
from elastic.weights import FINISHED
from stages.plan import load_plan
from stages.stage import Stage

PLAN = load_plan(Path(__file__).with_name("tiny_plan.py"))
FIRST, SECOND, *_ = [stage.name for stage in PLAN.stages]


class Written:
    """A tracker that writes events, and nothing else."""

    def __init__(self, folder: RunFolder) -> None:
        self._journal = Journal(folder.root / EVENTS)

    def event(
        self, kind: str, stage: str | None = None, position: int | None = None,
        reason: str = "", **more: Any,
    ) -> None:  # fmt: skip
        told = {"kind": kind, "stage": stage, "position": position, "reason": reason}
        self._journal.append(wall=time.time(), attempt=None, world=None, **told, **more)


Films = Callable[[str], Made]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Films], list[str]]:
    """One start of the command, with what makes films; the stages that it trained."""
    folder = RunFolder(tmp_path / "run")
    write_record(folder, PLAN)

    def go(films: Films) -> list[str]:
        trained: list[str] = []

        def train(course: Course, stage: Stage) -> None:
            trained.append(stage.name)
            write_atomic(folder.stage(stage.name) / FINISHED, b"{}")
            course.tracker.event("stage_end", stage.name, stage.budget)

        monkeypatch.setattr(course_module, "train_one", train)
        monkeypatch.setattr(course_module, "make_films", lambda _, stage: films(stage.name))
        tracker: Any = Written(folder)
        train_plan(Course(PLAN, folder, tracker, use_gpu=False, limits=Limits(0, 0, 0)))
        return trained

    return go


def _folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def _told(tmp_path: Path, stage: str) -> list[tuple[str, str]]:
    events = read_events(_folder(tmp_path).root)
    mine = [event for event in events if event["stage"] == stage and event["kind"] != "stage_end"]
    return [(event["kind"], event["reason"]) for event in mine]


def _made(tmp_path: Path, stage: str) -> Made:
    folder = _folder(tmp_path).samples(stage)
    write_atomic(folder / "contact-sheet.png", b"a sheet")
    return Made([folder / "00.mp4"], ["a circle"])


def test_a_sampler_that_raises_does_not_stop_the_next_stage(
    start: Callable[[Films], list[str]], tmp_path: Path
) -> None:
    asked: list[str] = []

    def films(stage: str) -> Made:
        asked.append(stage)
        if stage == FIRST:
            raise StageBlocked("the latents are not finite")
        if stage == SECOND:
            raise RuntimeError("a traceback\ntorch.OutOfMemoryError: the card is full")
        return _made(tmp_path, stage)

    every = [stage.name for stage in PLAN.stages]
    assert start(films) == every
    assert asked == every
    assert _told(tmp_path, FIRST) == [("sample_failed", "the latents are not finite")]
    full = "RuntimeError: torch.OutOfMemoryError: the card is full"
    assert _told(tmp_path, SECOND) == [("sample_failed", full)]
    for stage in every[2:]:
        assert _told(tmp_path, stage) == [("sample", "averaged weights")]


def test_what_has_failed_is_tried_by_a_later_start_and_then_left(
    start: Callable[[Films], list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def films(stage: str) -> Made:
        asked.append(stage)
        if stage == FIRST:
            raise StageBlocked(f"no, {asked.count(FIRST)}")
        return _made(tmp_path, stage)

    for number in range(MOST_TRIES + 2):
        caplog.clear()
        start(films)
        assert f"no films of {FIRST}: no, {min(number + 1, MOST_TRIES)}; " in caplog.text
    assert asked.count(FIRST) == MOST_TRIES == 2
    assert asked.count(SECOND) == 1
    assert _told(tmp_path, FIRST) == [("sample_failed", "no, 1"), ("sample_failed", "no, 2")]
    tries_of(_folder(tmp_path), FIRST).path.unlink()
    start(lambda stage: _made(tmp_path, stage))
    assert _told(tmp_path, FIRST)[-1] == ("sample", "averaged weights")
    assert tries_of(_folder(tmp_path), FIRST).count() == 0
    assert why_missing(read_events(_folder(tmp_path).root), FIRST) is None


def test_a_try_that_took_the_driver_with_it_counts(
    start: Callable[[Films], list[str]], tmp_path: Path
) -> None:
    asked: list[str] = []

    def films(stage: str) -> Made:
        asked.append(stage)
        if stage == FIRST:
            raise SystemExit  # stands for a driver that is killed: nobody is told
        return _made(tmp_path, stage)

    for _ in range(MOST_TRIES):
        with pytest.raises(SystemExit):
            start(films)
    every = [stage.name for stage in PLAN.stages]
    assert start(films) == every[1:]
    assert start(films) == []
    assert asked == [FIRST] * MOST_TRIES + every[1:]
    assert _told(tmp_path, FIRST) == [("sample_failed", "2 starts ended while they were made")]


def test_a_driver_that_is_asked_to_end_has_spent_no_try(tmp_path: Path) -> None:
    tries = Tries(tmp_path / "samples" / ".tries")
    tries.note(1)
    showing, begun, go_on = Showing(), threading.Event(), threading.Event()

    def films() -> Made:
        begun.set()
        assert go_on.wait(60)
        raise ConnectionError("the cluster is gone")

    came: list[object] = []

    def body() -> None:
        try:
            came.append(showing.make(tries, films))
        except ConnectionError as error:
            came.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    assert begun.wait(60)
    assert tries.count() == 2
    showing.leave()
    assert tries.count() == 1
    go_on.set()
    thread.join(60)
    assert isinstance(came[0], ConnectionError), "it was not told as a failure"
    assert tries.count() == 1


def test_status_and_report_say_what_is_missing_and_whether_it_is_tried_again(
    start: Callable[[Films], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def films(stage: str) -> Made:
        raise StageBlocked("the card is <full>")

    root = _folder(tmp_path).root
    for advice in ("the next start tries once more", "not tried again"):
        start(films)
        assert main(["status", str(root)]) == 0
        said = capsys.readouterr().out
        assert f"no films of {SECOND}: the card is <full>; " in said
        assert said.count(advice) == len(PLAN.stages)
    assert main(["status", str(root), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {one["samples_failed"] for one in shown["stages"]} == {"the card is <full>"}
    page = write_report(root).read_text()
    assert page.count("no films of its end: the card is &lt;full&gt;") == len(PLAN.stages)


class Machines:
    """In the place of Ray: a task runs at once, and on machines of which the first are lost."""

    def __init__(self, lost: int) -> None:
        self.begun, self._lost = 0, lost

    def remote(self, work: Callable[..., str]) -> Any:
        def run(*given: str) -> str:
            self.begun += 1
            if self.begun <= self._lost:
                raise NodeDiedError("gone")
            return work(*given)

        task = SimpleNamespace(remote=lambda *given: partial(run, *given))
        return SimpleNamespace(options=lambda **how: task)


def test_a_machine_that_is_lost_while_films_are_made_is_replaced_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(course_module, "result_of", lambda task: task())
    course: Any = SimpleNamespace(gpus=1.0)
    for lost in (0, 2):
        machines = Machines(lost)
        monkeypatch.setattr(course_module, "ray", machines)
        assert course_module._on_worker(course, str.upper, "films") == "FILMS"
        assert machines.begun == lost + 1
    machines = Machines(lost=99)
    monkeypatch.setattr(course_module, "ray", machines)
    with pytest.raises(NodeDiedError):
        course_module._on_worker(course, str.upper, "films")
    assert machines.begun == 3


def test_what_cannot_be_read_of_tries_counts_as_none(tmp_path: Path) -> None:
    tries = Tries(tmp_path / "tries")
    assert tries.count() == 0
    for text in ("", "two"):
        tries.path.write_text(text)
        assert tries.count() == 0
    tries.note(2)
    assert tries.count() == 2
    tries.note(0)
    tries.note(0)
    assert not tries.path.exists()
