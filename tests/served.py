"""`restage dashboard` in a process of its own, as a person would start it."""

import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PATIENCE_S = 120.0


@contextmanager
def dashboard(run_dir: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The address that is printed and the process, which is interrupted with the block."""
    command = [sys.executable, "-m", "elastic", "dashboard", str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield _address(process), process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None, "both are piped"
                pipe.close()


def _address(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None, "it is piped"
    assert process.stderr is not None, "it is piped"
    if select.select([process.stdout], [], [], _PATIENCE_S)[0]:
        found = re.search(r"http://\S+", process.stdout.readline())
        if found:
            return found[0]
    process.kill()
    raise AssertionError(f"no address: {process.stderr.read()}")


def open_view(page: Any, name: str) -> None:
    """Click on a bookmark, from whatever page of the dashboard."""
    page.goto(re.sub(r"(?<=\d)/.*", "/bookmarks", page.url))
    card = page.locator(".BookmarkCard", has=page.get_by_text(name, exact=True))
    card.get_by_text("View Bookmark").click()
