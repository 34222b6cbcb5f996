"""A warm process on every node that forks training processes: their imports are already done.

`python -m elastic.fork_host SOCKET` imports torch and the training loop once, then waits on a Unix
socket. Each connection orders one process and holds it as a lease: when the connection closes,
because its owner closed it or died, the process is killed. The host itself ends when its standard
input closes, and everything that it forked ends with it. No Ray here.

A host never touches a GPU, and the threads of libraries in it sleep and hold no lock (OpenBLAS is
kept to one; Arrow's allocator has one that only gives memory back), so that forking it is safe.
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
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

# torch imports these at their first use only: 1 to 2.5 s, paid here and not in every process.
import torch._dynamo
import torch.distributed.checkpoint.hf_storage  # noqa: F401

from elastic import attempt
from elastic.lease import WORD, connect

_PR_SET_PDEATHSIG = 1
_MAX_ORDER_BYTES = 1 << 20


class _Host:
    """The loop of the host: one selector over the standard input, the socket and the leases.

    Whatever goes wrong with one order must leave the host, and so all others' processes, alive.
    """

    def __init__(self, server: socket.socket, address: Path, stdin: BinaryIO) -> None:
        self._server = server
        self._address = address
        self._inode = address.stat().st_ino
        self._stdin = stdin.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(stdin, selectors.EVENT_READ, self._end)
        self._selector.register(server, selectors.EVENT_READ, self._accept)

    def serve(self) -> None:
        """Serve for ever."""
        while True:
            for key, _ in self._selector.select():
                # An event of this batch may be about what an earlier one of it has closed.
                if self._selector.get_map().get(key.fd) is key:
                    self._act(key)

    def _act(self, key: selectors.SelectorKey) -> None:
        try:
            key.data()
        except OSError:  # no process or file to be had, or the owner is gone
            traceback.print_exc()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            if self._address.stat().st_ino == self._inode:  # not the next host's already
                self._address.unlink()
        os._exit(0)  # the kernel ends what was forked (PDEATHSIG)

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        self._watch(connection, lambda: self._fork_for(connection))

    def _watch(self, what: socket.socket | int, act: Callable[[], None]) -> None:
        self._selector.register(what, selectors.EVENT_READ, act)

    def _fork_for(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        fds: list[int] = []
        try:
            head, fds, _, _ = socket.recv_fds(connection, _MAX_ORDER_BYTES, 4)
            if not head:  # only looked whether somebody is here
                connection.close()
                return
            host = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._become(host, json.loads(head), fds, connection)
        except OSError:
            connection.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        gone = os.pidfd_open(pid)
        self._watch(gone, lambda: self._reap(pid, gone, connection))
        self._watch(connection, lambda: self._revoke(pid, connection))
        connection.sendall(WORD.pack(pid))

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
            connection.sendall(WORD.pack(os.waitstatus_to_exitcode(status)))
        connection.close()

    def _become(
        self, host: int, head: dict[str, Any], fds: list[int], connection: socket.socket
    ) -> None:
        """In the forked process: leave the host's things behind and train. Never returns."""
        code = 1
        try:
            die_with(host)
            for key in list(self._selector.get_map().values()):
                if key.fd != self._stdin:
                    os.close(key.fd)
            self._selector.close()
            connection.close()
            # Processes that it starts would import the host again, as what they come from.
            sys.modules["__main__"] = ModuleType("__main__")
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
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


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; on Linux, where Ray is used."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def _sweep(folder: Path) -> None:
    """Remove the sockets of hosts that were killed."""
    for path in folder.glob("*.sock"):
        with contextlib.suppress(OSError):
            try:
                connect(path).close()
            except ConnectionRefusedError:
                path.unlink()


def main(address: Path, owner: int) -> None:
    """Import, listen, serve."""
    die_with(owner)
    _sweep(address.parent)
    aside = address.with_suffix(f".{os.getpid()}")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(aside))
    server.listen(64)
    os.rename(aside, address)  # whoever sees the name can connect
    gc.freeze()  # the collector must not touch, and so copy, every page in each child
    _Host(server, address, sys.stdin.buffer).serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
