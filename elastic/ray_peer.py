"""What `doctor` runs on each node of a cluster. Light: it is imported anew on every node."""

import importlib.metadata
import platform
import shutil
import socket
import time
from pathlib import Path
from typing import NamedTuple

from elastic import agreement

_ANSWER_S = 5.0
COMPARED = ("ray", "torch")  # and Python: what drivers and workers must have alike


class NodeFacts(NamedTuple):
    """What a node says of itself."""

    versions: dict[str, str]
    shared_bytes: int  # free


class Peer:
    """On one node: listens for the others, and tries to reach them."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._server = socket.create_server((address, 0))

    def port(self) -> int:
        """Where it listens; the kernel takes connections without our doing."""
        return int(self._server.getsockname()[1])

    def facts(self) -> NodeFacts:
        """Versions, and room in shared memory."""
        return NodeFacts(versions(), shutil.disk_usage("/dev/shm").free if _has_shm() else 0)

    def clock(self) -> float:
        """The time of day here."""
        return time.time()

    def free_port(self) -> int:
        """One that a server may listen on."""
        with socket.create_server((self._address, 0)) as server:
            return int(server.getsockname()[1])

    def agree(self, backend: agreement.Backend, place: str, rank: int, size: int) -> str:
        """Why a process of this node does not agree on a sum with the others'; empty if it does."""
        return agreement.why_not(agreement.begin(backend, place, rank, size))

    def reach(self, address: str, port: int) -> str:
        """Why another peer cannot be reached; empty if it can."""
        try:
            socket.create_connection((address, port), timeout=_ANSWER_S).close()
        except OSError as error:
            return str(error)
        return ""


def versions() -> dict[str, str]:
    """Of Python and of what has to be alike on all nodes."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in COMPARED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _has_shm() -> bool:
    return Path("/dev/shm").exists()
