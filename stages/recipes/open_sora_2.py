"""Open-Sora 2.0's course at its published size: HunyuanVAE latents, then DC-AE from scratch.

Widths, depths, learning rates and batches as published (arXiv 2503.09642; the repository's
configs/diffusion/train); warm-up and averaging are added, and the phases end at whole numbers of
batches.
"""

from models import DCAE, DiT, HunyuanVAE, Tiling
from stages import (
    AdamW,
    AutoencoderStage,
    Bucket,
    DiffusionStage,
    Ema,
    Fresh,
    Phase,
    Plan,
    Videos,
)

M = 1_000_000
videos = Videos("clips/train.parquet")

hunyuan = DiffusionStage(
    name="hunyuan-256px",
    data=videos,
    vae=HunyuanVAE(weights="weights/hunyuan_vae.safetensors"),
    model=DiT(depth=19, depth_single=38, width=3072, heads=24, patch=2),
    init=Fresh(seed=0),
    schedule=[
        Phase(
            until=40_002_144,
            buckets=[
                Bucket("256px", frames=33, batch=2688, micro=12),
                Bucket("256px", frames=1, batch=10080, micro=45),
            ],
        ),
        Phase(until=70_000_224, buckets=[Bucket("256px", frames=129, batch=672, micro=3)]),
    ],
    optimizer=AdamW(lr=5e-5, warmup=M // 10),
    ema=Ema(halflife=M),
    workers=(8, 224),
    save_every=M // 2,
    log_every=M // 50,
    evaluate_every=5 * M,
)

dc_ae = AutoencoderStage(
    name="dc-ae",
    data=videos,
    vae=DCAE(channels=128, tiling=Tiling(frames=32, pixels=256)),  # tiles at 768 px, below
    init=Fresh(seed=1),  # every parameter new: nothing of HunyuanVAE is kept
    schedule=[Phase(until=2 * M, buckets=[Bucket("256px", frames=32, batch=64, micro=1)])],
    optimizer=AdamW(lr=5e-5, betas=(0.9, 0.98)),
    ema=Ema(halflife=10_000),
    workers=(8, 64),
    save_every=M // 20,
    log_every=M // 500,
    evaluate_every=M // 5,
)

dc_ae_768 = DiffusionStage(
    name="dc-ae-768px",
    data=videos,
    vae=dc_ae,  # the autoencoder that the stage above trained
    model=hunyuan.model.replace(patch=1),
    init=Fresh(seed=2),
    schedule=[
        Phase(until=20 * M, buckets=[Bucket("768px", frames=32, batch=1280, micro=8)]),
        Phase(until=22 * M, buckets=[Bucket("768px", frames=128, batch=320, micro=2)]),
    ],
    optimizer=AdamW(lr=3e-5, warmup=M // 10),
    ema=Ema(halflife=M),
    workers=(8, 160),  # starts with what is free, from 8 up to 160
    save_every=M // 4,
    log_every=M // 100,
    evaluate_every=2 * M,
)

plan = Plan("open-sora-2", [hunyuan, dc_ae, dc_ae_768])
