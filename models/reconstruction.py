"""How well an autoencoder gives its pixels back: the training loss and PSNR."""

from torch import Tensor

from models.codec import Reconstruction

PEAK = 2.0  # pixels lie in [-1, 1]
MAX_PSNR_DB = 100.0


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
