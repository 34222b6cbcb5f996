"""Codecs on the classes of diffusers: sizes, frame rules, values, statistics, reading back."""

import importlib.abc
import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from models import (
    DCAE,
    LTXVAE,
    Codec,
    DiT,
    HunyuanVAE,
    HunyuanVAE15,
    ImageDCAE,
    Tiling,
    Wan21VAE,
    Wan22VAE,
)
from models.codec import CodecModule
from models.fresh import fresh_parameters, named_generator
from models.published import PublishedModule
from stages import AdamW, AutoencoderStage, Bucket, DiffusionStage, Ema, Phase, Plan, Videos

SMALL: dict[str, tuple[Codec, int]] = {  # and frames that it takes
    "hunyuan-1.5": (HunyuanVAE15(channels=4, widths=(16, 16, 16, 16, 16), layers=1), 9),
    "wan-2.1": (Wan21VAE(channels=4, width=8, layers=1), 9),
    "wan-2.2": (Wan22VAE(channels=4, width=8, decoder_width=8, layers=1), 9),
    "ltx": (LTXVAE(channels=8, widths=(8, 8, 8, 8), layers=(1, 1, 1, 1, 1)), 17),
    "image-dc-ae": (
        ImageDCAE(
            channels=8,
            widths=(8, 8, 8, 16, 16, 16),
            encoder_depths=(1, 1, 1, 1, 1, 1),
            decoder_depths=(1, 1, 1, 1, 1, 1),
            head_width=8,
        ),
        1,
    ),
}
EVERY = [
    HunyuanVAE(),
    DCAE(channels=256, tiling=Tiling(frames=32, pixels=256)),
    DCAE(weights="w.safetensors", normalisation="published"),
    HunyuanVAE15(),
    Wan21VAE(normalisation="published", tiling=Tiling(frames=None, pixels=512)),
    Wan22VAE(),
    LTXVAE(weights="w.safetensors", normalisation="published"),
    ImageDCAE(),
]


def _built(codec: Codec) -> CodecModule:
    torch.manual_seed(0)
    return codec.build().eval()


