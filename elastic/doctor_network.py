"""What `doctor` asks of the network of this machine: loopback, gloo, and open or busy ports."""

import ipaddress
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from elastic import agreement
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
        place = f"file://{Path(folder) / 'store'}"
        peers = [agreement.begin("gloo", place, rank, 2) for rank in range(2)]
        said = [agreement.why_not(peer) for peer in peers]
    why = next((one for one in said if one), "")
    if not why:
        return Finding("ok", "gloo", "two processes agree", rule=rule)
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
