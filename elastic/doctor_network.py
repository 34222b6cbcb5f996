"""What `doctor` asks of the network of this machine: loopback, gloo, and open or busy ports."""

import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from elastic.finding import Finding

# Where Ray and Aim listen if nobody says otherwise; none of them asks for a login by default.
PORTS = {
    6379: "Ray's head",
    8265: "Ray's dashboard and jobs",
    10001: "Ray's client server",
    52365: "Ray's dashboard agent",
    43800: "Aim's pages",
    53800: "Aim's server",
}
_GLOO_S = 120
_PEER = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist

place, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
total = torch.tensor([rank + 1])
dist.all_reduce(total)
assert total.item() == 3, total
dist.barrier()  # who ends first would cut the other off
dist.destroy_process_group()
"""


def loopback() -> Finding:
    """Whether this machine reaches itself."""
    rule = "a connection to 127.0.0.1 works"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            with socket.create_connection(address, timeout=5):
                server.settimeout(5)
                server.accept()[0].close()
    except OSError as error:
        advice = "Ray and gloo need the loopback interface: ip link set lo up; look at the firewall"
        return Finding("error", "loopback", str(error), advice, rule)
    value = f"a connection to {address[0]}:{address[1]} works"
    return Finding("ok", "loopback", value, rule=rule)


def gloo() -> Finding:
    """Whether two processes of this machine agree on a sum, as the workers of a run do."""
    rule = "two processes agree on a sum"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _PEER, str(Path(folder) / "store")]
        peers = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            said = [peer.communicate(timeout=_GLOO_S)[1] for peer in peers]
        except subprocess.TimeoutExpired:
            said = [f"no agreement in {_GLOO_S} s"]
        finally:
            for peer in peers:
                peer.kill()
                peer.wait()
    if all(peer.returncode == 0 for peer in peers):
        return Finding("ok", "gloo", "two processes agree", rule=rule)
    why = next((lines[-1] for one in said if (lines := one.strip().splitlines())), "no reason")
    card = os.environ.get("GLOO_SOCKET_IFNAME")
    advice = "set GLOO_SOCKET_IFNAME to a network card that is up (ip -br addr), such as lo; "
    advice += f"it is {card!r}" if card else "look where the host's name leads (getent hosts)"
    return Finding("error", "gloo", why, advice, rule)


def ray_ports() -> Finding:
    """Which of the usual ports of Ray and Aim are open to other machines."""
    rule = "Ray and Aim listen on the loopback address alone, or ask for a token"
    found = sorted(
        {
            f"{PORTS[one.laddr.port]} on {one.laddr.ip}:{one.laddr.port}{_owner(one.pid)}"
            for one in psutil.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN
            and one.laddr.port in PORTS
            and not is_loopback(one.laddr.ip)
        }
    )
    if not found:
        return Finding("ok", "open ports", "none of Ray or Aim beyond this machine", rule=rule)
    advice = "who reaches them may run programs here: shut them off with a firewall, start Ray with"
    advice += " --node-ip-address 127.0.0.1 or RAY_AUTH_MODE=token, and Aim with --host 127.0.0.1"
    return Finding("warn", "open ports", "; ".join(found), advice, rule)


def given_port(port: int) -> Finding:
    """Whether something can be started on a port."""
    what, rule = f"port {port}", "free on every address of this machine"
    try:
        with socket.create_server(("", port)):
            return Finding("ok", what, "free", rule=rule)
    except OSError as error:
        owners = {
            _owner(one.pid)
            for one in psutil.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port
        }
        # Not its own words: the socket module adds the address to them.
        why = os.strerror(error.errno) if error.errno else str(error)
        value = f"{why}{''.join(sorted(owners))}"
        return Finding("error", what, value, "end what holds it, or choose another port", rule)


def _owner(pid: int | None) -> str:
    """Who listens; another user's process is not told."""
    if pid is None:
        return ""
    with suppress(psutil.Error):
        return f" by {psutil.Process(pid).name()} ({pid})"
    return f" by process {pid}"


def is_loopback(text: str) -> bool:
    """Whether an address is of this machine alone."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
