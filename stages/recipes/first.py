"""The smallest course on clips of your own: minutes on a laptop. Copy it, and change what you like.

    python -m elastic plan first.py
    python -m elastic train first.py --cpus 2

`clips/` is a folder beside which the command is given: NAME.mp4 with its caption in NAME.txt.
"""

from models import DiT, HunyuanVAE
from stages import (
    AdamW,
    AutoencoderStage,
    Bucket,
    DiffusionStage,
    Ema,
    Fresh,
    Muon,
    Phase,
    Plan,
    Videos,
)

videos = Videos("clips/")
# Of each clip a square of 32 px: scaled until it covers that, and cut in the middle.
still = Bucket("32px", frames=1, batch=16, micro=8)
clip = Bucket("32px", frames=9, batch=8, micro=4)  # 4k + 1 frames, at `rate` frames a second

vae = AutoencoderStage(
    name="vae",
    data=videos,
    vae=HunyuanVAE(channels=16, widths=(16, 16, 32, 32), layers=1, norm_groups=4),
    kl_weight=0.0,
    init=Fresh(seed=0),
    rate=24.0,
    # `until` counts samples from the stage's start, in every phase: whole rounds of its batches.
    schedule=[Phase(until=4_800, buckets=[still]), Phase(until=5_600, buckets=[clip])],
    optimizer=Muon(lr=1.5e-3, betas=(0.9, 0.95), matrix_lr=0.007, momentum=0.8, warmup=160),
    ema=Ema(halflife=100),
    workers=(1, 2),  # the most that its batches are worth: `plan` says what more would compute
    save_every=1_000,
    log_every=200,
    evaluate_every=2_800,  # PSNR of clips that were held out: below 20 dB a DiT learns a blur
)
dit = DiffusionStage(
    name="dit",
    data=videos,
    vae=vae,  # reads the latents of what was trained above
    model=DiT(depth=2, depth_single=2, width=96, heads=4, patch=2),
    init=Fresh(seed=1),
    rate=24.0,
    schedule=[Phase(until=6_000, buckets=[clip.replace(batch=16, micro=8)])],
    optimizer=AdamW(lr=3e-3, warmup=500, decay=2_000),
    ema=Ema(halflife=300),
    workers=(1, 2),
    save_every=1_000,
    log_every=200,
    evaluate_every=3_000,
    sample_every=3_000,
)
plan = Plan("first", [vae, dit])
