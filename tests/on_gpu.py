"""What only a GPU can show, in one go and within a time: its tests, then its benchmarks.

`make gpu`, or with the Python of a machine that has its own torch: `python tests/on_gpu.py`.
Neither Ray nor Aim need be there. What matters most comes first; a part that fails or takes too
long is ended, and the next one begins. Logs lie in `--logs`; kept figures, as ever, in
tests/bench/results.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/test_attention.py", "tests/test_gpu.py", "tests/test_inputs.py")
LEAST_S = 30.0  # with less time left, no part is begun


class Part(NamedTuple):
    """A command of Python's, and the seconds after which it is ended."""

    name: str
    arguments: tuple[str, ...]
    most_s: float


PARTS = (
    Part("tests", ("-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", *TESTS), 240),
    Part("mfu", ("tests/bench/mfu.py", "--seconds", "260"), 330),
    Part("switch", ("tests/bench/switch.py", "--seconds", "150"), 200),
    Part("memory", ("tests/bench/memory.py",), 120),
    Part("checkpoint", ("tests/bench/checkpoint.py", "--gpu", "4"), 120),
)


class Played(NamedTuple):
    """How a part ended, and the last thing that it said."""

    name: str
    ended: str
    seconds: float
    last: str


def play(parts: Iterable[Part], seconds: float, logs: Path) -> Iterator[Played]:
    """Each part in turn, as long as there is time."""
    logs.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    for part in parts:
        left = until - time.monotonic()
        if left < min(LEAST_S, part.most_s):
            yield Played(part.name, "not begun: no time left", 0.0, "")
            continue
        began = time.monotonic()
        log = logs / f"{part.name}.log"
        ended = _run(part, min(left, part.most_s), log)
        said = log.read_text(errors="replace").strip().splitlines()
        yield Played(part.name, ended, time.monotonic() - began, said[-1] if said else "")


def _run(part: Part, most_s: float, log: Path) -> str:
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", *part.arguments],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_places())},
            start_new_session=True,  # a part's own processes end with it
        )
        try:
            code = process.wait(most_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {most_s:.0f} s"
    return "done" if code == 0 else f"failed with {code}"


def _places() -> list[str]:
    """Where modules are looked for: here first, then wherever the caller says."""
    return [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def main() -> int:
    """Play all parts; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600, help="for everything together")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--logs", type=Path, default=ROOT / "runs" / "on-gpu", help="a folder")
    asked = parser.parse_args()
    wanted = [part for part in PARTS if not asked.only or part.name in asked.only.split(",")]
    played = []
    for each in play(wanted, asked.seconds, asked.logs):
        played.append(each)
        print(f"{each.name}: {each.ended}, {each.seconds:.0f} s: {each.last}", flush=True)
    summary = asked.logs / "played.json"
    summary.write_text(json.dumps([each._asdict() for each in played], indent=1) + "\n")
    return 0 if all(each.ended == "done" for each in played) else 1


if __name__ == "__main__":
    sys.exit(main())
