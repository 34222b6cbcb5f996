"""The script that plays everything for a GPU loses no part to another one."""

import time
from pathlib import Path

from on_gpu import PARTS, ROOT, Part, play


def _saying(name: str, program: str, most_s: float = 60.0) -> Part:
    return Part(name, ("-c", program), most_s)


def test_a_part_that_fails_or_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    hanging = "import subprocess, sys; print('begun'); subprocess.run(['sleep', '600'])"
    parts = [
        _saying("one", "print('first'); print('last')"),
        _saying("two", "print('so far'); raise SystemExit(3)"),
        _saying("three", hanging, most_s=2.0),
        _saying("four", "import elastic; print('here')"),
    ]
    began = time.monotonic()
    played = list(play(parts, 120.0, tmp_path))
    assert time.monotonic() - began < 60
    assert [(each.name, each.ended, each.last) for each in played] == [
        ("one", "done", "last"),
        ("two", "failed with 3", "so far"),
        ("three", "ended after 2 s", "begun"),
        ("four", "done", "here"),
    ]
    assert (tmp_path / "one.log").read_text() == "first\nlast\n"


def test_no_part_is_begun_without_time_for_it(tmp_path: Path) -> None:
    parts = [_saying("one", "print('done')"), _saying("two", "print('done')")]
    played = list(play(parts, 0.0, tmp_path))
    assert [each.ended for each in played] == ["not begun: no time left"] * 2
    assert not list(tmp_path.iterdir())


def test_what_is_played_is_there() -> None:
    for part in PARTS:
        for argument in part.arguments:
            if argument.startswith("tests/"):
                assert (ROOT / argument).is_file()
