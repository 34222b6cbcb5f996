"""Rectified flow: the path, the shift of time, the loss, and that sampling follows the field."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.dit import DiT
from models.flow import Times, euler_sample, flow_loss_B, mix, time_shift, timesteps, velocity
from models.text import TextBatch, WordHash, pad

ENCODER = WordHash(width=8)
TEXT = pad(ENCODER.encode(["a red circle", "blue"]))


def latents(seed: int) -> Tensor:
    return torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


class Recorded:
    """A velocity model of known form that keeps what it was asked."""

    def __init__(self, by_pooled: bool = False) -> None:
        self.times: list[float] = []
        self.texts: list[TextBatch] = []
        self.by_pooled = by_pooled

    def __call__(
        self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor | None, pooled: Tensor
    ) -> Tensor:
        self.times.append(t[0].item())
        self.texts.append(TextBatch(text, mask, pooled))
        strength = pooled.square().mean(1) if self.by_pooled else torch.ones(len(z))
        return strength[:, None, None, None, None].expand_as(z)


@pytest.mark.parametrize(
    ("tokens_per_frame", "frames", "published"),
    [(2304, 33, 11.87), (256, 33, 5.745), (576, 32, 6.600), (256, 1, 1.0), (4096, 1, 3.0)],
)
def test_shift_has_the_published_values(
    tokens_per_frame: int, frames: int, published: float
) -> None:
    assert time_shift(tokens_per_frame, frames) == pytest.approx(published, rel=1e-3)


def test_shift_counts_tokens_with_the_true_patch() -> None:
    # 768 px through a 32x autoencoder is 24 x 24 latents: 576 tokens at patch 1, 144 at patch 2.
    shape = DiT(depth=1, depth_single=0, width=12, heads=1, patch=1)
    per_frame = shape.tokens((32, 24, 24)) // 32
    assert time_shift(per_frame, 32) == pytest.approx(6.600, rel=1e-3)
    assert time_shift(per_frame // 4, 32) == pytest.approx(5.327, rel=1e-3)


@given(tokens=st.integers(1, 100_000), frames=st.integers(1, 500))
def test_shift_grows_with_size_and_is_never_below_one(tokens: int, frames: int) -> None:
    alpha = time_shift(tokens, frames)
    assert 1 <= alpha <= time_shift(tokens + 1, frames)
    assert alpha <= time_shift(tokens, frames + 1)


@pytest.mark.parametrize(("tokens", "frames"), [(0, 4), (16, 0)])
def test_shift_of_nothing_is_refused(tokens: int, frames: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens x {frames} frames"):
        time_shift(tokens, frames)


@given(normal=st.floats(-8, 8, width=32), alpha=st.floats(1, 100))
def test_timesteps_lie_inside_the_path_and_follow_the_published_shift(
    normal: float, alpha: float
) -> None:
    t = timesteps(torch.tensor([normal]), Times(alpha)).item()
    plain = 1 / (1 + math.exp(-normal))
    assert 0 < t < 1
    assert t == pytest.approx(alpha * plain / (1 + (alpha - 1) * plain), rel=1e-5)


def test_timesteps_of_bf16_draws_are_fp32() -> None:
    assert timesteps(torch.zeros(3, dtype=torch.bfloat16), Times(2.0)).dtype == torch.float32


@given(normal=st.floats(-4, 4, width=32), mean=st.floats(-2, 2), std=st.floats(0.1, 2))
def test_mean_and_deviation_are_those_of_the_logit_before_the_shift(
    normal: float, mean: float, std: float
) -> None:
    t = timesteps(torch.tensor([normal]), Times(3.0, mean, std)).item()
    plain = 1 / (1 + math.exp(-(mean + std * normal)))
    assert t == pytest.approx(3 * plain / (1 + 2 * plain), rel=1e-4)


def test_without_mean_deviation_or_share_times_have_the_bits_of_the_published_formula() -> None:
    normal_B = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    published_B = torch.sigmoid(normal_B + math.log(5.745))
    assert torch.equal(timesteps(normal_B, Times(5.745)), published_B)


def test_a_share_of_uniform_times_is_shifted_and_leaves_the_others_alone() -> None:
    normal_B = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    uniform_B = torch.rand(40_000, generator=torch.Generator().manual_seed(1))
    times = Times(4.0, uniform=0.25)
    t_B = timesteps(normal_B, times, uniform_B)
    is_uniform_B = uniform_B < 0.25
    others_B = timesteps(normal_B, Times(4.0))
    assert torch.equal(t_B[~is_uniform_B], others_B[~is_uniform_B])
    # The shift is undone: what is left is spread evenly, both ends included.
    back_B = t_B / (4 - 3 * t_B)
    counts = torch.histc(back_B[is_uniform_B], bins=10, min=0, max=1)
    assert counts.sum() == is_uniform_B.sum() == pytest.approx(10_000, rel=0.05)
    assert counts.tolist() == pytest.approx([1000] * 10, rel=0.15)  # five deviations
    assert (t_B[is_uniform_B] >= 0).all()
    assert (t_B[is_uniform_B] <= 1).all()


def test_with_a_share_of_one_every_time_is_uniform_to_the_very_ends() -> None:
    ends_B = torch.tensor([0.0, 0.5, 1 - 2**-24])
    t_B = timesteps(torch.zeros(3), Times(1.0, uniform=1.0), ends_B)
    assert torch.equal(t_B, ends_B)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), t=st.floats(0, 1), step=st.floats(0.01, 1))
def test_walking_the_velocity_stays_on_the_path(seed: int, t: float, step: float) -> None:
    z, noise = latents(seed), latents(seed + 1)
    here = mix(z, noise, torch.full((2,), t))
    there = mix(z, noise, torch.full((2,), t + step))
    torch.testing.assert_close(here + step * velocity(z, noise), there, rtol=1e-4, atol=1e-5)


def test_the_path_leads_from_data_to_noise() -> None:
    z, noise = latents(0), latents(1)
    assert torch.equal(mix(z, noise, torch.tensor([0.0, 1.0]))[0], z[0])
    assert torch.equal(mix(z, noise, torch.tensor([0.0, 1.0]))[1], noise[1])


def test_loss_is_each_samples_own_mean_in_fp32() -> None:
    z, noise, t = latents(0).bfloat16(), latents(1).bfloat16(), torch.tensor([0.2, 0.9])
    loss_B = flow_loss_B(Recorded(), z, noise, t, TEXT)
    target = noise.float() - z.float()
    by_hand = [(1 - target[i]).square().sum().item() / target[i].numel() for i in range(2)]
    assert loss_B.dtype == torch.float32
    assert loss_B.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_loss_of_the_true_velocity_is_zero_at_the_mixed_point() -> None:
    z, noise, t = latents(0), latents(1), torch.tensor([0.3, 0.6])

    def oracle(x: Tensor, t: Tensor, *text: Tensor | None) -> Tensor:
        # Solves x = (1 - t) z + t noise for noise - z, so it is right only at the mixed point.
        return (x - z) / t[:, None, None, None, None]

    torch.testing.assert_close(
        flow_loss_B(oracle, z, noise, t, TEXT), torch.zeros(2), rtol=0, atol=1e-8
    )


def test_the_loss_lets_gradients_through_to_the_model() -> None:
    scale = torch.ones((), requires_grad=True)

    def scaled(x: Tensor, *rest: Tensor | None) -> Tensor:
        return scale * x

    loss_B = flow_loss_B(scaled, latents(0), latents(1), torch.tensor([0.3, 0.6]), TEXT)
    (gradient,) = torch.autograd.grad(loss_B.mean(), scale)
    assert gradient.abs() > 0


@settings(deadline=None)
@given(steps=st.integers(1, 30), alpha=st.floats(1, 12))
def test_sampling_follows_the_field_to_the_data(steps: int, alpha: float) -> None:
    data, noise = latents(5), latents(6)

    def oracle(x: Tensor, t: Tensor, *text: Tensor | None) -> Tensor:
        return (x - data) / t[:, None, None, None, None]

    out = euler_sample(oracle, noise, TEXT, ENCODER.null(), steps=steps, guidance=1.0, alpha=alpha)
    torch.testing.assert_close(out, data, rtol=1e-4, atol=1e-4)


def test_sampling_starts_at_noise_and_takes_shifted_steps() -> None:
    model = Recorded()
    euler_sample(model, latents(0), TEXT, ENCODER.null(), steps=4, guidance=1.0, alpha=3.0)
    shifted = [3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)]
    assert model.times == pytest.approx(shifted)


@settings(deadline=None)
@given(guidance=st.floats(0, 8))
def test_guidance_extrapolates_from_the_null_text(guidance: float) -> None:
    noise = latents(0)
    out = euler_sample(
        Recorded(by_pooled=True),
        noise,
        TEXT,
        ENCODER.null(),
        steps=3,
        guidance=guidance,
        alpha=2.0,
    )
    # The pooled captions have unit variance (velocity 1), the null text none (velocity 0).
    torch.testing.assert_close(out, noise - guidance, rtol=1e-4, atol=1e-4)


def test_guidance_runs_one_doubled_batch_and_none_at_one() -> None:
    guided, plain = Recorded(), Recorded()
    for model, guidance in ((guided, 3.0), (plain, 1.0)):
        euler_sample(model, latents(0), TEXT, ENCODER.null(), steps=2, guidance=guidance, alpha=2.0)
    assert [len(text.text_BLD) for text in guided.texts] == [4, 4]
    assert [len(text.text_BLD) for text in plain.texts] == [2, 2]
    text_BLD, mask_BL, pooled_BD = guided.texts[0]
    assert mask_BL is not None
    assert mask_BL.sum(1).tolist() == [3, 1, 1, 1]
    assert not text_BLD[2:].any()
    assert not pooled_BD[2:].any()


def test_sampling_on_unpadded_text_masks_the_null_rows_too() -> None:
    model = Recorded()
    text = TextBatch(TEXT.text_BLD, None, TEXT.pooled_BD)
    euler_sample(model, latents(0), text, ENCODER.null(), steps=1, guidance=2.0, alpha=1.0)
    mask_BL = model.texts[0].mask_BL
    assert mask_BL is not None
    assert mask_BL.sum(1).tolist() == [3, 3, 1, 1]


def test_sampling_through_the_transformer_keeps_no_gradient() -> None:
    shape = DiT(depth=1, depth_single=1, width=16, heads=2)
    model = shape.build(3, ENCODER.width, ENCODER.pooled_width)
    noise = latents(0)
    out = euler_sample(model, noise, TEXT, ENCODER.null(), steps=2, guidance=3.0, alpha=2.0)
    assert torch.equal(out, noise)  # a fresh model is the zero field
    assert not out.requires_grad


def test_sampling_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        euler_sample(Recorded(), latents(0), TEXT, ENCODER.null(), steps=0, guidance=1.0, alpha=1.0)


@pytest.mark.parametrize("has_mask", [True, False])
def test_a_null_text_longer_than_the_captions_lengthens_the_batch(has_mask: bool) -> None:
    model, null = Recorded(), ENCODER.encode(["one two three four"])[0]
    text = TEXT if has_mask else TextBatch(TEXT.text_BLD, None, TEXT.pooled_BD)
    euler_sample(model, latents(0), text, null, steps=1, guidance=2.0, alpha=1.0)
    text_BLD, mask_BL, pooled_BD = model.texts[0]
    assert mask_BL is not None
    assert mask_BL.sum(1).tolist() == [3, 1 if has_mask else 3, 4, 4]
    assert torch.equal(text_BLD[:2, :3], TEXT.text_BLD)
    assert torch.equal(text_BLD[2:], null.embedding_LD.expand(2, -1, -1))
    assert torch.equal(pooled_BD[2:], null.pooled_D.expand(2, -1))
