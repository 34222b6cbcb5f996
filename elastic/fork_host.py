"""A warm process on every node that forks training processes: their imports are already done.

`python -m elastic.fork_host SOCKET` imports torch and the training loop once, then waits on a Unix
socket. Each connection orders one process and holds it as a lease: when the connection closes,
because its owner closed it or died, the process is killed. The host itself ends when its standard
input closes, and everything that it forked ends with it. No Ray here.

A host never touches a GPU and runs no second thread, so that forking it is safe.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, BinaryIO

# The last: what torch imports only at its first use in a training process (measured: 1 to 2.5 s).
PRELOADED = ("elastic.attempt", "torch._dynamo", "torch.distributed.checkpoint.hf_storage")
_PR_SET_PDEATHSIG = 1
_KILLED_S = 10.0
_MAX_ORDER_BYTES = 1 << 20


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
    command = [sys.executable, "-m", "elastic.fork_host", str(address)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env)


def fork(address: Path, order: Any, listening: socket.socket | None = None) -> Lease:
    """Have the host at `address` fork a process for `order` (an Order); OSError if nobody answers.

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


class _Host:
    """The loop of the host: one selector over the standard input, the socket and the leases."""

    def __init__(self, server: socket.socket, address: Path, stdin: BinaryIO) -> None:
        self._server = server
        self._address = address
        self._selector = selectors.DefaultSelector()
        self._selector.register(stdin, selectors.EVENT_READ, self._end)
        self._selector.register(server, selectors.EVENT_READ, self._accept)

    def serve(self) -> None:
        """Serve for ever."""
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _end(self) -> None:
        self._address.unlink(missing_ok=True)
        os._exit(0)  # the kernel ends what was forked (PDEATHSIG)

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        self._selector.register(
            connection, selectors.EVENT_READ, lambda: self._fork_for(connection)
        )

    def _fork_for(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        try:
            head, fds, _, _ = socket.recv_fds(connection, _MAX_ORDER_BYTES, 4)
        except OSError:
            head, fds = b"", []
        if not head:  # only looked whether somebody is here
            connection.close()
            return
        pid = os.fork()
        if pid == 0:
            self._become(json.loads(head), fds)
        for fd in fds:
            os.close(fd)
        connection.sendall(str(pid).encode())
        gone = os.pidfd_open(pid)
        self._selector.register(
            gone, selectors.EVENT_READ, lambda: self._reap(pid, gone, connection)
        )
        self._selector.register(
            connection, selectors.EVENT_READ, lambda: self._revoke(pid, connection)
        )

    def _revoke(self, pid: int, connection: socket.socket) -> None:
        """The owner is gone, or wants the end."""
        self._selector.unregister(connection)
        os.kill(pid, signal.SIGKILL)  # not yet reaped, so the number is still this process's

    def _reap(self, pid: int, gone: int, connection: socket.socket) -> None:
        self._selector.unregister(gone)
        os.close(gone)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)
        with contextlib.suppress(OSError):
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        connection.close()

    def _become(self, head: dict[str, Any], fds: list[int]) -> None:
        """In the forked process: leave the host's things behind and train. Never returns."""
        code = 1
        try:
            die_with_parent()
            for key in list(self._selector.get_map().values()):
                if key.fileobj is not sys.stdin.buffer:
                    os.close(key.fd)
            self._selector.close()
            os.dup2(fds[1], 1)
            os.dup2(fds[2], 2)
            os.environ.update(head["env"])
            os.chdir(head["cwd"])
            attempt = importlib.import_module("elastic.attempt")
            pipe: Connection[Any, Any] = Connection(fds[0])
            code = attempt.main(pipe, fds[3] if len(fds) > 3 else None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # no handlers of the host's, and no waiting for threads of libraries


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; Linux only, elsewhere nothing."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was told
            os._exit(1)


def _sweep(folder: Path) -> None:
    """Remove the sockets of hosts that were killed."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                pass  # it has gone by itself


def main(address: Path) -> None:
    """Import, listen, serve."""
    die_with_parent()
    for name in PRELOADED:
        importlib.import_module(name)
    address.parent.mkdir(mode=0o700, exist_ok=True)
    if address.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{address.parent} belongs to another user")
    _sweep(address.parent)
    aside = address.with_suffix(f".{os.getpid()}")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(aside))
    server.listen(64)
    os.rename(aside, address)  # whoever sees the name can connect
    gc.freeze()  # the collector must not touch, and so copy, every page in each child
    _Host(server, address, sys.stdin.buffer).serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
