"""What `doctor` asks of a cluster: its nodes' versions, clocks, memory, and ways to each other."""

import time
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.token import advice, asks_for_token
from elastic.agreement import Backend
from elastic.drive import check_address, connect
from elastic.errors import InputError
from elastic.finding import Finding
from elastic.ray_peer import NodeFacts, Peer, versions
from elastic.settings import read_settings

_ANSWER_S = 60.0
_AGREE_S = 150.0  # more than `agreement` gives a process
_SUM = "a process on each node takes part in a sum, as the workers of a run do"
_MOST_SKEW_S = 1.0
_LEAST_SHARED = 1 << 30
_ALIKE = "the Python, Ray and torch of this machine on every node"


class Node(NamedTuple):
    """A node that answers: its name, where it listens, and our actor there."""

    name: str
    address: str
    port: int
    peer: Any  # Ray's actor handle


def cluster_findings(address: str) -> list[Finding]:
    """Look at the cluster whose head is at HOST:PORT."""
    settings = read_settings(ray_address=address)
    token: list[Finding] = []
    try:
        check_address(settings)
        token.append(_token(address))
        connect(settings, None)
    except InputError as error:
        remedy = "start a cluster there, or give another --ray-address"
        answers = "a cluster that answers"
        return [*token, Finding("error", "Ray cluster", str(error), remedy, answers)]
    try:
        return [*token, *node_findings()]
    finally:
        ray.shutdown()


def _token(address: str) -> Finding:
    """Whether it sends away who has no token."""
    rule = "a cluster that asks for a token (RAY_AUTH_MODE=token)"
    if asks_for_token(address) is False:
        return Finding("warn", "Ray token", "asks nobody for one", advice(address), rule)
    return Finding("ok", "Ray token", "is asked for", rule=rule)


def node_findings() -> list[Finding]:
    """Look at all nodes of the cluster that this process is connected to."""
    nodes, silent = _peers()
    found = [_answering(nodes, silent)]
    if not nodes:
        return found
    facts = _ask({one.name: one.peer.facts.remote() for one in nodes})[0]
    offsets = {one.name: _offset(one) for one in nodes}
    found += [check_versions(facts, versions()), check_clocks(offsets), check_shared(facts)]
    ring = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    asked = {
        f"{one.name} to {other.name}": one.peer.reach.remote(other.address, other.port)
        for one, other in ring
    }
    tried, lost = _ask(asked)
    ways = check_ways({way: why for way, why in {**tried, **lost}.items() if why})
    sums = [] if ways.level == "error" else list(_sums(nodes))
    return [*found, ways, *sums]


def _sums(nodes: list[Node]) -> Iterator[Finding]:
    """Whether processes on all nodes agree, and those on the GPUs of the nodes that have some."""
    yield _sum("gloo", nodes)
    with_gpus = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")}
    on_gpus, busy = _peers(only=with_gpus, gpus=1)
    if busy:
        value = f"not tried: no GPU is free on {', '.join(busy)}"
        yield Finding("warn", "nccl of all nodes", value, "ask again when nothing trains", _SUM)
    elif on_gpus:
        yield _sum("nccl", on_gpus)


def _sum(backend: Backend, nodes: list[Node]) -> Finding:
    """Have a process on each node take part in a sum."""
    first = nodes[0]
    ports, lost = _ask({first.name: first.peer.free_port.remote()})
    if lost:
        return check_sum(backend, lost)
    place = f"tcp://{first.address}:{ports[first.name]}"
    asked = {
        one.name: one.peer.agree.remote(backend, place, rank, len(nodes))
        for rank, one in enumerate(nodes)
    }
    answers, silent = _ask(asked, _AGREE_S)
    return check_sum(backend, {**answers, **silent})


def check_sum(backend: Backend, said: Mapping[str, str]) -> Finding:
    """Whether all agreed; `said` has of each node why it did not, or nothing."""
    why = "; ".join(f"{name}: {reason}" for name, reason in said.items() if reason)
    if why:
        card = f"{backend.upper()}_SOCKET_IFNAME"
        remedy = f"set {card} on every node to the network card by which the nodes reach each other"
        return Finding("error", f"{backend} of all nodes", why, f"{remedy} (ip -br addr)", _SUM)
    return Finding("ok", f"{backend} of all nodes", f"{len(said)} processes agree", rule=_SUM)


