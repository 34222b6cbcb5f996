"""Which source each place of a bucket's stream belongs to, and how far that source has come.

Along the stream each source gets its share, to within a sample or two of it anywhere: its count is
the share rounded, of what the sources before it leave. Inside of blocks the places are shuffled,
so that no rank is dealt one source alone. All of it is arithmetic: O(1) for any place.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic.data.permutation import Indices, mix64
from models.fresh import named_seed

BLOCK = 16
_FINEST = 2**30  # of a share's denominator, so that products of two stay inside of 63 bits


class Dealt(NamedTuple):
    """The source of each place, and which of that source's samples it is, counted from 0."""

    source: Indices
    rank: Indices


def deal_sources(shares: Sequence[Fraction], first: int, count: int, *key: str | int) -> Dealt:
    """The sources of `count` places of the stream from `first` on."""
    start, end = first // BLOCK * BLOCK, -(-(first + count) // BLOCK) * BLOCK
    places = np.arange(start, end)
    draws = mix64(places.astype(np.uint64) + np.uint64(named_seed("mix", *key)))
    order = np.argsort(draws.reshape(-1, BLOCK), axis=1, kind="stable")
    sources = _in_turn(shares, places).reshape(-1, BLOCK)
    source = np.take_along_axis(sources, order, axis=1).reshape(-1)
    rank = np.empty_like(source)
    for number, before in enumerate(_before(shares, np.array([start]))):
        here = source == number
        rank[here] = before[0] + np.arange(np.count_nonzero(here))
    asked = slice(first - start, first - start + count)
    return Dealt(source[asked], rank[asked])


def used_before(shares: Sequence[Fraction], place: int, *key: str | int) -> list[int]:
    """How many samples of each source come before a place of the stream."""
    start = place // BLOCK * BLOCK
    source = deal_sources(shares, start, place - start, *key).source
    inside = np.bincount(source, minlength=len(shares))
    return [
        int(before[0] + more)
        for before, more in zip(_before(shares, np.array([start])), inside, strict=True)
    ]


def quotas(shares: Sequence[Fraction], sizes: Sequence[int], most: int) -> list[int]:
    """Up to `most` samples by their shares; what a source lacks is taken from the others."""
    taken = [0] * len(sizes)
    while (left := min(most, sum(sizes)) - sum(taken)) > 0:
        # Of those that have more; at least one of them is given one.
        more = [number for number, size in enumerate(sizes) if taken[number] < size]
        total = sum(shares[number] for number in more)
        dealt = _before([shares[number] / total for number in more], np.array([left]))
        for number, wanted in zip(more, dealt, strict=True):
            taken[number] = min(sizes[number], taken[number] + int(wanted[0]))
    return taken


def _in_turn(shares: Sequence[Fraction], places: Indices) -> Indices:
    """The source of each place before blocks are shuffled."""
    source = np.empty_like(places)
    where, left = np.arange(len(places)), places
    for number, share in enumerate(_of_the_rest(shares)):
        taken = _rounded(share, left)
        is_mine = _rounded(share, left + 1) > taken
        source[where[is_mine]] = number
        where, left = where[~is_mine], (left - taken)[~is_mine]
    return source


def _before(shares: Sequence[Fraction], places: Indices) -> list[Indices]:
    """How many places of each source come before each of the places, unless blocks are shuffled."""
    found, left = [], places
    for share in _of_the_rest(shares):
        found.append(_rounded(share, left))
        left = left - found[-1]
    return found


def _of_the_rest(shares: Sequence[Fraction]) -> list[Fraction]:
    """The share of each source in what is left by those before it; the last has all of that."""
    rest, found = Fraction(1), []
    for share in shares[:-1]:
        found.append((share / rest).limit_denominator(_FINEST))
        rest -= share
    return [*found, Fraction(1)]


def _rounded(share: Fraction, count: NDArray[np.int64]) -> NDArray[np.int64]:
    """The nearest whole number to a share of a count, halves up; exact for any count."""
    over, under = share.numerator, share.denominator
    whole, part = np.divmod(count, under)
    nearest: NDArray[np.int64] = whole * over + (2 * over * part + under) // (2 * under)
    return nearest
