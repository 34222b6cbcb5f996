"""How well an autoencoder gives its pixels back: the training loss, PSNR and SSIM."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from models.codec import Reconstruction

PEAK = 2.0  # pixels lie in [-1, 1]
MAX_PSNR_DB = 100.0

_WINDOW, _SIGMA = 11, 1.5  # of SSIM, in pixels
_C1, _C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]


def reconstruction_loss(x_BCTHW: Tensor, recon: Reconstruction, kl_weight: float) -> Tensor:
    """Per sample: mean of |error| + error^2 over pixels, plus `kl_weight` times its KL.

    The absolute error alone is blind to what covers less than half of the places that the model
    cannot tell apart: small shapes on a plain ground stay unseen for hundreds of updates.
    """
    error_BCTHW = recon.x_BCTHW.float() - x_BCTHW.float()
    distance_BCTHW = error_BCTHW.abs() + error_BCTHW.square()
    return distance_BCTHW.flatten(1).mean(1) + kl_weight * recon.kl_B


def psnr_B(x_BCTHW: Tensor, x_hat_BCTHW: Tensor) -> Tensor:
    """PSNR per sample in dB, over all its frames; the decoded pixels are clamped, as on writing."""
    error_BCTHW = x_hat_BCTHW.float().clamp(-1, 1) - x_BCTHW.float()
    mse_B = error_BCTHW.square().flatten(1).mean(1)
    # A perfect clip has no finite PSNR, and one would spoil the mean over clips.
    return 10 * (PEAK**2 / mse_B.clamp_min(PEAK**2 * 10 ** (-MAX_PSNR_DB / 10))).log10()


def ssim_B(x_BCTHW: Tensor, x_hat_BCTHW: Tensor) -> Tensor:
    """SSIM per sample (Wang et al. 2004): the mean over places, colours and frames.

    On pixels in [0, 1], the decoded ones clamped; a Gaussian window of 11 x 11 pixels (sigma 1.5)
    that stays inside the frame, or the largest odd one that fits a smaller frame.
    """
    x_N1HW, y_N1HW = (
        # A channel of a frame is a picture of its own.
        rearrange((clip.float().clamp(-1, 1) + 1) / 2, "b c t h w -> (b c t) 1 h w")
        for clip in (x_BCTHW, x_hat_BCTHW)
    )
    moments = (x_N1HW, y_N1HW, x_N1HW.square(), y_N1HW.square(), x_N1HW * y_N1HW)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = map(_windowed, moments)
    var_x, var_y = mean_xx - mean_x.square(), mean_yy - mean_y.square()
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).view(len(x_BCTHW), -1).mean(1)


def _windowed(x_N1HW: Tensor) -> Tensor:
    """The Gaussian mean around every place whose window lies inside the frame."""
    fitting = min(_WINDOW, *x_N1HW.shape[-2:])
    radius = (fitting - 1) // 2
    offsets = torch.arange(-radius, radius + 1, device=x_N1HW.device, dtype=x_N1HW.dtype)
    weights = (-offsets.square() / (2 * _SIGMA**2)).exp()
    weights = weights / weights.sum()
    rows_N1HW = functional.conv2d(x_N1HW, weights.view(1, 1, -1, 1))
    return functional.conv2d(rows_N1HW, weights.view(1, 1, 1, -1))
