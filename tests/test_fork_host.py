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

from cluster import faults
from elastic.lease import Lease, connect, fork, own_folder, start_host, wait_for_host
from elastic.link import Failed, Order

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0
IMPORT_S: list[float] = []  # that the host took to come up


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("h") / "host.sock"
    began = time.monotonic()
    host = start_host(path)
    assert wait_for_host(path, 120)
    IMPORT_S.append(time.monotonic() - began)
    yield path
    host.communicate(timeout=DEADLINE_S)
    assert host.returncode == 0, "a host ends when its owner does"
    assert not path.exists()


def order(rank: int = 0, size: int = 2, job: bytes = b"") -> Order:
    """Rank 0 of 2 waits in the group's store for somebody who never comes."""
    return Order(rank, size, "127.0.0.1", 1, job, os.getpid(), os.getppid())


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


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and faults.is_alive(psutil.Process(pid))


def test_a_closed_lease_ends_the_process_before_it_returns(address: Path) -> None:
    lease = waiting(address)
    assert psutil.pid_exists(lease.pid)
    lease.close()
    assert not runs(lease.pid)


def test_a_process_that_was_stopped_is_ended_as_well(address: Path) -> None:
    lease = waiting(address)
    os.kill(lease.pid, signal.SIGSTOP)
    lease.close()
    assert not runs(lease.pid)


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


def test_a_process_is_at_work_long_before_torch_could_be_imported(address: Path) -> None:
    """The reason for the host."""
    began = time.monotonic()
    lease = waiting(address)
    lease.pipe.recv()  # its first sign of life, from inside the loop's own code
    assert time.monotonic() - began < IMPORT_S[0] / 2
    lease.close()


def test_a_client_that_leaves_before_its_answer_costs_the_host_nothing(address: Path) -> None:
    for _ in range(5):
        end, other = socket.socketpair()
        with connect(address) as hasty, end, other:
            fds = [end.fileno(), 1, 2]
            socket.send_fds(hasty, [b'{"env": {}, "cwd": "/"}'], fds)
    waiting(address).close()


def test_an_end_and_a_revocation_at_one_moment_cost_the_host_nothing(address: Path) -> None:
    other, lease = waiting(address), waiting(address)
    host = psutil.Process(lease.pid).parent()
    assert host is not None
    host.suspend()  # so that both events are there when it looks again
    os.kill(lease.pid, signal.SIGKILL)
    lease._host.shutdown(socket.SHUT_WR)
    host.resume()
    lease.close()
    assert psutil.pid_exists(other.pid), "the host has died, and taken the other one along"
    other.close()
    waiting(address).close()


def test_a_frozen_host_cannot_keep_a_process_alive(
    address: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.lease._KILLED_S", 0.5)
    lease = waiting(address)
    process = psutil.Process(lease.pid)
    host = process.parent()
    assert host is not None
    host.suspend()
    lease.close()
    assert not faults.is_alive(process)
    host.resume()


def test_a_host_of_another_user_is_not_asked(
    address: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.lease.os.getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="somebody else listens"):
        connect(address)


def test_a_folder_that_others_can_write_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("/tmp/restage-hosts-987654")
    monkeypatch.setattr("elastic.lease.os.getuid", lambda: 987654)
    folder.symlink_to("/tmp")
    try:
        with pytest.raises(PermissionError, match="not a folder of this user alone"):
            own_folder()
    finally:
        folder.unlink()


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
    wait_until(lambda: not runs(pid), "the end of the forked process")


def test_a_killed_host_takes_what_it_forked_along_and_its_place_can_be_taken(
    tmp_path: Path,
) -> None:
    path = tmp_path / "h.sock"
    host = start_host(path)
    assert wait_for_host(path, 120)
    lease = waiting(path)
    host.kill()
    host.communicate()
    wait_until(lambda: not runs(lease.pid), "the end of the forked process")
    hear_to_the_end(lease)
    assert lease.exit_code(1) is None, "nobody saw how it ended"
    lease.close()
    with pytest.raises(ConnectionRefusedError):
        fork(path, order())
    assert not wait_for_host(path, 0)
