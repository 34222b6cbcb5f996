"""Rectified flow: where on the path a sample is trained, what is learned there, and sampling.

Time runs from 0 (data) to 1 (noise). Times are drawn as in SD3 (arXiv 2403.03206, sections 3.1 and
5.3.2) and by default shifted as in Open-Sora 2.0 (arXiv 2503.09642), whose sigma_min of 1e-5 is
left out.
"""

# B sample, C channel, T frame, H, W latent grid, L text token, D text width

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from models.text import TextBatch, TextEmbedding, without_text

# velocity_BCTHW = model(z_BCTHW, t_B, text_BLD, mask_BL, pooled_BD)
VelocityModel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]
Time = TypeVar("Time", float, Tensor)


def time_shift(tokens_per_frame: int, latent_frames: int) -> float:
    """The factor alpha by which the odds of noise grow with the size of the video.

    A line through (256 tokens, 1) and (4096, 3), times the root of the latent frames. Tokens are
    counted with the model's own patch (the published training code fixes it at 2, its sampler
    does not). Below 256 tokens the line goes on downwards; alpha itself is held at 1 or more.
    """
    if tokens_per_frame < 1 or latent_frames < 1:
        raise ValueError(
            f"time shift of {tokens_per_frame} tokens x {latent_frames} frames: both must be >= 1"
        )
    line = 1 + (tokens_per_frame - 256) * (3 - 1) / (4096 - 256)
    return max(1.0, line * math.sqrt(latent_frames))


class Times(NamedTuple):
    """How times are drawn: logit-normal, a share of them uniform, and all shifted by `alpha`."""

    alpha: float
    mean: float = 0.0
    std: float = 1.0
    uniform: float = 0.0

    @property
    def centre(self) -> float:
        """The mean of the shifted logit: the shift multiplies the odds of t."""
        return self.mean + math.log(self.alpha)


def shifted(t: Time, alpha: float) -> Time:
    """The time at which the odds of noise are `alpha` times as high."""
    return alpha * t / (1 + (alpha - 1) * t)


def timesteps(normal_B: Tensor, times: Times, uniform_B: Tensor | None = None) -> Tensor:
    """Times of standard normal draws, fp32; `uniform_B` in [0, 1) decides who has a uniform one.

    Where it lies below the share it is spread over [0, 1) again: one draw is the choice and the
    time. What is uniform is the time before the shift, in which samplers take equal steps.
    """
    t_B = torch.sigmoid(normal_B.float() * times.std + times.centre)
    if not times.uniform:
        return t_B
    assert uniform_B is not None, f"a share of {times.uniform} is uniform, and nothing was drawn"
    spread_B = shifted(uniform_B.double() / times.uniform, times.alpha).float()
    return torch.where(uniform_B.double() < times.uniform, spread_B, t_B)


def mix(z_BCTHW: Tensor, noise_BCTHW: Tensor, t_B: Tensor) -> Tensor:
    """The point at time t on the straight path from data to noise."""
    t_B1111 = rearrange(t_B, "b -> b 1 1 1 1")
    return (1 - t_B1111) * z_BCTHW + t_B1111 * noise_BCTHW


def velocity(z_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """The path's derivative by time, which the model learns."""
    return noise_BCTHW - z_BCTHW


def conditioned(
    model: Callable[..., Tensor], guidance: float | None, given_BCTHW: Tensor | None
) -> VelocityModel:
    """The model with its other inputs filled in: strength of guidance, and given frames.

    Of a doubled batch, as guidance runs it, both halves are given the same frames.
    """
    if guidance is None and given_BCTHW is None:
        return model

    def filled_in(
        z_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor, mask_BL: Tensor | None, pooled_BD: Tensor
    ) -> Tensor:
        guidance_B = None if guidance is None else torch.full_like(t_B, guidance)
        frames_BCTHW = given_BCTHW
        if frames_BCTHW is not None and len(frames_BCTHW) != len(z_BCTHW):
            frames_BCTHW = torch.cat([frames_BCTHW, frames_BCTHW])
        return model(z_BCTHW, t_B, text_BLD, mask_BL, pooled_BD, guidance_B, frames_BCTHW)

    return filled_in


def flow_loss_B(
    model: VelocityModel, z_BCTHW: Tensor, noise_BCTHW: Tensor, t_B: Tensor, text: TextBatch
) -> Tensor:
    """Mean squared error of the velocity over each sample's own elements, in fp32."""
    z_BCTHW, noise_BCTHW = z_BCTHW.float(), noise_BCTHW.float()
    predicted_BCTHW = model(mix(z_BCTHW, noise_BCTHW, t_B), t_B, *text)
    error_BCTHW = predicted_BCTHW.float() - velocity(z_BCTHW, noise_BCTHW)
    return error_BCTHW.square().mean(dim=(1, 2, 3, 4))


@torch.no_grad()
def euler_sample(
    model: VelocityModel,
    noise_BCTHW: Tensor,
    text: TextBatch,
    null: TextEmbedding,
    *,
    steps: int,
    guidance: float,
    alpha: float,
) -> Tensor:
    """Walk from noise to latents in `steps` equal steps of unshifted time, fp32.

    Guidance runs captioned and null text as one doubled batch; a guidance of 1 is the captioned
    model alone and runs it once.
    """
    if steps < 1:
        raise ValueError(f"sampling with steps={steps}: at least 1 is needed")
    guided = guidance != 1.0
    if guided:
        text = _with_null(text, null)
    even = [1 - step / steps for step in range(steps + 1)]
    times = [shifted(s, alpha) for s in even]
    z_BCTHW = noise_BCTHW.float()
    for now, after in itertools.pairwise(times):
        input_BCTHW = torch.cat([z_BCTHW, z_BCTHW]) if guided else z_BCTHW
        t_B = torch.full((len(input_BCTHW),), now, device=z_BCTHW.device)
        v_BCTHW = model(input_BCTHW, t_B, *text).float()
        if guided:
            captioned_BCTHW, null_BCTHW = v_BCTHW.chunk(2)
            v_BCTHW = null_BCTHW + guidance * (captioned_BCTHW - null_BCTHW)
        z_BCTHW = z_BCTHW + (after - now) * v_BCTHW
    return z_BCTHW


def _with_null(text: TextBatch, null: TextEmbedding) -> TextBatch:
    """The batch followed by as many rows of the null text, padded to the same length."""
    nowhere_B = torch.zeros(len(text.text_BLD), dtype=torch.bool, device=text.text_BLD.device)
    captioned = without_text(text, null, nowhere_B, nowhere_B)  # as long as the null text, at least
    assert captioned.mask_BL is not None, "without_text() masks whatever it is given"
    text_BLD, mask_BL, pooled_BD = without_text(text, null, ~nowhere_B, ~nowhere_B)
    assert mask_BL is not None, "without_text() masks whatever it is given"
    return TextBatch(
        torch.cat([captioned.text_BLD, text_BLD]),
        torch.cat([captioned.mask_BL, mask_BL]),
        torch.cat([captioned.pooled_BD, pooled_BD]),
    )
