"""`make test` runs two parts side by side, and nothing that one of them says is lost."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# In place of the interpreter of a venv: called as `python -m pytest -m PART`.
PYTHON = """#!/bin/sh
echo "the tests that are $4 ran"
echo "something of $4" >&2
test "$4" != "$FAILING"
"""


@pytest.mark.parametrize("failing", ["", "ray", "not ray"])
@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_a_failure_of_either_part_fails_all_and_both_are_shown(
    tmp_path: Path, failing: str
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    outside = {name: v for name, v in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "test", f"VENV={tmp_path}"],
        cwd=ROOT, env={**outside, "FAILING": failing},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == (failing == "")
    for part in ("ray", "not ray"):
        assert f"the tests that are {part} ran" in done.stdout
        assert f"something of {part}" in done.stdout
    assert ("all tests: passed" in done.stdout) == (failing == "")
    assert ("all tests: FAILED" in done.stdout) == (failing != "")
