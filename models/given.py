"""Frames that a DiT is given beside the text, as its second input."""

# B sample, C channel, T frame, H, W latent grid

from torch import Tensor


def given_frames(ends_BCTHW: Tensor, head_B: Tensor, tail_B: Tensor, frames: int) -> Tensor:
    """A mask and the given latents, (B, 1 + C, frames, H, W); zero where nothing is given.

    `ends_BCTHW` holds two latent frames, of a clip's first picture and of its last, each encoded
    by itself so that it tells nothing of the others. They are put at the first latent frame where
    `head_B`, and at the last where `tail_B`.
    """
    num_samples, channels, _, height, width = ends_BCTHW.shape
    given_BCTHW = ends_BCTHW.new_zeros(num_samples, 1 + channels, frames, height, width)
    for place, picture, is_given_B in ((0, 0, head_B), (-1, 1, tail_B)):
        given_BCTHW[is_given_B, 0, place] = 1
        given_BCTHW[is_given_B, 1:, place] = ends_BCTHW[is_given_B, :, picture]
    return given_BCTHW
