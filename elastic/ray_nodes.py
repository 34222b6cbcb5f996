"""What the nodes of a Ray cluster have, worked out from its own list of them."""

from typing import Any


def decoders_of_a_task(nodes: list[dict[str, Any]], gpus: float) -> int:
    """One; or as many as cores come with its GPU, on any of the nodes.

    Ray is asked for one core nevertheless: what was free of all of them might never come.
    """
    have = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("GPU")]
    shares = [resources.get("CPU", 0.0) / resources["GPU"] for resources in have]
    return max(1, int(min(shares, default=0.0) * gpus))


def slots(resources: dict[str, dict[str, float]], per: dict[str, float]) -> dict[str, int]:
    """How many times `per` fits into what each node has."""
    return {
        node: int(min(have.get(name, 0.0) // amount for name, amount in per.items()))
        for node, have in resources.items()
    }


class Spare:
    """Slots beyond the most that a training group may ever want, of those that are free.

    Where the group grows to its most, what it lacks now must be free besides. What is seen once
    may be a moment between two groups: only what two looks agree on counts.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._before = 0

    def look(self, free: int, held: int) -> int:
        """So many slots may be taken, or have to be given back (negative).

        `free` slots nobody uses, and `held` are the group's own.
        """
        before, self._before = self._before, free + held - self._most
        if before > 0 and self._before > 0:
            return min(before, self._before)
        if before < 0 and self._before < 0:
            return max(before, self._before)
        return 0

    def changed(self) -> None:
        """Slots were taken or given back: what was seen before no longer counts."""
        self._before = 0
