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
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

# torch imports these at their first use only: 1 to 2.5 s, paid here and not in every process.
import torch._dynamo
import torch.distributed.checkpoint.hf_storage  # noqa: F401

from elastic import attempt

_PR_SET_PDEATHSIG = 1
_MAX_ORDER_BYTES = 1 << 20


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
