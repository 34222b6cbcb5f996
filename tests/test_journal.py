import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic.journal import (
    Journal,
    Metric,
    latest_values,
    read_journal,
    scan_journal,
)


def line(stage: str, position: int, attempt: int, loss: float, bucket: str = "b") -> Metric:
    return {
        "wall": 0.0,
        "stage": stage,
        "attempt": attempt,
        "position": position,
        "world": 1,
        "context": {"bucket": bucket},
        "values": {"loss": loss},
    }


def test_what_was_appended_is_read_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "a.jsonl", durable=True)
    for i in range(5):
        journal.append(kind="save", position=i, reason="caption \u00e9 \n \u2028 x")
    journal.close()
    journal.close()
    lines = read_journal(tmp_path / "deep" / "a.jsonl")
    assert [one["position"] for one in lines] == list(range(5))
    assert {one["reason"] for one in lines} == {"caption \u00e9 \n \u2028 x"}


def test_a_torn_last_line_costs_that_line_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"position": 1}\n{"posit')
    journal = Journal(path)
    journal.append(position=2)
    journal.append(position=3)
    journal.close()
    lines, num_torn = scan_journal(path)
    assert [one["position"] for one in lines] == [1, 2, 3]
    assert num_torn == 1
    with caplog.at_level("WARNING"):
        assert read_journal(path) == lines
    assert "skipped 1 torn lines, kept 3" in caplog.text


def test_bytes_that_are_no_text_and_lines_that_are_no_object_count_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xff\xfe{\n[1]\n{"position": 1}\n\n')
    assert scan_journal(path) == ([{"position": 1}], 2)


def test_a_missing_journal_has_no_lines(tmp_path: Path) -> None:
    assert scan_journal(tmp_path / "none.jsonl") == ([], 0)


def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.append(values={"loss": float("nan"), "lr": 0.5, "list": [float("inf"), (1.0,)]})
    journal.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "a.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "values": {"loss": None, "lr": 0.5, "list": [None, [1.0]]}
    }


def test_two_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first, second = Journal(path), Journal(path)
    for i in range(50):
        (first if i % 2 else second).append(i=i, text="x" * 3000)
    assert [one["i"] for one in read_journal(path)] == list(range(50))
    first.close()
    second.close()


WRITER = """
import sys
from elastic.journal import Journal
journal = Journal(sys.argv[1])
i = int(sys.argv[2])
while True:
    journal.append(i=i, text="x" * 2000)
    i += 1
"""


def test_lines_survive_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first_size = 0
    for start in (0, 1_000_000):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(start)])
        deadline = time.monotonic() + 30
        while not path.exists() or path.stat().st_size < first_size + 100_000:
            assert time.monotonic() < deadline, "the writer wrote nothing in 30 s"
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        first_size = path.stat().st_size
    lines, num_torn = scan_journal(path)
    ids = [one["i"] for one in lines]
    second = ids.index(1_000_000)
    assert ids[:second] == list(range(second))
    assert ids[second:] == list(range(1_000_000, 1_000_000 + len(ids) - second))
    assert num_torn <= 2


def losses(metrics: list[Metric]) -> list[tuple[str, int, float | None]]:
    return [(m["stage"], m["position"], m["values"]["loss"]) for m in latest_values(metrics)]


def test_a_redone_position_shows_the_highest_attempt() -> None:
    metrics = [
        line("b", 10, 1, 1.0),
        line("b", 20, 1, 2.0),
        line("b", 20, 2, 2.5),
        line("b", 20, 2, 9.0, bucket="other"),
        line("b", 20, 2, 2.6),
        line("a", 10, 3, 7.0),
        line("b", 20, 1, 99.0),
    ]
    assert losses(metrics) == [("b", 10, 1.0), ("b", 20, 2.6), ("b", 20, 9.0), ("a", 10, 7.0)]


def test_positions_that_were_lost_and_not_yet_redone_are_left_out() -> None:
    metrics = [line("b", position, 1, 1.0) for position in (10, 20, 25, 30, 40)]
    metrics += [line("b", position, 2, 2.0) for position in (20, 30)]
    assert losses(metrics) == [("b", 10, 1.0), ("b", 20, 2.0), ("b", 30, 2.0)]


def test_a_stage_resumed_at_its_very_end_keeps_its_last_losses() -> None:
    # Killed after the last checkpoint: the next attempt has nothing to train, and measures only.
    measured = line("b", 20, 2, 5.0)
    measured["context"] = {"subset": "held_out"}
    metrics = [line("b", 10, 1, 1.0), line("b", 20, 1, 2.0), measured]
    assert losses(metrics) == [("b", 10, 1.0), ("b", 20, 2.0), ("b", 20, 5.0)]
