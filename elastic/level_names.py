"""What losses by level of noise are called, in journals, charts and Aim."""

import re
from collections.abc import Sequence
from typing import NamedTuple

NUM_LEVELS = 8
CENTRES = tuple((2 * level + 1) / (2 * NUM_LEVELS) for level in range(NUM_LEVELS))
"""The times that stand for the levels: each is 1/8 wide, from 0 (data) to 1 (noise)."""


class Named(NamedTuple):
    """A value of one level, and what all levels of it are called together."""

    together: str
    t: str  # as text that sorts like the number


def name_of(what: str, level: int) -> str:
    """The name of a value of one level in a line of metrics."""
    return f"{what}_t{level}"


def parted(name: str) -> Named | None:
    """What the name of a value says of its level; None if it has none."""
    found = re.fullmatch(rf"(\w+)_t([0-{NUM_LEVELS - 1}])", name)
    return found and Named(f"{found[1]}_by_t", text_of(int(found[2])))


def text_of(level: int) -> str:
    """The time that stands for a level."""
    return f"{CENTRES[level]:.4f}"


def level_means(sums: Sequence[float]) -> dict[str, float]:
    """The mean losses of sums of losses, then of weights; a level without samples has none."""
    losses, weights = sums[:NUM_LEVELS], sums[NUM_LEVELS:]
    pairs = enumerate(zip(losses, weights, strict=True))
    return {name_of("loss", level): loss / weight for level, (loss, weight) in pairs if weight}


def level_counts(sums: Sequence[float]) -> dict[str, float]:
    """How many samples each level had, of the same sums; a level without any is left out."""
    weights = enumerate(sums[NUM_LEVELS:])
    return {name_of("samples", level): weight for level, weight in weights if weight}
