"""The share of a training step that waits for data: real latents and text, steps of 50 ms.

The loop's own stream reads a latent store and draws the noise: clips of 256 px and 129 frames of
HunyuanVAE (1.1 MB as bf16) with text of up to 120 tokens of width 4096 (1 MB), eight a step.
The step either leaves the processor alone, as one on a GPU does while it computes (`sleeping`), or
holds Python's lock all the time, as one that launches kernels may at worst (`busy`). The goal is
for `sleeping`. Measured is the time in `Stream.step` over time in all, as `data_wait` in a log is.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figure import record
from tiny import STAGE, world_of_one

from elastic.data.assign import held_out_name
from elastic.data.load import Stream
from elastic.data.sealed import SealedStore
from elastic.data.sources import LatentSource
from elastic.data.store import BucketPlan, LatentStore, Sample, StoreSchema
from elastic.objective import FlowMatching
from models import DiT, HunyuanVAE, WordHash
from stages import Bucket, DiffusionStage, Phase

STEP_S, BATCH, CLIPS, TOKENS, WIDTH = 0.05, 8, 192, 120, 4096
WARM_UPS, MOST = 10, 0.01


def bench_stage(steps: int) -> DiffusionStage:
    """A stage that reads these latents for so many steps."""
    bucket = Bucket("256px", frames=129, batch=BATCH, micro=BATCH)
    return STAGE.replace(
        vae=HunyuanVAE(weights="weights.safetensors"),
        model=DiT(depth=1, depth_single=0, width=16, heads=1, patch=2),
        text=WordHash(width=WIDTH),
        schedule=[Phase(until=BATCH * steps, buckets=[bucket])],
        optimizer=STAGE.optimizer.replace(warmup=0),
    )


def write_store(root: Path, stage: DiffusionStage) -> SealedStore:
    """Random latents and texts, as an encoding leaves them."""
    (bucket,) = stage.buckets
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    shape = (stage.codec.stored_channels, *grid)
    schema = StoreSchema(
        fingerprint="bench",
        buckets=(
            BucketPlan(name=bucket.name, shape=shape, sample_ids=tuple(range(CLIPS))),
            BucketPlan(name=held_out_name(bucket), shape=shape, sample_ids=(CLIPS,)),
        ),
        samples_per_shard=16,
        text_tokens=TOKENS,
        text_width=WIDTH,
        pooled_width=WIDTH,
    )
    store, made = LatentStore.create(root, schema), torch.Generator().manual_seed(0)
    for shard in store.missing():
        samples = [
            Sample(
                number,
                torch.randn(shape, generator=made).bfloat16(),
                torch.randn(20 + number * 7 % (TOKENS - 19), WIDTH, generator=made).bfloat16(),
                torch.randn(WIDTH, generator=made).bfloat16(),
            )
            for number in store.planned(shard)
        ]
        store.write_shard(*shard, samples)
    store.publish_null_text(stage.text.null())
    return SealedStore.open(root, "bench", store.seal())


def sleeping() -> None:
    """A step that leaves the processor alone."""
    time.sleep(STEP_S)


def busy() -> None:
    """A step that holds Python's lock."""
    end = time.perf_counter() + STEP_S
    while time.perf_counter() < end:
        pass


def share_waited(
    store: SealedStore, stage: DiffusionStage, steps: int, step: Callable[[], None]
) -> float:
    """Of so many steps, after those in which the reader gets ahead."""
    source = LatentSource(stage, store, held_out=False)
    with world_of_one() as world:
        goal = FlowMatching(stage, source, source, source.null_text())
        ready = partial(goal.inputs, device=world.device)
        stream = Stream(stage, source, world, 0, ready)
        waited = began = 0.0
        for number in range(steps):
            if number == WARM_UPS:
                waited, began = 0.0, time.perf_counter()
            asked = time.perf_counter()
            given = stream.step(number * BATCH)
            waited += time.perf_counter() - asked
            step()
            del given  # as a loop lets go of it: not while it waits
        total = time.perf_counter() - began
        stream.close()
    return waited / total


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of few steps")
    asked = parser.parse_args()
    rounds, steps = (1, 30) if asked.quick else (5, 110)
    torch.set_num_threads(1)
    shares: dict[str, list[float]] = {"sleeping": [], "busy": []}
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as folder:
        stage = bench_stage(steps)
        store = write_store(Path(folder), stage)
        for _ in range(rounds):
            for name, step in (("sleeping", sleeping), ("busy", busy)):
                shares[name].append(share_waited(store, stage, steps, step))
                print(json.dumps({name: shares[name][-1]}), flush=True)
    figures = {
        name: {
            "median": round(statistics.median(found), 5),
            "range": [round(min(found), 5), round(max(found), 5)],
        }
        for name, found in shares.items()
    }
    record(
        "loader",
        figures={**figures, "step_s": STEP_S, "clips_a_step": BATCH},
        goal=f"at the median at most {MOST:.0%} of a step of 50 ms waits for data",
        holds=figures["sleeping"]["median"] <= MOST,
        keep=not asked.quick,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