def check_versions(facts: Mapping[str, NodeFacts], here: Mapping[str, str]) -> Finding:
    """Whether all nodes run what this machine runs."""
    others = [
        f"{node} has {name} {version}, here it is {here[name]}"
        for node, fact in facts.items()
        for name, version in fact.versions.items()
        if version != here[name]
    ]
    if others:
        remedy = "use one image, or install the same constraints.txt on all of them"
        return Finding("error", "node versions", "; ".join(others), remedy, _ALIKE)
    alike = ", ".join(f"{name} {version}" for name, version in here.items())
    return Finding("ok", "node versions", alike, rule=_ALIKE)


def check_clocks(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """Whether clocks agree; of each node by how much its own is ahead of ours, and the doubt."""
    rule = f"within {_MOST_SKEW_S:g} s: the notice of a node that goes names a time of day"
    wrong = [
        f"{node} is {offset:+.1f} s off (within {doubt:.1f} s)"
        for node, (offset, doubt) in offsets.items()
        if abs(offset) - doubt > _MOST_SKEW_S
    ]
    if wrong:
        remedy = "let chrony or systemd-timesyncd set the clocks: timedatectl set-ntp true"
        return Finding("warn", "node clocks", "; ".join(wrong), remedy, rule)
    most = max((abs(offset) for offset, _ in offsets.values()), default=0.0)
    return Finding("ok", "node clocks", f"at most {most:.2f} s from the one here", rule=rule)


def check_shared(facts: Mapping[str, NodeFacts]) -> Finding:
    """Whether each node has shared memory enough."""
    rule = "1 GiB free in /dev/shm of every node"
    small = [
        f"{node} has {fact.shared_bytes / 2**30:.2f} GiB free"
        for node, fact in facts.items()
        if fact.shared_bytes < _LEAST_SHARED
    ]
    if small:
        remedy = "for containers --shm-size=4g, for pods an emptyDir with medium: Memory"
        return Finding("warn", "node shared memory", "; ".join(small), remedy, rule)
    return Finding("ok", "node shared memory", f"enough on {len(facts)} nodes", rule=rule)


def check_ways(blocked: Mapping[str, str]) -> Finding:
    """Whether each node reaches the next; `blocked` says of the ways that fail why."""
    rule = "each node reaches any port of the next"
    if blocked:
        value = "; ".join(f"{way}: {why}" for way, why in blocked.items())
        remedy = "open all TCP ports between the nodes: gloo and NCCL choose any of them"
        return Finding("error", "node to node", value, remedy, rule)
    return Finding("ok", "node to node", "each reaches the next", rule=rule)


def _answering(nodes: list[Node], silent: Mapping[str, str]) -> Finding:
    rule = "a task on every node answers"
    if silent or not nodes:
        said = "; ".join(f"{name}: {why}" for name, why in silent.items())
        remedy = "look at its raylet (ray status), and whether Restage is installed there"
        return Finding("error", "nodes", said or "none is alive", remedy, rule)
    return Finding("ok", "nodes", f"{len(nodes)} answer", rule=rule)


def _peers(only: Container[str] | None = None, gpus: int = 0) -> tuple[list[Node], dict[str, str]]:
    """An actor on each living node, or on `only` these; of those where none starts, why."""
    actors, addresses = {}, {}
    for node in ray.nodes():
        if node["Alive"] and (only is None or node["NodeID"] in only):
            address, identity = node["NodeManagerAddress"], node["NodeID"]
            name = f"{address} ({identity[:6]})"
            strategy = NodeAffinitySchedulingStrategy(identity, soft=False)
            options = ray.remote(Peer).options(
                num_cpus=0, num_gpus=gpus, scheduling_strategy=strategy
            )
            actors[name], addresses[name] = options.remote(address), address
    ports, silent = _ask({name: actor.port.remote() for name, actor in actors.items()})
    return [Node(name, addresses[name], ports[name], actors[name]) for name in ports], silent


def _ask(
    asked: Mapping[str, Any], seconds: float = _ANSWER_S
) -> tuple[dict[str, Any], dict[str, str]]:
    """What came of Ray's references in time, and why the others gave nothing."""
    references = list(asked.values())
    ready, _ = ray.wait(references, num_returns=len(references), timeout=seconds)
    answers, silent = {}, {}
    for name, reference in asked.items():
        if reference not in ready:
            silent[name] = f"no answer in {seconds:.0f} s"
            continue
        try:
            answers[name] = ray.get(reference)
        except RayError as error:
            silent[name] = str(error).strip().splitlines()[-1]
    return answers, silent


def _offset(node: Node) -> tuple[float, float]:
    """By how much a node's clock is ahead, and half the time that asking took."""
    began = time.time()
    theirs = ray.get(node.peer.clock.remote(), timeout=_ANSWER_S)
    ended = time.time()
    return theirs - (began + ended) / 2, (ended - began) / 2
