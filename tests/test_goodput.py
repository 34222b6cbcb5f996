"""Every second of a run lies in one activity, whatever the journals look like."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.clock import boot_clock, lives
from elastic.goodput import DEFINITION, Account, account, account_lines
from elastic.journal import EVENTS, METRICS, Journal, read_events, read_metrics
from elastic.timeline import ACTIVITIES, thinned

T0 = 1_800_000_000.0
KINDS = (
    "run_start", "run_end", "stage_start", "stage_end", "init", "start", "publish", "crash",
    "resize_requested", "damaged_checkpoint", "encode_start", "encode_end", "sample", "quarantine",
    "blocked", "waiting", "launch", "spawn", "save_failed", "hang", "drain", "preview",
    "preview_failed", "sample_failed", "of another version",
)  # fmt: skip

seconds = st.one_of(
    st.none(), st.floats(-10, 1e4), st.sampled_from([0, 1e300, -1e300, math.inf, "3", True])
)
walls = st.one_of(
    st.floats(T0, T0 + 1e4),
    st.floats(T0, T0 + 100),
    st.sampled_from([T0 - 1e6, T0 + 1e8, 0.0, None, math.nan, 1e300]),
)
common = {
    "wall": walls,
    "stage": st.sampled_from(["a", "b", None]),
    "attempt": st.sampled_from([None, 1, 2, 3]),
    "position": st.one_of(st.none(), st.integers(0, 200)),
    "world": st.sampled_from([None, 1, 2]),
}
events_lists = st.lists(
    st.fixed_dictionaries(
        {**common, "kind": st.sampled_from(KINDS)},
        optional={
            "reason": st.sampled_from(["", "stop", "due", "finished"]),
            "seconds": seconds,
            "background": seconds,
            "clock": seconds,
            "phases": st.one_of(st.none(), st.dictionaries(st.just("restore"), seconds)),
        },
    ),
    max_size=30,
)
metrics_lists = st.lists(
    st.fixed_dictionaries(
        {
            "wall": walls,
            "stage": st.sampled_from(["a", "b"]),
            "attempt": st.integers(1, 3),
            "position": st.integers(0, 200),
            "world": st.integers(1, 4),
            "context": st.sampled_from([{}, {"subset": "held_out"}]),
            "values": st.fixed_dictionaries(
                {},
                optional={
                    "samples_per_s": st.sampled_from([None, 0.0, 1e-9, 3.0]),
                    "data_wait": st.sampled_from([None, 0.0, 0.1, 7.0]),
                },
            ),
        },
        optional={"seconds": seconds, "clock": seconds},
    ),
    max_size=30,
)


def is_a_partition(one: Account) -> bool:
    """No gap, no overlap, nothing negative, and sums equal to the whole to the microsecond."""
    spans = one.spans
    assert all(span.end_us > span.begin_us for span in spans)
    assert all(a.end_us == b.begin_us for a, b in itertools.pairwise(spans))
    assert all(span.activity in ACTIVITIES for span in spans)
    total = sum(us for stage in one.by_stage_us.values() for us in stage.values())
    assert total == (spans[-1].end_us - spans[0].begin_us if spans else 0)
    assert all(us >= 0 for stage in one.by_stage_us.values() for us in stage.values())
    return True


@settings(max_examples=150, deadline=None)
@given(events_lists, metrics_lists)
def test_whatever_the_lines_are_every_microsecond_lies_in_one_activity(
    events: Any, metrics: Any
) -> None:
    one = account(events, metrics)
    assert is_a_partition(one)
    goodput = one.goodput()
    assert goodput is None or 0 <= goodput <= 1
    assert all("nan" not in line for line in account_lines(one))


class Log:
    """Journals with a clock of their own, which may be set wrong while time goes on."""

    def __init__(self, has_clock: bool = False) -> None:
        self.events: list[Any] = []
        self.metrics: list[Any] = []
        self.now = T0
        self.wrong_by = 0.0
        self.attempt = 0
        self.has_clock = has_clock

    def _line(self, after: float) -> dict[str, Any]:
        self.now += after
        clock = {"clock": self.now - T0 + 1000.0} if self.has_clock else {}
        return {"wall": self.now + self.wrong_by, "attempt": self.attempt, "world": 2, **clock}

    def event(
        self, kind: str, after: float = 0.0, position: int | None = None, **more: Any
    ) -> None:
        if kind == "start":
            self.attempt += 1
        line = self._line(after) | {"kind": kind, "stage": "a", "position": position, "reason": ""}
        self.events.append(line | more)

    def train(self, begin: int, end: int, each: float = 1.0) -> None:
        """A line every 10 samples, a sample taking `each` seconds."""
        for position in range(begin + 10, end + 1, 10):
            values = {"loss": 1.0, "samples_per_s": 1 / each, "data_wait": 0.0}
            line = self._line(10 * each) | {"stage": "a", "position": position, "context": {}}
            self.metrics.append(line | {"values": values})

    def account(self) -> Account:
        one = account(self.events, self.metrics)
        assert is_a_partition(one)
        return one

    def spent(self) -> dict[str, float]:
        """Seconds of the activities that took any."""
        one = self.account()
        return {name: round(one.seconds(name), 6) for name in ACTIVITIES if one.seconds(name) > 0}


def disturbed(has_clock: bool = False) -> Iterator[Log]:
    """A run with a save, a crash and a second driver; it stops after each part."""
    log = Log(has_clock)
    log.event("run_start")
    log.event("stage_start", 1)
    log.event("waiting", 2)
    log.event("launch", 50)
    log.event("spawn", 3)
    log.event("start", 6, 0, phases={"import": 2.0, "restore": 4.0})
    log.train(0, 100)
    yield log
    log.event("publish", 12, 100, seconds=2.0, background=10.0, reason="due")
    log.train(110, 140)
    yield log
    log.event("crash", 5)
    log.event("spawn", 1)
    log.event("start", 4, 100)
    log.train(100, 200)
    yield log
    log.event("run_start", 1000)
    log.event("start", 9, 100)
    log.train(100, 300)
    log.event("publish", 1, 300, seconds=1.0, reason="finished")
    log.event("stage_end", 2)
    log.event("sample", 7)
    log.event("run_end", 3)
    yield log


def test_each_part_of_a_disturbed_run_is_found() -> None:
    *_, log = disturbed()
    assert log.spent() == {
        # 100 before the first save; 200 of the second driver. What lies between was lost.
        "training": 100 + 200,
        # Ten beside the save, 30 more, 5 until the crash was noticed; all of the second attempt.
        "lost work": 10 + 30 + 5 + 100,
        "saving": 2 + 1 + 2,
        "restoring": 4,
        "starting": 1 + 2 + 3 + 2 + 1 + 4 + 9,
        "waiting for machines": 50,
        "sampling": 7,
        "other": 3,
        "down": 1000,
    }
    assert log.account().goodput() == 300 / (log.now - T0 - 1000)


@pytest.mark.parametrize("kind", ["preview", "preview_failed"])
def test_samples_made_while_a_stage_trains_count_as_sampling_and_training_goes_on(
    kind: str,
) -> None:
    log = Log()
    log.event("run_start")
    log.event("start", 6, 0)
    log.train(0, 100)
    log.event(kind, 8, 100, seconds=8.0)
    log.train(100, 200)
    log.event("publish", 1, 200, seconds=1.0, reason="due")
    assert log.spent() == {"starting": 6, "training": 200, "sampling": 8, "saving": 1}


def test_a_run_that_goes_on_has_lost_nothing_yet_and_a_crashed_one_has() -> None:
    parts = disturbed()
    assert "lost work" not in next(parts).spent()
    assert "lost work" not in next(parts).spent()
    log = next(parts)
    log.event("crash", 1)
    assert log.spent()["lost work"] == 45 + 101, "it would go on from the save at 100"


def test_what_an_interrupted_driver_has_not_published_is_lost() -> None:
    log = Log()
    log.event("run_start")
    log.event("start", 5, 0)
    log.train(0, 50)
    log.event("publish", 1, 50, seconds=1.0, reason="due")
    log.train(50, 80)
    log.event("run_end", 2)
    assert log.spent() == {"starting": 5, "training": 50, "saving": 1, "lost work": 32}


def test_work_is_lost_once_by_two_crashes_in_a_row() -> None:
    log = Log()
    log.event("run_start")
    for begin, end in ((0, 100), (60, 80), (60, 120)):
        log.event("start", 5, begin)
        log.train(begin, end)
        log.event("crash", 0)
    log.event("start", 5, 60)
    log.train(60, 100)
    spent = log.spent()
    assert spent["training"] == 60 + 40
    assert spent["lost work"] == 40 + 20 + 60


def test_a_resize_that_was_asked_for_loses_nothing() -> None:
    log = Log()
    log.event("run_start")
    log.event("start", 5, 0)
    log.train(0, 50)
    log.event("drain", 0)
    log.event("resize_requested", 1)
    log.event("publish", 3, 50, seconds=3.0, reason="stop")
    log.event("launch", 1)
    log.event("start", 5, 50)
    log.train(50, 60)
    assert log.spent() == {"training": 50 + 1 + 10, "saving": 3, "starting": 5 + 6}


@pytest.mark.parametrize("after", [0.0, 2.0])
def test_a_group_that_stops_where_it_has_saved_already_is_starting_anew(after: float) -> None:
    """No save is told then; what it trained between the request and the stop is training."""
    log = Log()
    log.event("run_start")
    log.event("start", 5, 0)
    log.train(0, 50)
    log.event("publish", 2, 50, seconds=2.0, reason="due")
    if after:
        log.event("resize_requested", 0)
        log.train(50, 60)
        log.event("publish", 1, 60, seconds=1.0, reason="due")  # due and then asked to stop
        log.event("launch", after)
        log.event("start", 5, 60)
        assert log.spent() == {"training": 60, "saving": 3, "starting": 5 + after + 5}
        return
    log.event("resize_requested", 0)
    log.event("launch", 7)
    log.event("start", 5, 50)
    log.train(50, 60)
    assert log.spent() == {"training": 60, "saving": 2, "starting": 5 + 7 + 5}


def test_what_a_group_trains_after_it_was_asked_to_stop_is_training() -> None:
    log = Log()
    log.event("run_start")
    log.event("start", 5, 0)
    log.train(0, 50)
    log.event("resize_requested", 0)
    log.train(50, 70)
    assert log.spent() == {"starting": 5, "training": 70}, "it goes on until it stops"
    log.event("waiting", 3)
    log.event("launch", 4)
    log.event("start", 5, 70)
    assert log.spent() == {
        "starting": 5 + 3 + 5, "training": 70, "waiting for machines": 4,
    }  # fmt: skip
    crashed = Log()
    crashed.event("run_start")
    crashed.event("start", 5, 0)
    crashed.train(0, 50)
    crashed.event("resize_requested", 0)
    crashed.event("crash", 6)
    crashed.event("launch", 1)
    crashed.event("start", 2, 0)
    assert crashed.spent() == {"starting": 5 + 3, "lost work": 56}


def test_saves_that_fail_take_their_time_too() -> None:
    log = Log()
    log.event("run_start")
    log.event("start", 5, 0)
    log.train(0, 50)
    log.event("save_failed", 9, 40, seconds=2.0, background=7.0)  # 7 of training beside it
    log.event("resize_requested", 0)
    for waited in (10, 20, 30):  # a last save that is tried again and again
        log.event("save_failed", 10, 50, seconds=float(waited))
    log.event("publish", 5, 50, seconds=35.0, reason="stop")
    log.event("start", 5, 50)
    assert log.spent() == {"starting": 10, "training": 57, "saving": 37}


def test_measuring_and_waiting_for_data_are_no_training() -> None:
    log = Log()
    log.event("run_start")
    log.event("start", 5, 0)
    log.train(0, 20)
    line = {**log.metrics[-1], "context": {"subset": "held_out"}, "values": {}, "seconds": 4.0}
    log.now += 4
    log.metrics.append(line | {"wall": log.now})
    log.train(20, 40)
    for metric in log.metrics:
        if not metric["context"]:
            metric["values"]["data_wait"] = 0.25
    assert log.spent() == {
        "training": 30, "waiting for data": 10, "evaluating": 4, "starting": 5,
    }  # fmt: skip


@pytest.mark.parametrize("jump", [-7200.0, 7200.0, -1e9])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_clock_that_is_set_moves_no_second(jump: float, when: int) -> None:
    *_, straight = disturbed()
    parts = disturbed(has_clock=True)
    for number, log in enumerate(parts):
        if number == when:
            log.wrong_by = jump
    expected, spent = straight.spent(), log.spent()
    # How long no driver lived is known from the wall alone.
    down = (expected.pop("down"), spent.pop("down", 0.0))
    assert spent == expected
    if when < 2:
        assert down[1] == max(0.0, down[0] + jump)


def test_without_a_boot_clock_one_that_is_set_back_hides_time_and_makes_none_up() -> None:
    log = Log()
    log.event("run_start")
    log.event("start", 5, 0)
    log.train(0, 100)
    log.wrong_by = -3600
    log.train(100, 200)
    log.event("crash", 1)
    log.event("start", 5, 200)
    assert 100 < sum(log.spent().values()) <= log.now - T0


def test_lines_that_arrive_late_are_put_where_they_belong() -> None:
    *_, log = disturbed()
    expected = log.spent()
    crash = next(n for n, event in enumerate(log.events) if event["kind"] == "crash")
    log.events[crash], log.events[crash + 1] = log.events[crash + 1], log.events[crash]
    log.events.append({**log.events[crash + 1], "wall": log.events[-1]["wall"] - 10})
    assert log.spent() == expected, "an old attempt's crash, told again, is no crash of the new one"


def test_a_start_whose_line_was_torn_is_known_from_its_metrics() -> None:
    log = Log()
    log.event("run_start")
    log.event("start", 5, 0)
    log.train(0, 50)
    log.events.pop()
    assert log.spent() == {"starting": 15, "training": 40}


def test_the_journals_of_a_run_give_the_same_account(tmp_path: Path) -> None:
    *_, log = disturbed()
    for name, lines in ((EVENTS, log.events), (METRICS, log.metrics)):
        journal = Journal(tmp_path / name)
        for line in lines:
            journal.append(**line)
        journal.close()
        with (tmp_path / name).open("a") as file:
            file.write('{"wall": 18000000')  # torn by a kill
    assert account(read_events(tmp_path), read_metrics(tmp_path)) == log.account()


def test_a_picture_of_a_long_run_keeps_its_length_and_shows_what_took_most() -> None:
    *_, log = disturbed()
    spans = log.account().spans
    for most in (1, 3, 50, 1000):
        few = thinned(spans, most)
        assert len(few) <= most
        assert all(a.end_us == b.begin_us for a, b in itertools.pairwise(few))
        assert (few[0].begin_us, few[-1].end_us) == (spans[0].begin_us, spans[-1].end_us)
    names = [span.activity for span in thinned(spans, 8)]
    assert names == ["training", "lost work", "down", "training"]


def test_status_says_what_goodput_is() -> None:
    *_, log = disturbed()
    lines = account_lines(log.account())
    assert lines[0] == "goodput: 56.0 % of the run; a 57.0 %"
    assert "training 5 min 00 s (19.5 %)" in lines[1]
    assert lines[2].replace("\n", " ") == DEFINITION
    assert account_lines(account([], [])) == []


def test_the_boot_clock_goes_on() -> None:
    assert 0 < boot_clock() <= boot_clock()
    assert lives([], []) == []
