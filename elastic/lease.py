"""A training process that a node's warm host has forked, for as long as its owner wants it.

The side of the supervisors; elastic.fork_host is the other one. No torch, no Ray.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from elastic.link import Order

_KILLED_S = 10.0


@dataclass
class Lease:
    """A forked process, for as long as this object is open."""

    pid: int
    pipe: "Connection[Any, Any]"  # to the process; messages of elastic.link
    _socket: socket.socket

    def exit_code(self, timeout_s: float) -> int | None:
        """How it ended: an exit code, or minus a signal; None while it lives or if unknown."""
        self._socket.settimeout(timeout_s)
        try:
            word = self._socket.recv(64)
        except OSError:
            return None
        return int(word) if word else None

    def close(self) -> None:
        """Kill the process if it lives, and wait until it is gone."""
        self.pipe.close()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)  # the host kills, and answers when it is done
            self._socket.settimeout(_KILLED_S)
            while self._socket.recv(64):
                pass
        self._socket.close()


def address_of(node: str) -> Path:
    """Where the host of a Ray node listens; a short path, since sockets allow 107 bytes."""
    return Path(f"/tmp/restage-hosts-{os.getuid()}") / f"{node[:24]}.sock"


def start_host(address: Path) -> "subprocess.Popen[bytes]":
    """Start a host and return at once; it listens as soon as its imports are done.

    It ends when the standard input of the returned process closes.
    """
    # numpy's own threads would make forking unsafe, and training processes do not use them.
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # Ray changes the folder of its workers, and only its own processes find a job's code then.
    home = str(Path(__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "elastic.fork_host", str(address)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env)


def fork(address: Path, order: Order, listening: socket.socket | None = None) -> Lease:
    """Have the host at `address` fork a process for `order`; OSError if nobody answers.

    `listening` is handed to the process under the same number in `order`'s life: the socket that
    rank 0's store listens on. The process writes to this process's own output.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(address))
        ours, theirs = Pipe()
        fds = [theirs.fileno(), 1, 2] + ([listening.fileno()] if listening else [])
        head = json.dumps({"env": order.env, "cwd": os.getcwd()}).encode()
        socket.send_fds(connection, [head], fds)
        theirs.close()
        connection.settimeout(_KILLED_S)
        pid = int(connection.recv(64) or 0)
        if not pid:
            raise ConnectionError(f"the fork host at {address} could not fork")
        ours.send(order)
    except BaseException:
        connection.close()
        raise
    return Lease(pid, ours, connection)


def wait_for_host(address: Path, deadline_s: float) -> bool:
    """Whether a host answers at the address before the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(address))
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
