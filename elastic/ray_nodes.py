"""What the nodes of a Ray cluster have, worked out from its own list of them."""

from typing import Any


def decoders_of_a_task(nodes: list[dict[str, Any]], gpus: float) -> int:
    """One; or as many as cores come with its GPU, on any of the nodes.

    Ray is asked for one core nevertheless: what was free of all of them might never come.
    """
    have = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("GPU")]
    shares = [resources.get("CPU", 0.0) / resources["GPU"] for resources in have]
    return max(1, int(min(shares, default=0.0) * gpus))
