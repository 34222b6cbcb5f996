"""A stage whose latents are encoded with published weights: `tests/bench/encode.py` kills it.

`ENCODE_VIDEOS` names the table, `ENCODE_WEIGHTS` the file of the codec.
"""

import os

from models import DCAE, DiT, WordHash
from stages import AdamW, Bucket, DiffusionStage, Ema, Phase, Plan, Videos

CODEC = DCAE(
    channels=16,
    widths=(8, 8, 16, 16, 32, 32),
    encoder_depths=(0, 1, 1, 1, 1, 1),
    decoder_depths=(0, 1, 1, 1, 1, 1),
    head_width=8,
    weights=os.environ.get("ENCODE_WEIGHTS", "codec.safetensors"),
)
BUCKET = Bucket("64px", frames=16, batch=8)
stage = DiffusionStage(
    name="dit",
    data=Videos(os.environ.get("ENCODE_VIDEOS", "captions.csv")),
    vae=CODEC,
    model=DiT(depth=1, depth_single=1, width=24, heads=2, patch=1),
    text=WordHash(width=16),
    rate=8.0,
    schedule=[Phase(until=80, buckets=[BUCKET])],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=50),
    workers=(1, 2),
    save_every=80,
    log_every=80,
    evaluate_every=80,
)
plan = Plan("encode", stages=[stage])
