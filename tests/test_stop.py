"""Whoever sees a run folder can have its driver end, and is told how it ended."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic import stop
from elastic.errors import InputError, RunStopped
from elastic.journal import EVENTS, Journal
from elastic.stop import StopWatch, ask, asked, driven, has_driver, is_to_save, stop_run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(stop, "_ANSWER_S", 0.3)


def writer(root: Path) -> Callable[..., None]:
    journal = Journal(root / EVENTS)

    def event(
        kind: str, stage: str | None = None, position: int | None = None, **more: Any
    ) -> None:
        fields = {"wall": 0.0, "attempt": None, "world": None, "reason": "", **more}
        journal.append(kind=kind, stage=stage, position=position, **fields)

    return event


class Driver(threading.Thread):
    """What a driver does about a stop, with a group that saves when it is asked to."""

    def __init__(self, root: Path, is_training: bool) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._is_training = is_training
        self.is_up = threading.Event()
        self.reason = ""

    def run(self) -> None:
        event = writer(self._root)
        with driven(self._root):
            watch, is_saved = StopWatch(self._root, event), False
            self.is_up.set()
            try:
                while True:
                    watch.look("dit", self._is_training, is_saved)
                    if is_to_save(self._root) and self._is_training:
                        event("publish", "dit", 1200, reason="stop")
                        is_saved = True
            except RunStopped as error:
                self.reason = str(error)
                event("run_end", reason=self.reason)


def start(root: Path, is_training: bool) -> Driver:
    driver = Driver(root, is_training)
    driver.start()
    assert driver.is_up.wait(10)
    return driver


@pytest.mark.parametrize("saves", [True, False])
def test_a_stop_waits_for_the_save_that_it_asks_for_and_no_other(
    tmp_path: Path, saves: bool
) -> None:
    driver, said = start(tmp_path, is_training=True), list[str]()
    assert stop_run(tmp_path, saves, said.append)
    driver.join(10)
    words = "after a save" if saves else "without a save"
    assert driver.reason.startswith("stopped, as asked by ")
    assert driver.reason.endswith(words)
    assert ("dit is published at 1,200 samples" in said[-1]) == saves
    assert has_driver(tmp_path) is False, "the same command can go on now"


def test_where_nothing_trains_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    start(tmp_path, is_training=False)
    assert stop_run(tmp_path, True, lambda text: None)


def test_the_last_lines_of_a_driver_that_ends_while_it_is_looked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, looks = writer(tmp_path), list[int]()

    def ends_at_the_second_look(root: Path) -> bool:
        looks.append(len(looks))
        request = asked(root)
        if request is not None and len(looks) == 2:
            event("stop_requested", "dit", what=request.id)
            event("run_end", reason="as asked")
        return len(looks) < 2

    monkeypatch.setattr(stop, "has_driver", ends_at_the_second_look)
    said: list[str] = []
    assert stop_run(tmp_path, True, said.append)
    assert said[-1] == "the driver has ended: as asked"


def test_a_run_without_a_driver_is_said_to_have_none(tmp_path: Path) -> None:
    said: list[str] = []
    with driven(tmp_path):
        assert has_driver(tmp_path) is True
    assert not stop_run(tmp_path, True, said.append)
    assert said == [f"no driver has run {str(tmp_path)!r}: there is nothing to stop"]
    assert asked(tmp_path) is None


def test_a_killed_driver_is_known_to_be_gone(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from elastic.stop import driven\n"
        "with driven(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert (tmp_path / ".driver.lock").read_text() != ""
    assert has_driver(tmp_path) is False


def test_a_driver_of_another_machine_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".driver.lock").write_text("another boot of another machine\n")
    assert has_driver(tmp_path) is None
    said: list[str] = []
    assert not stop_run(tmp_path, True, said.append)
    assert "here or elsewhere" in said[-1]
    assert asked(tmp_path) is None, "a driver that starts later is not stopped by it"


def test_a_driver_of_another_machine_is_stopped_through_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount whose locks are each machine's own."""
    monkeypatch.setattr(stop, "_locked", lambda file, how, num_before: True)
    monkeypatch.setattr(stop, "_ANSWER_S", 10.0)
    driver = start(tmp_path, is_training=True)
    monkeypatch.setattr(stop, "_machine", lambda: "this one")
    assert has_driver(tmp_path) is None
    assert stop_run(tmp_path, True, lambda text: None)
    driver.join(10)
    assert driver.reason


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_driver_whose_machine_is_lost_after_its_answer_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_ended: bool
) -> None:
    (tmp_path / ".driver.lock").write_text("another boot of another machine\n")
    for name in ("_ANSWER_S", "_END_S", "_SAVE_S", "_LOOK_EVERY_S"):
        monkeypatch.setattr(stop, name, 0.05)
    tell, asks = writer(tmp_path), stop.ask

    def answered(root: Path, saves: bool) -> stop.StopRequest:
        request = asks(root, saves)
        tell("stop_requested", None, reason=request.text(), what=request.id)
        if has_ended:
            tell("run_end", reason="stopped")
        return request

    monkeypatch.setattr(stop, "ask", answered)
    said: list[str] = []
    assert stop_run(tmp_path, True, said.append) is has_ended
    assert "cannot be seen from here" in said[-1]


def test_what_was_asked_of_a_driver_that_is_gone_stops_no_other(tmp_path: Path) -> None:
    ask(tmp_path, saves=False)
    with driven(tmp_path):
        StopWatch(tmp_path, writer(tmp_path)).look(None, True, False)
        assert asked(tmp_path) is None


def test_what_is_asked_of_a_driver_that_only_starts_is_kept_for_it(tmp_path: Path) -> None:
    with driven(tmp_path):
        ask(tmp_path, saves=False)
        watch = StopWatch(tmp_path, writer(tmp_path))  # when its cluster is up
        with pytest.raises(RunStopped):
            watch.look(None, False, False)


def test_a_stop_without_a_save_does_not_wait_for_the_one_before_it(tmp_path: Path) -> None:
    watch = StopWatch(tmp_path, writer(tmp_path))
    ask(tmp_path, saves=True)
    watch.look("dit", True, False)
    ask(tmp_path, saves=False)
    with pytest.raises(RunStopped, match="without a save"):
        watch.look("dit", True, False)


def test_workers_that_do_not_save_are_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "_SAVE_S", -1.0)
    watch = StopWatch(tmp_path, writer(tmp_path))
    ask(tmp_path, saves=True)
    with pytest.raises(RunStopped, match="did not save within"):
        watch.look("dit", True, False)


def test_one_driver_at_a_time_has_a_run(tmp_path: Path) -> None:
    with driven(tmp_path), pytest.raises(InputError, match="another driver"), driven(tmp_path):
        pass