def _clips(batch: int, frames: int, height: int = 32, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize(
    ("codec", "millions", "keys", "grid"),
    [
        (HunyuanVAE15(), 1260.63, 218, (5, 16, 16)),
        (Wan21VAE(), 126.89, 194, (5, 32, 32)),
        (Wan22VAE(), 704.69, 196, (5, 16, 16)),
        (LTXVAE(weights="w.safetensors"), 419.19, 190, (3, 8, 8)),
        (ImageDCAE(), 312.25, 375, None),
    ],
    ids=lambda value: value.name if isinstance(value, Codec) else "",
)
def test_default_fields_are_the_published_sizes(
    codec: Codec, millions: float, keys: int, grid: tuple[int, int, int] | None
) -> None:
    module = codec.build(device="meta")
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    assert len(module.state_dict()) == keys
    if grid is not None:
        codec.check(17, 256, 256)
        assert codec.grid(17, 256, 256) == grid


@pytest.mark.parametrize("name", SMALL)
def test_values_are_those_of_the_class_called_directly(name: str) -> None:
    codec, frames = SMALL[name]
    module = _built(codec)
    assert isinstance(module, PublishedModule)
    # A second one of the class, which holds the same weights and none of our switches.
    own = module._published[0]
    direct = type(own).from_config(own.config)
    direct.load_state_dict(module.state_dict(), strict=name != "ltx")
    x_BCTHW = _clips(1, frames)
    with torch.no_grad():
        z_BCTHW = module.encode(x_BCTHW)
        assert z_BCTHW.shape == (1, codec.channels, *codec.grid(frames, 32, 64))
        back_BCTHW = module.decode(z_BCTHW)
        assert back_BCTHW.shape == x_BCTHW.shape
        if name == "image-dc-ae":
            z_BCHW = direct.encode(x_BCTHW[:, :, 0]).latent
            assert torch.equal(z_BCTHW[:, :, 0], z_BCHW)
            assert torch.equal(back_BCTHW[:, :, 0], direct.decode(z_BCHW).sample)
            return
        assert torch.equal(z_BCTHW, direct.encode(x_BCTHW).latent_dist.mean)
        assert torch.equal(back_BCTHW, direct.decode(z_BCTHW).sample)


@pytest.mark.parametrize("name", SMALL)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    codec, frames = SMALL[name]
    module = _built(codec)
    x_BCTHW = _clips(2, frames, 32, 32)
    with torch.no_grad():
        together = module(x_BCTHW).x_BCTHW
        alone = torch.cat([module.decode(module.encode(x[None])) for x in x_BCTHW])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_a_frame_count_that_would_be_cut_is_refused(name: str) -> None:
    codec, frames = SMALL[name]
    module = _built(codec)
    for wrong in {2, 4, 8, 10, frames + 1}:
        with pytest.raises(ValueError, match=f"{codec.name}: {wrong} frames do not fit"):
            codec.check(wrong, 64, 64)
        with pytest.raises(ValueError, match=f"{wrong} frames do not fit"):
            module.encode(_clips(1, wrong, 32, 32))
    codec.check(frames, 64, 64)


def test_the_frame_rules_are_worded() -> None:
    with pytest.raises(ValueError, match=r"the rule is exactly 1 frame, and the nearest is 1$"):
        ImageDCAE().check(4, 64, 64)
    with pytest.raises(ValueError, match=r"8k\+1 frames from 1 up, and the nearest is 17$"):
        LTXVAE().check(16, 64, 64)
    assert [codec.frame_rule for codec in EVERY] == [
        "4k+1", "4k", "4k", "4k+1", "4k+1", "4k+1", "8k+1", "1"
    ]  # fmt: skip


def test_a_picture_codec_is_tiled_as_well() -> None:
    codec, _ = SMALL["image-dc-ae"]
    tiling = Tiling(frames=None, pixels=64, overlap=0.5)
    whole, tiled = _built(codec), _built(codec.replace(tiling=tiling))
    with torch.no_grad():
        z_BCTHW = tiled.encode(_clips(1, 1, 64, 160))
        assert z_BCTHW.shape == (1, 8, 1, 2, 5)
        left_BCTHW = whole.encode(_clips(1, 1, 64, 160)[..., :64])
    torch.testing.assert_close(z_BCTHW[..., :1], left_BCTHW[..., :1])


@pytest.mark.parametrize("name", SMALL)
def test_what_may_be_trained_is_what_fresh_parameters_cover(name: str) -> None:
    codec, _ = SMALL[name]
    module = codec.build(device="meta")
    if codec.is_trainable:
        assert dict(fresh_parameters(module, named_generator)).keys() == module.state_dict().keys()
        return
    with pytest.raises(LookupError, match="no rule says how it starts"):
        dict(fresh_parameters(module, named_generator))


def _training(codec: Codec, frames: int) -> AutoencoderStage:
    return AutoencoderStage(
        name="ae",
        data=Videos("none.csv"),
        vae=codec,
        schedule=[Phase(until=4, buckets=[Bucket("64px", frames=frames, batch=2)])],
        optimizer=AdamW(lr=1e-3),
        ema=Ema(halflife=1),
        save_every=1,
        log_every=1,
        evaluate_every=1,
    )


def test_a_stage_trains_only_what_has_a_start_and_measures_its_own_statistics() -> None:
    assert _training(LTXVAE(), 9).codec == LTXVAE()
    with pytest.raises(ValueError, match="'ae': vae: Wan21VAE cannot be trained here, since"):
        _training(Wan21VAE(), 9)
    with pytest.raises(ValueError, match=r"'ae': vae\.normalisation 'published': the constants"):
        _training(DCAE(normalisation="published"), 4)


@pytest.mark.parametrize("codec", EVERY, ids=lambda codec: codec.kind)
def test_a_plan_with_any_codec_goes_through_json_unchanged(codec: Codec) -> None:
    frames = codec.nearest_frames(17)
    stage = DiffusionStage(
        name="dit",
        data=Videos("none.csv"),
        vae=codec.replace(weights="w.safetensors"),
        model=DiT(depth=1, depth_single=0, width=24, heads=2, patch=1),
        schedule=[Phase(until=4, buckets=[Bucket("256px", frames=frames, batch=2)])],
        optimizer=AdamW(lr=1e-3),
        ema=Ema(halflife=1),
        save_every=1,
        log_every=1,
        evaluate_every=1,
    )
    plan = Plan("any", [stage])
    again = Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json"))))
    assert again == plan
    assert type(again.stages[0].codec) is type(codec)


def test_no_two_codecs_have_the_same_kind_or_fingerprint() -> None:
    kinds = {type(codec): codec.model_dump()["kind"] for codec in EVERY}
    assert len(set(kinds.values())) == len(kinds) == 7
    prints = [json.dumps(codec.fingerprint_fields()) for codec in EVERY]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    ("codec", "scaled"),
    [  # what the published pipelines make of a latent of 2 in the first channel
        (HunyuanVAE(), 2 * 0.476986),
        (DCAE(), 2 / 0.493),
        (HunyuanVAE15(), 2 * 1.03682),
        (Wan21VAE(), (2 + 0.7571) / 2.8184),
        (Wan22VAE(), (2 + 0.2289) / 0.4765),
        (ImageDCAE(), 2 * 0.41407),
    ],
)
def test_published_statistics_normalise_as_the_published_pipelines_do(
    codec: Codec, scaled: float
) -> None:
    mean, std = codec.replace(normalisation="published").published_statistics()
    assert len(mean) == len(std) == codec.channels
    assert min(std) > 0
    assert (2 - mean[0]) / std[0] == pytest.approx(scaled)


def test_the_statistics_of_wan_are_those_that_diffusers_holds() -> None:
    published = _built(SMALL["wan-2.1"][0])
    assert isinstance(published, PublishedModule)
    config = published._published[0].config
    mean, std = Wan21VAE().published_statistics()
    assert (list(mean), list(std)) == (config.latents_mean, config.latents_std)


def test_the_statistics_of_ltx_are_those_of_its_weight_file() -> None:
    codec = SMALL["ltx"][0].replace(weights="w.safetensors", normalisation="published")
    module = _built(codec)
    assert {"latents_mean", "latents_std"} <= module.state_dict().keys()
    module.load_state_dict(
        {**module.state_dict(), "latents_mean": torch.arange(8.0), "latents_std": torch.ones(8) * 2}
    )
    assert module.published_statistics() == (tuple(map(float, range(8))), (2.0,) * 8)
    with pytest.raises(ValueError, match="LTXVAE: normalisation 'published' without weights"):
        codec.replace(weights=None)
    with pytest.raises(ValueError, match="without weights"):
        _built(SMALL["ltx"][0]).published_statistics()


def test_a_codec_without_published_statistics_says_so() -> None:
    with pytest.raises(ValueError, match=r"DCAE: .* 256 channels: those of 128 channels are pub"):
        DCAE(channels=256, normalisation="published")
    with pytest.raises(ValueError, match=r"pixel_centre -0\.5 does not fit; .* take 0\.0"):
        Wan21VAE(pixel_centre=-0.5)


def test_an_older_diffusers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
            if name.endswith("hunyuanvideo15"):
                raise ModuleNotFoundError(name)

    module = "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"HunyuanVAE15 needs .* 'diffusers>=0\.36'"):
        HunyuanVAE15().build(device="meta")
