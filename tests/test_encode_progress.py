"""What is shown of an encoding: clips, rate, time left, what is left out."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.encode_progress import ENCODING, WINDOW_S, Encoded, EncodeMeter, encoding_lines
from elastic.journal import Event
from elastic.progress import describe
from elastic.ray_tracker import TrackerService


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def event(kind: str, **more: object) -> Event:
    fields = {"wall": 1.0, "stage": "dit", "position": None, "attempt": None, "world": None}
    return {**fields, "kind": kind, "reason": "", **more}  # type: ignore[typeddict-item]


def test_what_was_there_before_is_done_and_does_not_make_the_rate_larger() -> None:
    clock = Clock()
    meter = EncodeMeter(1000, 600, 2, clock)
    assert meter.now() == Encoded(1000, 600, 2, None)
    assert meter.now().seconds_left is None
    clock.now += 10
    meter.committed(("32px", 0), 64, 1)
    assert meter.now() == Encoded(1000, 664, 3, 6.4)
    assert meter.now().seconds_left == pytest.approx(336 / 6.4)
    assert (
        meter.now().text() == "664 of 1,000 clips (66%)  6.4 clips/s  0:00:52 left  3 quarantined"
    )


def test_a_shard_that_is_told_twice_counts_once() -> None:
    clock = Clock()
    meter = EncodeMeter(100, 0, 0, clock)
    clock.now += 1
    for _ in range(2):  # a task that was lost after its commit is done again by another
        meter.committed(("32px", 3), 50, 1)
    assert meter.now() == Encoded(100, 50, 1, 50.0)


def test_the_rate_follows_workers_that_come_and_go() -> None:
    clock = Clock()
    meter = EncodeMeter(10**6, 0, 0, clock)
    for second in range(400):  # four workers
        clock.now += 1
        meter.committed(("a", second), 40, 0)
    assert meter.now().rate == pytest.approx(40.0)
    for second in range(int(WINDOW_S)):  # one is left
        clock.now += 1
        meter.committed(("b", second), 10, 0)
    assert meter.now().rate == pytest.approx(10.0)
    clock.now += WINDOW_S
    assert meter.now().rate == 0.0, "none is left"
    assert meter.now().seconds_left is None


@given(steps=st.lists(st.tuples(st.floats(0.1, 400.0), st.integers(1, 64)), max_size=40))
def test_the_rate_is_clips_over_the_window_or_since_the_beginning(
    steps: list[tuple[float, int]],
) -> None:
    clock = Clock()
    meter = EncodeMeter(10**6, 0, 0, clock)
    marks = [(clock.now, 0)]
    for number, (seconds, clips) in enumerate(steps):
        clock.now += seconds
        meter.committed(("a", number), clips, 0)
        marks.append((clock.now, marks[-1][1] + clips))
    since, before = max(
        (mark for mark in marks if mark[0] <= clock.now - WINDOW_S), default=marks[0]
    )
    expected = (marks[-1][1] - before) / (clock.now - since) if steps else None
    assert meter.now().rate == (None if expected is None else pytest.approx(expected))


def test_the_tracker_shows_the_encoding_and_goes_back_to_training(tmp_path: Path) -> None:
    tracker = TrackerService(str(tmp_path), "plan", {"dit": 100, "later": 100}, use_aim=False)
    tracker.encode_begin("dit", 10, 4, 0, False)
    tracker.encoded("dit", ("32px", 0), 2, 1)
    line = describe(tracker.latest(), {"dit": 100})
    assert line.startswith("dit  encoding, 6 of 10 clips (60%)  ")
    assert line.endswith("left  1 quarantined")
    noted = encoding_lines(tmp_path, ["dit"], [])
    assert len(noted) == 1
    assert noted[0].startswith("encoding dit: 6 of 10 clips (60%)")
    tracker.event(event("encode_end"))
    assert not (tmp_path / "stages" / "dit" / ENCODING).exists()
    assert describe(tracker.latest(), {"dit": 100}) == ""
    tracker.event(event("start", position=0, world=2))
    tracker.encode_begin("later", 10, 0, 0, True)
    tracker.encoded("later", ("32px", 0), 5, 0)
    assert describe(tracker.latest(), {"dit": 100}).startswith(
        "dit  0 of 100 samples (0%)  world 2  ahead: later, 5 of 10 clips"
    )
    tracker.close()


def test_the_lines_of_a_run_add_up_what_each_driver_encoded(tmp_path: Path) -> None:
    ends = [
        event("quarantine", count=3),
        event("encode_end", clips=9, quarantined=2, encoded=7, seconds=30.0),
        event("encode_end", clips=9, quarantined=2, encoded=0, seconds=1.0),
    ]
    assert encoding_lines(tmp_path, ["dit", "other"], ends) == [
        "latents of dit: 9 clips; quarantined: 3 when probed, 2 when encoded; 7 encoded in 31 s"
    ]
    (tmp_path / "stages" / "other").mkdir(parents=True)
    found = {**Encoded(8, 4, 0, 2.0)._asdict(), "wall": 0.0}
    (tmp_path / "stages" / "other" / ENCODING).write_text(json.dumps(found))
    lines = encoding_lines(tmp_path, ["dit", "other"], ends)
    assert lines[1].startswith("encoding other: 4 of 8 clips (50%)  2.0 clips/s  0:00:02 left (at ")
