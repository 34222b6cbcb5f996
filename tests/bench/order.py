"""The order of samples at 10^6 to 10^9 of them: seconds and bytes, against a shuffled index.

Ours is a function of the position (elastic.data.order): of that function alone is measured the time
to the first batch, to a batch in the middle of an epoch (a seek), and of one batch after another;
and the bytes of what has to be kept to go on. The peer is an index array, shuffled once an epoch,
as DistributedSampler, torch.randperm and most loaders keep it: it is made again after a restart.
"""

import argparse
import json
import pickle
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figure import record
from tiny import STAGE

from elastic.data.order import batch_at
from stages import Bucket, Phase

BATCH = 256
SIZES = (10**6, 10**7, 10**8, 10**9)
MOST_OPEN_S, MOST_BATCH_S, MOST_BYTES = 0.05, 0.002, 4096


def timed(work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


def ours(size: int, times: int) -> dict[str, Any]:
    """The function of the position."""
    bucket = Bucket("32px", frames=1, batch=BATCH, micro=BATCH)
    budget = size // BATCH * BATCH * 4
    stage = STAGE.replace(schedule=[Phase(until=budget, buckets=[bucket])])
    counts = {bucket.name: size}
    middle = budget // 2 // BATCH * BATCH
    tracemalloc.start()
    opened = timed(lambda: batch_at(stage, 0, counts), 1)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seek = timed(lambda: batch_at(stage, middle, counts), 1)[0]
    positions = iter(range(0, budget, BATCH))
    batch = timed(lambda: batch_at(stage, next(positions), counts), times)
    return {
        "open_s": round(opened, 6),
        "seek_s": round(seek, 6),
        "batch_us": round(statistics.median(batch) * 1e6, 1),
        "batch_us_p99": round(sorted(batch)[int(len(batch) * 0.99)] * 1e6, 1),
        "state_bytes": len(pickle.dumps(middle)),
        "peak_bytes": peak,
    }


def shuffled(size: int, times: int) -> dict[str, Any]:
    """An index array, shuffled."""
    began = time.perf_counter()
    index = np.arange(size, dtype=np.uint32 if size < 2**32 else np.uint64)
    np.random.default_rng(0).shuffle(index)
    index[:BATCH].copy()
    opened = time.perf_counter() - began
    places = iter(range(0, size, BATCH))

    def draw() -> object:
        at = next(places)
        return index[at : at + BATCH].astype(np.int64)

    batch = timed(draw, times)
    return {
        "open_s": round(opened, 3),
        "seek_s": round(opened, 3),  # after a restart it is made again
        "batch_us": round(statistics.median(batch) * 1e6, 1),
        "state_bytes": index.nbytes,
        "peak_bytes": index.nbytes,
    }


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="up to 10^7")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    ours(10**4, 100)  # imports, and what numpy makes once
    for size in SIZES[:2] if asked.quick else SIZES:
        figures[f"{size:.0e}"] = {"ours": ours(size, 2000), "shuffled": shuffled(size, 2000)}
        print(json.dumps({f"{size:.0e}": figures[f"{size:.0e}"]}), flush=True)
    found = [rows["ours"] for rows in figures.values()]
    record(
        "order",
        figures=figures,
        goal=(
            f"at any size: open and seek within {MOST_OPEN_S * 1e3:.0f} ms, a batch of {BATCH} "
            f"within {MOST_BATCH_S * 1e3:.0f} ms at the median, state within {MOST_BYTES} bytes"
        ),
        holds=all(
            each["open_s"] <= MOST_OPEN_S
            and each["seek_s"] <= MOST_OPEN_S
            and each["batch_us"] <= MOST_BATCH_S * 1e6
            and each["state_bytes"] <= MOST_BYTES
            for each in found
        ),
        keep=not asked.quick,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
