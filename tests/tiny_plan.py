"""A stage file whose whole course takes seconds: the tests run it through the command line.

`TINY_VIDEOS` names the table, `TINY_TIMES` makes the diffusion stages longer, `TINY_LR` is the
learning rate of the first stage, and of the stages there are the first `TINY_STAGES`.
"""

import os

from models import DCAE, DiT, HunyuanVAE, Pyramid, WordHash
from stages import (
    AdamW,
    Adversarial,
    Align,
    AutoencoderStage,
    Bucket,
    Continue,
    DiffusionStage,
    Ema,
    Fresh,
    Phase,
    Plan,
    Videos,
)

videos = Videos(os.environ.get("TINY_VIDEOS", "captions.csv"))
times = int(os.environ.get("TINY_TIMES", "1"))  # how much longer the diffusion stages are

hunyuan_vae = AutoencoderStage(
    name="hunyuan-vae",
    data=videos,
    vae=HunyuanVAE(widths=(4, 4, 8, 8), layers=1, norm_groups=2, channels=4),
    init=Fresh(seed=0),
    rate=8.0,
    schedule=[Phase(until=48, buckets=[Bucket("32px", frames=5, batch=4, micro=2)])],
    optimizer=AdamW(lr=float(os.environ.get("TINY_LR", "1e-3"))),
    ema=Ema(halflife=16),
    workers=(1, 3),
    save_every=16,
    log_every=4,
    evaluate_every=96,
)
hunyuan_dit = DiffusionStage(
    name="hunyuan-dit",
    data=videos,
    vae=hunyuan_vae,
    model=DiT(depth=1, depth_single=1, width=24, heads=2, patch=2),
    text=WordHash(width=16),
    init=Fresh(seed=1),
    rate=8.0,
    schedule=[
        Phase(
            until=180 * times,
            buckets=[
                Bucket("32px", frames=5, batch=5, micro=2),
                Bucket("32px", frames=1, batch=10, micro=5),
            ],
        ),
        Phase(until=300 * times, buckets=[Bucket("32px", frames=5, batch=5, micro=2)]),
    ],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=50),
    workers=(1, 3),
    save_every=60,
    log_every=15,
    evaluate_every=300,
    sample_every=100 * times,
)
dc_ae = AutoencoderStage(
    name="dc-ae",
    data=videos,
    vae=DCAE(
        channels=16,
        widths=(8, 8, 8, 16, 16, 16),
        encoder_depths=(0, 1, 1, 1, 1, 1),
        decoder_depths=(0, 1, 1, 1, 1, 1),
        head_width=8,
    ),
    init=Fresh(seed=2),
    rate=8.0,
    perceptual=Pyramid(weight=0.5),
    adversarial=Adversarial(start=16, width=8),
    schedule=[
        Phase(until=until, buckets=[Bucket("32px", frames=4, batch=4, micro=2)])
        for until in (16, 32)
    ],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=16),
    workers=(1, 3),
    save_every=16,
    log_every=4,
    evaluate_every=96,
)
dc_ae_dit = hunyuan_dit.replace(
    name="dc-ae-dit",
    vae=dc_ae,
    model=hunyuan_dit.model.replace(patch=1, rope_unit="pixel"),
    init=Align(hunyuan_dit, clips=8),
    # The longest: a node joins, and takes seconds to come up.
    schedule=[Phase(until=400 * times, buckets=[Bucket("32px", frames=4, batch=5, micro=2)])],
    sample_every=200 * times,
)
longer = dc_ae_dit.replace(
    name="longer",
    init=Continue(dc_ae_dit),
    schedule=[Phase(until=20, buckets=[Bucket("32px", frames=4, batch=5, micro=2)])],
)

stages = [hunyuan_vae, hunyuan_dit, dc_ae, dc_ae_dit, longer]
plan = Plan("tiny", stages[: int(os.environ.get("TINY_STAGES", len(stages)))])
