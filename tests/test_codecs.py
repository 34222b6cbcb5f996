"""The autoencoders: shapes, published key layouts, which clips they take, and the loss."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.codec import Codec, CodecModule, Reconstruction
from models.dc_ae import DCAE, _LiteMLA
from models.fresh import fresh_parameters, named_generator
from models.hunyuan_vae import HunyuanVAE
from models.reconstruction import psnr_B, reconstruction_loss
from models.tiling import Tiling

SMALL_HUNYUAN = HunyuanVAE(widths=(8, 8, 16, 16), layers=1, norm_groups=4)
SMALL_DCAE = DCAE(
    channels=32,
    widths=(8, 8, 16, 16, 32, 32),
    encoder_depths=(1, 1, 1, 1, 1, 1),
    decoder_depths=(1, 1, 1, 1, 1, 1),
    head_width=8,
)
STEM_DCAE = SMALL_DCAE.replace(encoder_depths=(0, 1, 1, 1, 1, 1), decoder_depths=(0, 1, 1, 1, 1, 1))
SMALL = [
    pytest.param(SMALL_HUNYUAN, 9, id="hunyuan"),
    pytest.param(SMALL_DCAE, 8, id="dc-ae"),
    pytest.param(STEM_DCAE, 8, id="dc-ae-stem"),
]


def clips(batch: int, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def built(codec: Codec) -> CodecModule:
    torch.manual_seed(0)
    return codec.build()


def num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_hunyuan_vae_has_the_published_layout() -> None:
    module = HunyuanVAE().build(device="meta")
    keys = set(module.state_dict())
    assert len(keys) == 248
    assert num_params(module) == 246_478_803
    assert {key.split(".")[0] for key in keys} == {
        "encoder",
        "decoder",
        "quant_conv",
        "post_quant_conv",
    }


def test_dc_ae_has_the_published_layout() -> None:
    module = DCAE().build(device="meta")
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert len(shapes) == 339
    assert num_params(module) == 459_462_147
    assert num_params(module.get_submodule("encoder")) == 220_439_936
    assert shapes["encoder.project_in.conv.weight"] == (128, 3, 3, 3, 3)
    assert shapes["encoder.stages.0.op_list.0.main.conv1.conv.weight"] == (128, 128, 3, 3, 3)
    attention = "decoder.stages.5.op_list.0.context_module.main."
    assert shapes[attention + "qkv.conv.weight"] == (3072, 1024, 1, 1, 1)
    assert shapes[attention + "aggreg.0.0.weight"] == (3072, 1, 5, 5, 5)
    feed_forward = "encoder.stages.3.op_list.0.local_module.main."
    assert shapes[feed_forward + "inverted_conv.conv.weight"] == (4096, 512, 1, 1, 1)
    assert shapes[feed_forward + "depth_conv.conv.bias"] == (4096,)
    assert shapes[feed_forward + "point_conv.norm.weight"] == (512,)


def test_dc_ae_comes_with_256_channels_as_well() -> None:
    module, usual = DCAE(channels=256).build(device="meta"), DCAE().build(device="meta")
    assert module.state_dict().keys() == usual.state_dict().keys()
    differing = {
        name for name, value in module.state_dict().items()
        if value.shape != usual.state_dict()[name].shape
    }  # fmt: skip
    assert differing == {
        "encoder.project_out.main.op_list.0.conv.weight",
        "encoder.project_out.main.op_list.0.conv.bias",
        "decoder.project_in.main.conv.weight",
    }
    assert DCAE(channels=256).grid(128, 768, 768) == (32, 24, 24)


@pytest.mark.parametrize(("codec", "frames"), SMALL)
def test_latents_have_the_grid_that_the_codec_promises(codec: Codec, frames: int) -> None:
    module = built(codec)
    x_BCTHW = clips(2, frames, 64, 96)
    with torch.no_grad():
        z_BCTHW = module.encode(x_BCTHW)
        assert z_BCTHW.shape == (2, codec.channels, *codec.grid(frames, 64, 96))
        assert module.decode(z_BCTHW).shape == x_BCTHW.shape


@pytest.mark.parametrize(("codec", "frames"), SMALL)
def test_every_parameter_learns_from_forward(codec: Codec, frames: int) -> None:
    module = built(codec)
    x_BCTHW = clips(1, frames, 64, 64)
    noise_BCTHW = torch.ones(1, codec.channels, *codec.grid(frames, 64, 64))
    reconstruction_loss(x_BCTHW, module(x_BCTHW, noise_BCTHW), kl_weight=0.1).sum().backward()
    without = [name for name, value in module.named_parameters() if value.grad is None]
    assert not without
    for name, value in module.named_parameters():
        assert value.grad is not None
        assert value.grad.isfinite().all(), name


@pytest.mark.parametrize(("codec", "frames"), SMALL)
def test_a_sample_does_not_depend_on_its_batch(codec: Codec, frames: int) -> None:
    module = built(codec)
    x_BCTHW = clips(3, frames, 64, 64)
    with torch.no_grad():
        together = module(x_BCTHW).x_BCTHW
        alone = torch.cat([module(x[None]).x_BCTHW for x in x_BCTHW])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("codec", "frames"), SMALL)
def test_forward_without_noise_is_decode_of_encode(codec: Codec, frames: int) -> None:
    module = built(codec)
    x_BCTHW = clips(1, frames, 64, 64)
    with torch.no_grad():
        twice = module.decode(module.encode(x_BCTHW))
        torch.testing.assert_close(module(x_BCTHW).x_BCTHW, twice)


def test_hunyuan_latents_are_causal() -> None:
    module = built(SMALL_HUNYUAN)
    # GroupNorm averages over the whole clip; everything else must look back only.
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.Identity())
    x_BCTHW = clips(1, 9, 32, 32)
    later_BCTHW = x_BCTHW.clone()
    later_BCTHW[:, :, 5:] *= -1
    with torch.no_grad():
        z_BCTHW, other_BCTHW = module.encode(x_BCTHW), module.encode(later_BCTHW)
    torch.testing.assert_close(z_BCTHW[:, :, :2], other_BCTHW[:, :, :2])
    assert (z_BCTHW[:, :, 2] - other_BCTHW[:, :, 2]).abs().max() > 1e-3


def test_hunyuan_takes_long_clips_whole() -> None:
    """The published class cuts clips of over 16 frames; ours must not."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
        AutoencoderKLHunyuanVideo,
    )

    published = AutoencoderKLHunyuanVideo(
        latent_channels=SMALL_HUNYUAN.channels,
        block_out_channels=SMALL_HUNYUAN.widths,
        layers_per_block=SMALL_HUNYUAN.layers,
        norm_num_groups=SMALL_HUNYUAN.norm_groups,
    )
    module = built(SMALL_HUNYUAN)
    published.load_state_dict(module.state_dict())
    x_BCTHW = clips(1, 33, 16, 16)
    with torch.no_grad():
        cut = published.encode(x_BCTHW).latent_dist.mode()
        published.use_framewise_encoding = False
        whole = published.encode(x_BCTHW).latent_dist.mode()
        ours = module.encode(x_BCTHW)
    torch.testing.assert_close(ours, whole)
    assert (cut - whole).norm() > 0.01 * whole.norm()


