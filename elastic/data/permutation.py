"""Keyed bijections of [0, n) for any n, O(1) in time and memory.

A Feistel network over a grid of about sqrt(n) x sqrt(n) with cycle walking; after six half-rounds
its serial pairs pass a chi-square test (four would do; two fail).
"""

import math

import numpy as np
from numpy.typing import NDArray

from models.fresh import named_seed
from stages.schedule import Windows

_HALF_ROUNDS = 6
Indices = NDArray[np.int64]


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Another number for each number, with nothing to be seen of it."""
    # Finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): full avalanche in three rounds.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A keyed bijection of [0, size)."""

    def __init__(self, size: int, *key: str | int) -> None:
        assert size > 0, f"cannot permute {size} elements"
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._keys = [np.uint64(named_seed(*key, r)) for r in range(_HALF_ROUNDS)]

    def __call__(self, index: Indices) -> Indices:
        """Where each of the given indices goes."""
        out = self._round_trip(np.asarray(index, dtype=np.uint64))
        # The grid holds fewer than sqrt(n) cells too many: walk those on until they land inside.
        while (outside := out >= self.size).any():
            out[outside] = self._round_trip(out[outside])
        return out.astype(np.int64)

    def _round_trip(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left, right = np.divmod(x, columns)
        with np.errstate(over="ignore"):
            for turn, key in enumerate(self._keys):
                if turn % 2:
                    right = (right + mix64(left + key) % columns) % columns
                else:
                    left = (left + mix64(right + key) % rows) % rows
        return np.asarray(left * columns + right)


class WindowedPermutation:
    """A keyed bijection of [0, size) that keeps neighbours near one another.

    Runs of places side by side are permuted, and then the places of `mixed` runs at a time. The
    last run may reach beyond the size: places there are walked on until they land inside, which
    sends less than a run of samples somewhere else.
    """

    def __init__(self, size: int, windows: Windows, *key: str | int) -> None:
        assert size > 0, f"cannot permute {size} elements"
        self.size = size
        self._run = min(windows.run, size)
        self._num_runs = -(-size // self._run)
        self._mixed = windows.mixed
        self._runs = Permutation(self._num_runs, *key, "runs")
        self._key = key

    def __call__(self, index: Indices) -> Indices:
        """Where each of the given indices goes."""
        out = self._place(np.asarray(index, dtype=np.int64))
        while (outside := out >= self.size).any():
            out[outside] = self._place(out[outside])
        return out

    def _place(self, x: Indices) -> Indices:
        window_size = self._mixed * self._run
        windows, within = np.divmod(x, window_size)
        out = np.empty_like(x)
        for window in np.unique(windows):
            here = windows == window
            first = int(window) * self._mixed
            num_runs = min(self._mixed, self._num_runs - first)
            mix = Permutation(num_runs * self._run, *self._key, "window", int(window))
            runs, offsets = np.divmod(mix(within[here]), self._run)
            out[here] = self._runs(first + runs) * self._run + offsets
        return out
