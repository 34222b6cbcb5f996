"""The warm host: real processes, forked, killed, and never left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from elastic.lease import Lease, fork, start_host, wait_for_host
from elastic.link import Failed, Order

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("h") / "host.sock"
    host = start_host(path)
    assert wait_for_host(path, 120)
    yield path
    host.communicate(timeout=DEADLINE_S)
    assert host.returncode == 0, "a host ends when its owner does"
    assert not path.exists()


def order(rank: int = 0, size: int = 2, job: bytes = b"") -> Order:
    """Rank 0 of 2 waits in the group's store for somebody who never comes."""
    return Order(rank, size, "127.0.0.1", 1, job, os.getpid(), os.getppid(), env={"SEEN": "yes"})


def waiting(address: Path) -> Lease:
    """A process that lives: its store listens on a port of its own, and nobody joins it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        return fork(
            address, Order(0, 2, "127.0.0.1", port, b"", os.getpid(), os.getppid()), listening
        )


def wait_until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def hear_to_the_end(lease: Lease) -> None:
    """Take what the process has said, until its end of the pipe is closed."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            assert lease.pipe.poll(DEADLINE_S), "neither a word nor an end"
            lease.pipe.recv()


def test_a_closed_lease_ends_the_process_before_it_returns(address: Path) -> None:
    lease = waiting(address)
    assert psutil.pid_exists(lease.pid)
    lease.close()
    assert not psutil.pid_exists(lease.pid)


def test_a_process_that_was_stopped_is_ended_as_well(address: Path) -> None:
    lease = waiting(address)
    os.kill(lease.pid, signal.SIGSTOP)
    lease.close()
    assert not psutil.pid_exists(lease.pid)


def test_a_kill_is_told_with_its_signal(address: Path) -> None:
    lease = waiting(address)
    os.kill(lease.pid, signal.SIGKILL)
    hear_to_the_end(lease)
    assert lease.exit_code(DEADLINE_S) == -signal.SIGKILL
    lease.close()


def test_what_a_process_raises_is_told_with_its_last_line(address: Path) -> None:
    lease = fork(address, order(rank=0, size=1))  # port 1: the store cannot listen there
    told = [lease.pipe.recv()]
    while not isinstance(told[-1], Failed):
        told.append(lease.pipe.recv())
    assert told[-1].kind == "crash"
    assert told[-1].message
    assert lease.exit_code(DEADLINE_S) == 1
    lease.close()


def test_forking_takes_no_import(address: Path) -> None:
    """The reason for the host: a process is at work long before torch could be imported."""
    began = time.monotonic()
    lease = waiting(address)
    lease.pipe.recv()  # its first sign of life, from inside the loop's own code
    assert time.monotonic() - began < 30, "hangs"
    mapped = Path(f"/proc/{lease.pid}/maps").read_text()
    assert "libtorch" in mapped
    lease.close()


OWNER = """
import os, socket, sys, time
from pathlib import Path
from elastic.lease import fork
from elastic.link import Order
listening = socket.create_server(("127.0.0.1", 0))
lease = fork(Path(sys.argv[1]), Order(0, 2, "127.0.0.1", listening.getsockname()[1], b"", 0, 0), listening)
print(lease.pid, flush=True)
time.sleep(600)
"""  # noqa: E501


def test_a_killed_owner_leaves_no_process(address: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(address)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert psutil.pid_exists(pid)
        owner.kill()
    wait_until(lambda: not psutil.pid_exists(pid), "the end of the forked process")


def test_a_killed_host_takes_what_it_forked_along_and_its_place_can_be_taken(
    tmp_path: Path,
) -> None:
    path = tmp_path / "h.sock"
    host = start_host(path)
    assert wait_for_host(path, 120)
    lease = waiting(path)
    host.kill()
    host.communicate()
    wait_until(lambda: not psutil.pid_exists(lease.pid), "the end of the forked process")
    hear_to_the_end(lease)
    assert lease.exit_code(1) is None, "nobody saw how it ended"
    lease.close()
    with pytest.raises(ConnectionRefusedError):
        fork(path, order())
    assert not wait_for_host(path, 0)
