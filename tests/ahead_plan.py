"""Two stages with published weights, so that the second can be encoded while the first trains.

`AHEAD_VIDEOS` names the table, `AHEAD_WEIGHTS` the file of the codec.
"""

import os

from encode_plan import CODEC

from models import DiT, WordHash
from stages import AdamW, Bucket, DiffusionStage, Ema, Phase, Plan, Videos

first = DiffusionStage(
    name="first",
    data=Videos(os.environ.get("AHEAD_VIDEOS", "captions.csv")),
    vae=CODEC.replace(weights=os.environ.get("AHEAD_WEIGHTS", "codec.safetensors")),
    model=DiT(depth=1, depth_single=1, width=24, heads=2, patch=1),
    text=WordHash(width=16),
    rate=8.0,
    schedule=[Phase(until=400, buckets=[Bucket("32px", frames=4, batch=4)])],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=50),
    workers=(1, 1),
    save_every=200,
    log_every=40,
    evaluate_every=400,
)
second = first.replace(
    name="second",
    schedule=[Phase(until=80, buckets=[Bucket("64px", frames=8, batch=4)])],
    save_every=80,
    log_every=20,
    evaluate_every=80,
)
plan = Plan("ahead", stages=[first, second])
