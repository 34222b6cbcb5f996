"""How a batch is dealt to the ranks: so many rounds, alike on all of them. Imports no torch."""


def num_rounds(batch: int, micro: int, workers: int) -> int:
    """Rounds that every worker runs in an update, filler rounds included."""
    return -(-batch // (micro * workers))


def round_sizes(batch: int, micro: int, workers: int, exact: bool) -> list[int]:
    """Samples that every worker computes in each round of an update, filler included.

    As few as there can be in rounds of at most `micro`, and one apart: the longest texts come
    first, to the smaller rounds. Micro-batches of an exact stage decide how sums are rounded, so
    these are `micro` on any world.
    """
    rounds = num_rounds(batch, micro, workers)
    if exact:
        return [micro] * rounds
    most = -(-batch // workers)
    return [(most + turn) // rounds for turn in range(rounds)]


def deal(
    batch: int, micro: int, rank: int, world: int, exact: bool = False
) -> list[tuple[list[int], int]]:
    """This rank's rounds: offsets into the batch, as many on every rank, and how many count.

    The batch is cut in its order, round by round and rank by rank. What is missing at its end is
    filled with its last sample, with weight 0.
    """
    rounds, first = [], 0
    for size in round_sizes(batch, micro, world, exact):
        begin = first + rank * size
        offsets = [min(offset, batch - 1) for offset in range(begin, begin + size)]
        rounds.append((offsets, min(max(batch - begin, 0), size)))
        first += world * size
    return rounds