def test_hunyuan_kl_is_that_of_the_posterior() -> None:
    module = built(SMALL_HUNYUAN)
    x_BCTHW = clips(2, 5, 16, 16)
    with torch.no_grad():
        moments = module.get_submodule("quant_conv")(module.get_submodule("encoder")(x_BCTHW))
        mean, log_variance = moments.chunk(2, dim=1)
        posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        prior = torch.distributions.Normal(0.0, 1.0)
        expected_B = torch.distributions.kl_divergence(posterior, prior).flatten(1).mean(1)
        torch.testing.assert_close(module(x_BCTHW).kl_B, expected_B)


def test_noise_samples_the_posterior() -> None:
    module = built(SMALL_HUNYUAN)
    x_BCTHW = clips(1, 5, 16, 16)
    noise_BCTHW = torch.full((1, 16, 2, 2, 2), 0.5)
    with torch.no_grad():
        moments = module.get_submodule("quant_conv")(module.get_submodule("encoder")(x_BCTHW))
        mean, log_variance = moments.chunk(2, dim=1)
        expected = module.decode(mean + 0.5 * (0.5 * log_variance).exp())
        torch.testing.assert_close(module(x_BCTHW, noise_BCTHW).x_BCTHW, expected)


def test_moments_are_the_mean_and_the_deviation_of_the_posterior() -> None:
    codec = SMALL_HUNYUAN.replace(posterior="sample")
    module, x = built(codec), clips(1, 5, 16, 16)
    noise = torch.randn(module.encode(x).shape, generator=torch.Generator().manual_seed(3))
    moments_BCTHW = module.moments(x)
    assert moments_BCTHW.shape[1] == codec.stored_channels == 2 * codec.channels
    mean_BCTHW, deviation_BCTHW = moments_BCTHW.chunk(2, dim=1)
    assert torch.equal(mean_BCTHW, module.encode(x))
    assert deviation_BCTHW.min() > 0
    sampled = module.decode(mean_BCTHW + deviation_BCTHW * noise)
    torch.testing.assert_close(sampled, module(x, noise).x_BCTHW)


