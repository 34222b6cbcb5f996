"""A Ray cluster that takes jobs, in a process of its own: tests are its users, not its driver."""

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from cluster.local import processes_of

HOME = Path(__file__).parent.parent
_CLUSTER = """
import json, os, sys
from cluster.local import LocalCluster

cluster = LocalCluster(cpus=1, takes_jobs=True)
try:
    cluster.add_node()
    found = [cluster.address, cluster.jobs_address, str(cluster.temp_dir)]
    print(json.dumps([*found, os.environ["RAY_AUTH_TOKEN_PATH"]]), flush=True)
    sys.stdin.read()
finally:
    cluster.stop()
"""
# Of whoever runs the tests: it must be as if there were none.
_OF_OTHERS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


class Beside(NamedTuple):
    """Where the cluster is, and what is needed to talk to it."""

    address: str
    jobs: str
    temp_dir: Path
    token_path: Path
    environment: dict[str, str]  # of whoever has its token


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """Two nodes of one CPU each, as `restage` starts them."""
    plain = {name: value for name, value in os.environ.items() if name not in _OF_OTHERS}
    # A home of its own, for Ray would find a token there.
    plain |= {"HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(HOME)}
    # A job's command is run by the head's shell.
    plain["PATH"] = f"{Path(sys.executable).parent}:{plain.get('PATH', '')}"
    process = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=plain,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address, jobs, temp_dir, token = json.loads(process.stdout.readline())
        known = {**plain, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        yield Beside(address, jobs, Path(temp_dir), Path(token), known)
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def family_of(temp_dir: Path) -> list[psutil.Process]:
    """All processes of a cluster; the agents have put their names where their marks were."""
    marked = processes_of(temp_dir)
    found = {process.pid: process for process in marked}
    for process in marked:
        found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


def listening(processes: list[psutil.Process]) -> list[str]:
    """The addresses at which the processes can be reached."""
    found = []
    for process in processes:
        try:
            sockets = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        found += [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN]
    return found


def is_loopback(address: str) -> bool:
    """Whether nobody but this machine reaches it; IPv4 may come inside of IPv6."""
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
