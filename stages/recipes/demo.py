"""Open-Sora 2.0's course for a laptop: learn on HunyuanVAE latents, then start over on DC-AE.

The architectures and the ratios are the published ones, the widths are small: the deep-compression
codec leaves a quarter of the tokens, with more channels, patch 2 becomes patch 1.
"""

from models import DCAE, DiT, HunyuanVAE
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


def course(videos: Videos) -> Plan:
    """The four stages on some videos."""
    hunyuan_vae = AutoencoderStage(
        name="hunyuan-vae",
        data=videos,
        vae=HunyuanVAE(
            channels=16, widths=(16, 16, 32, 32), layers=1, norm_groups=4, pixel_centre=-0.78
        ),
        kl_weight=0.0,
        init=Fresh(seed=0),
        rate=24.0,
        schedule=[  # stills, then clips
            Phase(until=4_800, buckets=[Bucket("32px", frames=1, batch=16, micro=8)]),
            Phase(until=5_600, buckets=[Bucket("32px", frames=9, batch=8, micro=4)]),
        ],
        optimizer=Muon(
            lr=1.5e-3, betas=(0.9, 0.95), matrix_lr=0.007, momentum=0.8, warmup=160, decay=2_000
        ),
        ema=Ema(halflife=100, rampup=0.03),
        workers=(1, 3),
        save_every=1_000,
        log_every=125,
        evaluate_every=2_000,
    )
    hunyuan_dit = DiffusionStage(
        name="hunyuan-dit",
        data=videos,
        vae=hunyuan_vae,
        model=DiT(depth=2, depth_single=2, width=96, heads=4, patch=2),
        init=Fresh(seed=1),
        rate=24.0,
        schedule=[  # clips and stills together, then clips alone
            Phase(
                until=3_000,
                buckets=[
                    Bucket("32px", frames=17, batch=16, micro=8),
                    Bucket("32px", frames=1, batch=24, micro=12),
                ],
            ),
            Phase(until=11_000, buckets=[Bucket("32px", frames=17, batch=16, micro=8)]),
        ],
        optimizer=AdamW(lr=3e-3, betas=(0.9, 0.99), warmup=500, decay=4_000),
        ema=Ema(halflife=500),
        workers=(1, 3),
        save_every=500,
        log_every=125,
        evaluate_every=4_000,
        sample_every=4_000,
    )
    dc_ae = AutoencoderStage(
        name="dc-ae",
        data=videos,
        vae=DCAE(
            channels=128,
            widths=(16, 16, 16, 32, 64, 128),
            encoder_depths=(0, 1, 1, 1, 1, 1),
            decoder_depths=(0, 1, 1, 1, 1, 1),
            head_width=16,
            pixel_centre=-0.78,
        ),
        kl_weight=0.0,
        init=Fresh(seed=2),  # every parameter new: nothing of HunyuanVAE is kept
        rate=12.0,
        schedule=[
            Phase(until=1_600, buckets=[Bucket("32px", frames=4, batch=8, micro=4)]),
            Phase(until=2_400, buckets=[Bucket("32px", frames=8, batch=8, micro=4)]),
        ],
        optimizer=Muon(
            lr=1.5e-3, betas=(0.9, 0.95), matrix_lr=0.005, momentum=0.8, warmup=80, decay=1_500
        ),
        ema=Ema(halflife=50, rampup=0.03),
        workers=(1, 3),
        save_every=250,
        log_every=50,
        evaluate_every=800,
    )
    dc_ae_dit = hunyuan_dit.replace(
        name="dc-ae-dit",
        vae=dc_ae,
        model=hunyuan_dit.model.replace(patch=1),
        init=Fresh(seed=3),  # the DiT starts over too
        rate=12.0,  # clips of twice the time, for a fifth of the tokens
        schedule=[Phase(until=12_000, buckets=[Bucket("32px", frames=16, batch=16, micro=4)])],
    )
    return Plan("demo", [hunyuan_vae, hunyuan_dit, dc_ae, dc_ae_dit])


plan = course(Videos("runs/demo-videos/captions.csv"))