def test_moments_are_cut_as_the_mean_is() -> None:
    codec = SMALL_HUNYUAN.replace(
        posterior="sample", tiling=Tiling(frames=8, pixels=32, overlap=0.5)
    )
    module, x = built(codec), clips(1, 9, 48, 48)
    moments_BCTHW = module.moments(x)
    assert torch.equal(moments_BCTHW[:, : codec.channels], module.encode(x))
    assert not torch.equal(moments_BCTHW, module.moments_whole(x))
    assert moments_BCTHW[:, codec.channels :].min() > 0
    with pytest.raises(ValueError, match="8 frames do not fit"):
        module.moments(x[:, :, :8])


def test_a_sampled_posterior_is_told_apart_and_a_mean_keeps_its_name() -> None:
    fields = [
        SMALL_HUNYUAN.replace(posterior=mode).fingerprint_fields() for mode in ("mean", "sample")
    ]
    assert {name for name in fields[0] if fields[0][name] != fields[1][name]} == {"mode"}
    assert "posterior" not in fields[0], "a new field would rename every store"
    assert SMALL_HUNYUAN.stored_channels == SMALL_HUNYUAN.channels
    assert DCAE().mode == "mean"


def test_dc_ae_has_no_posterior() -> None:
    module = built(SMALL_DCAE)
    x_BCTHW = clips(2, 4, 32, 32)
    with torch.no_grad():
        noisy = module(x_BCTHW, torch.ones(2, 32, 1, 1, 1))
        torch.testing.assert_close(noisy.x_BCTHW, module(x_BCTHW).x_BCTHW)
    assert noisy.kl_B.tolist() == [0.0, 0.0]


def test_linear_attention_is_normalised_attention_with_a_relu_kernel() -> None:
    torch.manual_seed(0)
    layer = _LiteMLA(width=8, head_width=4)
    nn.init.ones_(layer.get_parameter("proj.norm.weight"))  # fresh ones are zero
    x_BCTHW = torch.randn(2, 8, 2, 3, 2)
    with torch.no_grad():
        qkv = layer.qkv(x_BCTHW)
        heads = torch.cat([qkv, layer.aggreg[0](qkv)], dim=1).flatten(2).unflatten(1, (4, 3, 4))
        mixed = []
        for n in range(4):
            q_BDL, k_BDL, v_BDL = heads[:, n].unbind(1)
            scores_BLL = torch.einsum("bdl,bdm->blm", q_BDL.relu(), k_BDL.relu())
            weights_BLL = scores_BLL / scores_BLL.sum(-1, keepdim=True).clamp_min(1e-12)
            mixed.append(torch.einsum("blm,bdm->bdl", weights_BLL, v_BDL))
        expected = layer.proj(torch.cat(mixed, dim=1).unflatten(2, (2, 3, 2)))
        torch.testing.assert_close(layer(x_BCTHW), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("codec", "frames"), SMALL)
def test_pixel_centre_is_what_the_network_sees_as_zero(codec: Codec, frames: int) -> None:
    plain, centred = built(codec), built(codec.replace(pixel_centre=-0.75))
    x_BCTHW = clips(1, frames, 64, 64)
    with torch.no_grad():
        expected = plain(x_BCTHW + 0.75).x_BCTHW - 0.75
        torch.testing.assert_close(centred(x_BCTHW).x_BCTHW, expected)
        z_BCTHW = plain.encode(x_BCTHW + 0.75)
        torch.testing.assert_close(centred.encode(x_BCTHW), z_BCTHW)
        torch.testing.assert_close(centred.decode(z_BCTHW), expected)


@pytest.mark.parametrize(
    ("codec", "ends"),
    [
        (SMALL_HUNYUAN, (".conv2.conv.weight",)),
        (SMALL_DCAE, (".conv2.norm.weight", ".proj.norm.weight", ".point_conv.norm.weight")),
    ],
)
def test_fresh_residual_branches_start_at_zero_and_nothing_else(
    codec: Codec, ends: tuple[str, ...]
) -> None:
    module = codec.build(device="meta")
    values = dict(fresh_parameters(module, named_generator))
    assert values.keys() == dict(module.named_parameters()).keys()
    weights = {name: value for name, value in values.items() if name.endswith("weight")}
    expected = {name for name in weights if name.endswith(ends)}
    assert expected
    assert {name for name, value in weights.items() if not value.any()} == expected


