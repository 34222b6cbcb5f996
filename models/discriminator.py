"""The video discriminator of adversarial training: a patch classifier in 3D."""

from itertools import pairwise

from einops import reduce
from torch import Tensor, nn
from torch.nn import functional

# B sample, C channel, T frame, H, W rows and columns of pixels or of patches.

_MOST = 8  # times the first width
GROUP = 8  # channels that are normalised together
_SLOPE = 0.2


class VideoDiscriminator(nn.Module):
    """A 3D PatchGAN (arXiv 1611.07004, with time as the third side): one logit a patch.

    `layers` convolutions halve T, H and W each, from `width` channels on. Norms are over groups
    of channels within one sample, so a sample's logits do not depend on what else is in its batch.
    `width` is a multiple of GROUP. Takes any number of frames, and sides of
    `smallest_side(layers)` px or more.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [width * min(2**i, _MOST) for i in range(layers)]
        # 4 is a multiple of the stride, so every pixel weighs the same; 3 takes a single frame.
        self.first = nn.Conv3d(3, width, (3, 4, 4), 2, 1)
        self.halving = nn.ModuleList(
            _NormedConv(a, b, (3, 4, 4), stride=2) for a, b in pairwise(widths)
        )
        wide = width * min(2**layers, _MOST)
        self.mixing = _NormedConv(widths[-1], wide, (3, 3, 3), stride=1)
        self.last = nn.Conv3d(wide, 1, 3, 1, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Logits (B 1 t h w) of clips in [-1, 1]: positive where they look real."""
        x_BCTHW = functional.leaky_relu(self.first(x_BCTHW), _SLOPE)
        for layer in self.halving:
            x_BCTHW = layer(x_BCTHW)
        logits_BCTHW: Tensor = self.last(self.mixing(x_BCTHW))
        return logits_BCTHW


class _NormedConv(nn.Module):
    def __init__(
        self, inside: int, outside: int, kernel: tuple[int, int, int], stride: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inside, outside, kernel, stride, 1)
        self.norm = nn.GroupNorm(outside // GROUP, outside)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return functional.leaky_relu(self.norm(self.conv(x_BCTHW)), _SLOPE)


def smallest_side(layers: int) -> int:
    """The fewest rows or columns of pixels that leave one patch."""
    return int(2**layers)


def critic_loss_B(real_B1THW: Tensor, decoded_B1THW: Tensor) -> Tensor:
    """Hinge loss of the discriminator per sample: the mean of both halves, 1 where it is blind."""
    real_B = reduce(functional.relu(1 - real_B1THW.float()), "b ... -> b", "mean")
    decoded_B = reduce(functional.relu(1 + decoded_B1THW.float()), "b ... -> b", "mean")
    return (real_B + decoded_B) / 2


def deception_loss_B(decoded_B1THW: Tensor) -> Tensor:
    """What the generator minimises per sample: minus the mean logit of its clip."""
    return -reduce(decoded_B1THW.float(), "b ... -> b", "mean")
