"""Open-Sora 2.0's course at its published size: three stages on HunyuanVAE, then DC-AE.

Widths, rates, buckets and batches as published (arXiv 2503.09642, tables 2 and 3 and 4.3.3; the
repository's configs/diffusion/train and configs/vae/train), at the published number of GPUs. Where
this departs from them:

- one bucket for each published band of lengths, of its longest clips, instead of one for every four
  frames; pictures of 768 and 1024 px are left out, as are those of the DC-AE stages (4k frames);
- 256 px clips are not mixed into the 768 px stage;
- averages are on, and rates warm up; eps is 1e-8, not 1e-15;
- text is as long as it is, and its padding is never attended;
- the autoencoder loses squared error beside absolute error;
- the last stage starts from fresh parameters, as the published configuration and the maintainers
  say (hpcaitech/Open-Sora issue 828); the paper keeps the trunk: `KeepTrunk(hunyuan_768)`, and
  `Align(hunyuan_768)` solves for the new patch embedding besides.
"""

from models import DCAE, DiT, HunyuanVAE, Lpips, T5Clip, Tiling
from stages import (
    AdamW,
    Adversarial,
    AutoencoderStage,
    Bucket,
    Continue,
    DiffusionStage,
    Ema,
    Fresh,
    FromFile,
    Given,
    Phase,
    Plan,
    Videos,
)

M = 1_000_000
videos = Videos("clips/train.parquet")

hunyuan_t2v = DiffusionStage(
    name="hunyuan-256px-t2v",
    data=videos,
    vae=HunyuanVAE(
        weights="weights/hunyuan_vae.safetensors", normalisation="published", posterior="sample"
    ),
    model=DiT(depth=19, depth_single=38, width=3072, heads=24, patch=2),
    text=T5Clip(t5="weights/t5-v1_1-xxl", clip="weights/clip-vit-large-patch14"),
    text_dropout=(0.31622777, 0.31622777),
    init=FromFile(
        "weights/flux1-dev-fused-rope.safetensors", rotary="half-split", drop=("guidance_in.*",)
    ),
    schedule=[  # 85K iterations on 224 GPUs
        Phase(
            until=69_995_520,
            buckets=[
                Bucket("256px", frames=1, batch=10_080, micro=45),
                Bucket("256px", frames=33, batch=2_688, micro=12),
                Bucket("256px", frames=65, batch=1_344, micro=6),
                Bucket("256px", frames=97, batch=896, micro=4),
                Bucket("256px", frames=129, batch=672, micro=3),
            ],
        ),
    ],
    optimizer=AdamW(lr=5e-5, warmup=M // 10),
    ema=Ema(halflife=M),
    precision="bf16",
    recompute="full",
    workers=(32, 224),
    save_every=M // 2,
    log_every=M // 50,
    evaluate_every=5 * M,
)

hunyuan_i2v = hunyuan_t2v.replace(
    name="hunyuan-256px-i2v",
    model=hunyuan_t2v.model.replace(image_condition=True),
    given=Given(none=1, head=5, loop=1, tail=1),
    init=Continue(hunyuan_t2v, optimizer="reset"),
    schedule=[  # 13K iterations on 192 GPUs
        Phase(
            until=9_999_360,
            buckets=[
                Bucket("256px", frames=1, batch=8_640, micro=45),
                Bucket("256px", frames=33, batch=2_304, micro=12),
                Bucket("256px", frames=65, batch=1_152, micro=6),
                Bucket("256px", frames=97, batch=768, micro=4),
                Bucket("256px", frames=129, batch=576, micro=3),
            ],
        ),
    ],
    optimizer=AdamW(lr=1e-5, warmup=M // 10),
    workers=(32, 192),
    evaluate_every=M,
)

hunyuan_768 = hunyuan_i2v.replace(
    name="hunyuan-768px",
    init=Continue(hunyuan_i2v, optimizer="reset"),
    schedule=[  # 13K iterations on 192 GPUs, of which each 4 share the tokens of their samples
        Phase(
            until=4_997_280,
            buckets=[
                Bucket("768px", frames=1, batch=1_824, micro=38),
                Bucket("768px", frames=33, batch=480, micro=10),
                Bucket("768px", frames=65, batch=240, micro=5),
                Bucket("768px", frames=97, batch=144, micro=3),
                Bucket("768px", frames=129, batch=96, micro=2),
            ],
        ),
    ],
    optimizer=AdamW(lr=1e-5, warmup=M // 10),
    workers=(32, 192),
    context=4,
    save_every=M // 10,
)

dc_ae = AutoencoderStage(
    name="dc-ae",
    data=videos,
    vae=DCAE(channels=128, tiling=Tiling(frames=32, pixels=256)),  # tiles at 768 px, below
    init=Fresh(seed=1),  # every parameter new: nothing of HunyuanVAE is kept
    kl_weight=0.0,
    perceptual=Lpips(weights="weights/lpips_vgg16.safetensors", weight=0.5),
    adversarial=Adversarial(start=2 * M, weight=0.05, lr=1e-4),
    schedule=[  # 250K and 200K iterations of 8 clips
        Phase(until=2 * M, buckets=[Bucket("256px", frames=32, batch=8, micro=1)]),
        Phase(until=3_600_000, buckets=[Bucket("256px", frames=32, batch=8, micro=1)]),
    ],
    optimizer=AdamW(lr=5e-5, betas=(0.9, 0.98)),
    recompute="full",
    ema=Ema(halflife=550),  # the published average keeps 0.99 of itself in every update of 8
    workers=(8, 8),
    save_every=M // 20,
    log_every=M // 500,
    evaluate_every=M // 5,
)

dc_ae_768 = hunyuan_768.replace(
    name="dc-ae-768px",
    vae=dc_ae,  # the autoencoder that the stage above trained
    model=hunyuan_768.model.replace(patch=1),
    given=Given(none=1, head=7, loop=0, tail=0),
    init=Fresh(seed=2),
    schedule=[  # 17K iterations of up to 33 frames, 8K of up to 128, on 160 GPUs
        Phase(until=20 * M, buckets=[Bucket("768px", frames=32, batch=1_280, micro=8)]),
        Phase(
            until=21_998_720,
            buckets=[
                Bucket("768px", frames=64, batch=640, micro=4),
                Bucket("768px", frames=96, batch=480, micro=3),
                Bucket("768px", frames=128, batch=320, micro=2),
            ],
        ),
    ],
    optimizer=AdamW(lr=3e-5, warmup=M // 10),
    workers=(8, 160),  # starts with what is free, from 8 up to 160
    context=1,
    save_every=M // 4,
    evaluate_every=2 * M,
)

plan = Plan("open-sora-2", [hunyuan_t2v, hunyuan_i2v, hunyuan_768, dc_ae, dc_ae_768])
