"""A text-to-video model of a thousand million parameters on one node of 8 GPUs.

It learns on HunyuanVAE latents at 256 px, where clips are cheap, and goes on at 512 px on latents
of the published Video DC-AE: a fifth of the tokens, the trunk kept and its patch embedding solved
for. Longer clips come last, with everything carried on.
"""

from models import DCAE, DiT, HunyuanVAE, T5Clip, Tiling
from stages import AdamW, Align, Bucket, Continue, DiffusionStage, Ema, Fresh, Phase, Plan, Videos

M = 1_000_000
videos = Videos("clips/train.parquet")

hunyuan = DiffusionStage(
    name="hunyuan-256px",
    data=videos,
    vae=HunyuanVAE(weights="weights/hunyuan_vae.safetensors", normalisation="published"),
    model=DiT(depth=6, depth_single=14, width=1536, heads=12, patch=2),
    text=T5Clip(t5="weights/t5-v1_1-xxl", clip="weights/clip-vit-large-patch14"),
    text_dropout=(0.31622777, 0.31622777),
    init=Fresh(seed=0),
    schedule=[
        Phase(
            until=8_000_000,
            buckets=[
                Bucket("256px", frames=1, batch=512, micro=32),
                Bucket("256px", frames=33, batch=128, micro=8),
            ],
        ),
        Phase(until=10_000_000, buckets=[Bucket("256px", frames=65, batch=64, micro=4)]),
    ],
    optimizer=AdamW(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup=M // 10),
    ema=Ema(halflife=M // 4),
    precision="bf16",
    recompute="full",
    workers=(1, 8),
    save_every=M // 20,
    log_every=M // 200,
    evaluate_every=M // 2,
)

dc_ae = hunyuan.replace(
    name="dc-ae-512px",
    vae=DCAE(
        channels=128,
        weights="weights/F32T4C128_AE.safetensors",
        tiling=Tiling(frames=32, pixels=256),
    ),
    model=hunyuan.model.replace(patch=1, rope_unit="pixel"),
    init=Align(hunyuan, clips=4_096, warmup_samples=M // 20),
    schedule=[Phase(until=4_000_000, buckets=[Bucket("512px", frames=32, batch=128, micro=8)])],
    optimizer=AdamW(lr=5e-5, betas=(0.9, 0.95), weight_decay=0.01, warmup=M // 20),
)

longer = dc_ae.replace(
    name="dc-ae-512px-long",
    init=Continue(dc_ae),
    schedule=[Phase(until=1_000_000, buckets=[Bucket("512px", frames=128, batch=32, micro=2)])],
    optimizer=AdamW(lr=2e-5, betas=(0.9, 0.95), weight_decay=0.01, warmup=M // 20),
)

plan = Plan("single-node-1b", [hunyuan, dc_ae, longer])
