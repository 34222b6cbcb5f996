"""A training process that a node's warm host has forked, for as long as its owner wants it.

The side of the supervisors; elastic.fork_host is the other one. No torch, no Ray.
"""

import contextlib
import json
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from elastic.link import Order

# What a host says on a lease's socket: the process's id, and at its end its exit code.
WORD = struct.Struct("!q")
_KILLED_S = 10.0
_ANSWER_S = 10.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Lease:
    """A forked process, for as long as this object is open.

    `pipe` leads to it, for the messages of elastic.link.
    """

    def __init__(self, pid: int, pipe: "Connection[Any, Any]", host: socket.socket) -> None:
        self.pid = pid
        self.pipe = pipe
        self._host = host
        self._process = os.pidfd_open(pid)  # means this process for ever, as its number does not

    def exit_code(self, timeout_s: float) -> int | None:
        """How it ended: an exit code, or minus a signal; None while it lives or if unknown."""
        self._host.settimeout(timeout_s)
        try:
            return receive(self._host)
        except OSError:
            return None

    def close(self) -> None:
        """Kill the process if it lives; TimeoutError if it is not gone within seconds.

        A process hangs on where its disk or its GPU does, and its memory is not free before.
        """
        self.pipe.close()
        with contextlib.suppress(OSError):
            self._host.shutdown(socket.SHUT_WR)  # its host kills it
        try:
            if self._has_ended(_KILLED_S):
                return
            signal.pidfd_send_signal(self._process, signal.SIGKILL)  # a host that is frozen did not
            if not self._has_ended(_KILLED_S):
                raise TimeoutError(f"process {self.pid} does not end, though it was killed")
        finally:
            self._host.close()
            os.close(self._process)

    def _has_ended(self, within_s: float) -> bool:
        return bool(select.select([self._process], [], [], within_s)[0])


def receive(connection: socket.socket) -> int:
    """One word of a host; ConnectionError if it is gone."""
    word = b""
    while len(word) < WORD.size:
        more = connection.recv(WORD.size - len(word))
        if not more:
            raise ConnectionError("the fork host is gone")
        word += more
    return int(WORD.unpack(word)[0])


def address_of(node: str, job: str) -> Path:
    """Where the host of a Ray node listens for one job; short, since sockets allow 107 bytes."""
    return own_folder() / f"{job[-8:]}-{node[:24]}.sock"


def own_folder() -> Path:
    """The folder of this user's sockets; PermissionError if somebody else could listen there."""
    folder = Path(f"/tmp/restage-hosts-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone; remove it")
    return folder


def start_host(address: Path) -> "subprocess.Popen[bytes]":
    """Start a host and return at once; it listens as soon as its imports are done.

    It ends when the standard input of the returned process closes.
    """
    # numpy's own threads would make forking unsafe, and training processes do not use them.
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # Ray changes the folder of its workers, and only its own processes find a job's code then.
    home = str(Path(__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "elastic.fork_host", str(address), str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env)


def connect(address: Path) -> socket.socket:
    """A connection to the host at an address; OSError if none of this user's answers."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ANSWER_S)  # a frozen one takes connections until its backlog is full
        connection.connect(str(address))
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(raw)[1] != os.getuid():
            raise PermissionError(f"somebody else listens at {address}")
    except BaseException:
        connection.close()
        raise
    return connection


def fork(address: Path, order: Order, listening: socket.socket | None = None) -> Lease:
    """Have the host at `address` fork a process for `order`; OSError if none answers in seconds.

    `listening` is handed to the process: the socket that rank 0's store listens on. The process
    writes to this process's own output.
    """
    connection = connect(address)
    try:
        ours, theirs = Pipe()
        with theirs:
            fds = [theirs.fileno(), 1, 2] + ([listening.fileno()] if listening else [])
            head = json.dumps({"env": order.env, "cwd": os.getcwd()}).encode()
            socket.send_fds(connection, [head], fds)
        lease = Lease(receive(connection), ours, connection)
        ours.send(order)
    except BaseException:
        connection.close()
        raise
    return lease


def wait_for_host(address: Path, deadline_s: float) -> bool:
    """Whether a host answers at the address before the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        with contextlib.suppress(OSError):
            connect(address).close()
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