@given(codec=st.sampled_from([SMALL_HUNYUAN, SMALL_DCAE]), frames=st.integers(-3, 300))
def test_the_nearest_frame_count_is_taken_and_nothing_nearer_is(codec: Codec, frames: int) -> None:
    def is_taken(count: int) -> bool:
        return count >= 1 and count % 4 == codec.lead and count >= (codec.lead or 4)

    nearest = codec.nearest_frames(frames)
    assert is_taken(nearest)
    nearer = range(frames - abs(frames - nearest) + 1, frames + abs(frames - nearest))
    assert not any(is_taken(count) for count in nearer)
    if is_taken(frames):
        codec.check(frames, 64, 64)
        return
    with pytest.raises(ValueError, match=f"{frames} frames .* nearest is {nearest}$"):
        codec.check(frames, 64, 64)


def test_sizes_are_multiples_of_stride_and_patch() -> None:
    SMALL_HUNYUAN.check(9, 64, 48, patch=2)
    with pytest.raises(ValueError, match=r"width of 40 px .* multiple of 16 px .* nearest is 32"):
        SMALL_HUNYUAN.check(9, 64, 40, patch=2)
    with pytest.raises(ValueError, match=r"DCAE: a height of 8 px .* nearest is 32"):
        SMALL_DCAE.check(8, 8, 64)


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (3, 16, 16), ()])
def test_a_tensor_that_is_no_batch_of_clips_is_told_the_shape(shape: tuple[int, ...]) -> None:
    module = SMALL_HUNYUAN.build()
    for use in (module.encode, module.moments):
        with pytest.raises(ValueError, match=r"HunyuanVAE: .*\(clips, 3, frames, height, width\)"):
            use(torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: HunyuanVAE(widths=(8, 16, 24, 32), norm_groups=16),
            "width of 8 .* norm_groups=16",
        ),
        (lambda: DCAE(head_width=48), "width of 512 .* head_width=48"),
        (lambda: DCAE(encoder_depths=(2, 0, 2, 3, 3, 3)), "only the first may have 0"),
        (lambda: DCAE(encoder_depths=(0, 2, 2, 3, 3, 3)), "in both or in neither"),
        (lambda: DCAE(channels=96), "averages 1024 channels into 96"),
        (lambda: SMALL_DCAE.replace(widths=(8, 8, 24, 16, 32, 32)), "averages 32 channels into 24"),
    ],
)
def test_a_wrong_field_says_which_rule_it_breaks(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_the_fingerprint_tells_settings_apart_and_not_weights() -> None:
    base = SMALL_HUNYUAN.fingerprint_fields()
    assert base["class"] == "HunyuanVAE"
    assert (base["mode"], base["tiling"], base["dtype"]) == ("mean", "none", "float32")
    assert SMALL_HUNYUAN.replace(weights="x.safetensors").fingerprint_fields() == base
    others = [
        SMALL_HUNYUAN.replace(layers=2).fingerprint_fields(),
        SMALL_HUNYUAN.replace(pixel_centre=-0.75).fingerprint_fields(),
        SMALL_HUNYUAN.fingerprint_fields(torch.bfloat16),
        SMALL_DCAE.fingerprint_fields(),
    ]
    assert all(other != base for other in others)


def test_loss_is_absolute_plus_squared_error_plus_weighted_kl() -> None:
    x_BCTHW = clips(2, 1, 4, 4)
    offset_B = torch.tensor([0.25, 0.5])
    recon = Reconstruction(x_BCTHW + offset_B.view(2, 1, 1, 1, 1), torch.tensor([3.0, 4.0]))
    loss_B = reconstruction_loss(x_BCTHW, recon, kl_weight=0.1)
    torch.testing.assert_close(loss_B, torch.tensor([0.25 + 0.0625 + 0.3, 0.5 + 0.25 + 0.4]))


def test_psnr_of_a_known_error() -> None:
    x_BCTHW = torch.zeros(3, 3, 2, 4, 4)
    x_hat_BCTHW = x_BCTHW + torch.tensor([0.2, 5.0, 0.0]).view(3, 1, 1, 1, 1)
    expected_B = torch.tensor([20.0, 20 * math.log10(2 / 1), 100.0])  # 5.0 is clamped to 1
    torch.testing.assert_close(psnr_B(x_BCTHW, x_hat_BCTHW), expected_B)


def test_declaring_a_codec_does_not_import_diffusers() -> None:
    code = (
        "import sys; from models import HunyuanVAE, DCAE, Wan21VAE, ImageDCAE; "
        "HunyuanVAE(); DCAE(); Wan21VAE(); ImageDCAE(); assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
