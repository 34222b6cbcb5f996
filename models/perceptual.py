"""How unlike two clips look: LPIPS on VGG16's features, or a pyramid of differences."""

from pathlib import Path

import torch
from einops import rearrange
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from models.record import Record

# B sample, C channel, T frame, H, W rows and columns; N frame of any clip, B x T of them.

# VGG16, one tuple for each LPIPS level: the width of each of its convolutions. All but the first
# level begin by halving the grid.
_LEVELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALLEST_SIDE = 2 ** (len(_LEVELS) - 1)
"""The fewest rows or columns of pixels that LPIPS takes."""
# LPIPS's own normalisation of pixels in [-1, 1] to what VGG16 was trained on.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Lpips(Record):
    """LPIPS with VGG16 (arXiv 1801.03924, version 0.1), the mean over a clip's frames.

    `weights` is one safetensors file with the fp32 tensors of torchvision's VGG16
    (`features.N.weight` and `features.N.bias`, N = 0 2 5 7 10 12 14 17 19 21 24 26 28) and of the
    LPIPS heads (`linK.model.1.weight`, K = 0 to 4, shape 1 C 1 1); other keys are ignored.
    """

    weights: str = Field(min_length=1)
    weight: float = Field(default=0.5, gt=0, allow_inf_nan=False)

    @property
    def name(self) -> str:
        """The word for this loss in logs and forecasts."""
        return f"LPIPS ({self.weights})"

    def build(self) -> nn.Module:
        """The frozen module with the values of the file; ValueError if they do not fit."""
        path = Path(self.weights)
        module = LpipsModule()
        parameters = dict(module.named_parameters())
        check_lpips(path)
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))
        return module.eval().requires_grad_(False)


class Pyramid(Record):
    """The substitute for LPIPS without weights: absolute errors of a Laplacian pyramid.

    Each band is halved by 2 x 2 means; the loss is the sum over the bands of their mean absolute
    error (Lap1 of arXiv 1707.05776, which weights sums by 4 to the level, with another filter).
    It knows edges and coarse shapes apart, and nothing of what people see.
    """

    weight: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    levels: int = Field(default=4, ge=1)
    """Bands, the coarsest included; fewer where a frame is too small to be halved so often."""

    @property
    def name(self) -> str:
        """The word for this loss in logs and forecasts."""
        return f"pyramid of {self.levels} bands"

    def build(self) -> nn.Module:
        """The module; it has no parameters."""
        return PyramidModule(self.levels)


class PyramidModule(nn.Module):
    """Per sample: the sum over the bands of the mean absolute error."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x_BCTHW: Tensor, x_hat_BCTHW: Tensor) -> Tensor:
        """Per sample, for clips in [-1, 1] of any size; fp32."""
        # The pyramid is linear: that of the error is the error of the pyramids.
        error_NCHW = _frames(x_hat_BCTHW.float() - x_BCTHW.float())
        total_N = error_NCHW.new_zeros(len(error_NCHW))
        for _ in range(self.levels - 1):
            if min(error_NCHW.shape[-2:]) < 2:
                break
            coarse_NCHW = functional.avg_pool2d(
                error_NCHW, 2, ceil_mode=True, count_include_pad=False
            )
            size = error_NCHW.shape[-2:]
            back_NCHW = functional.interpolate(coarse_NCHW, scale_factor=2.0, mode="nearest")
            band_NCHW = error_NCHW - back_NCHW[..., : size[0], : size[1]]
            total_N = total_N + band_NCHW.abs().flatten(1).mean(1)
            error_NCHW = coarse_NCHW
        total_N = total_N + error_NCHW.abs().flatten(1).mean(1)
        return total_N.view(len(x_BCTHW), -1).mean(1)


class LpipsModule(nn.Module):
    """VGG16's convolutions and the five heads, under the names of the file that fills them."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Made here, as a tensor that is made of numbers in a step waits for the device.
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.features = nn.ModuleDict()
        self._levels: list[list[str]] = []
        index, width = 0, 3
        for number, widths in enumerate(_LEVELS):
            index += 1 if number else 0  # the max-pool
            names = []
            for wide in widths:
                names.append(str(index))
                self.features[names[-1]] = nn.Conv2d(width, wide, 3, padding=1)
                index, width = index + 2, wide  # a convolution and its ReLU
            self._levels.append(names)
            self.add_module(f"lin{number}", _Head(width))

    def forward(self, x_BCTHW: Tensor, x_hat_BCTHW: Tensor) -> Tensor:
        """Per sample, for clips in [-1, 1] with sides of `SMALLEST_SIDE` or more; fp32."""
        # Two passes: no graph is kept for the real clip, whose pixels take no gradient.
        pairs = zip(self._features(x_BCTHW), self._features(x_hat_BCTHW), strict=True)
        total_N: Tensor | float = 0.0
        for number, (real_NCHW, decoded_NCHW) in enumerate(pairs):
            head = self.get_submodule(f"lin{number}")
            total_N = total_N + head((real_NCHW - decoded_NCHW).square()).flatten(1).mean(1)
        assert isinstance(total_N, Tensor), "there are five levels"
        return total_N.view(len(x_BCTHW), -1).mean(1)

    def _features(self, x_BCTHW: Tensor) -> list[Tensor]:
        """The features of each level, of unit length over the channels."""
        x_NCHW = (_frames(x_BCTHW.float()) - self.shift) / self.scale
        levels: list[Tensor] = []
        for names in self._levels:
            x_NCHW = functional.max_pool2d(x_NCHW, 2) if levels else x_NCHW
            for name in names:
                x_NCHW = functional.relu(self.features[name](x_NCHW))
            # Its slope at zero is finite, unlike that of a square root plus epsilon.
            levels.append(functional.normalize(x_NCHW, dim=1, eps=1e-10))
        return levels


class _Head(nn.Module):
    """Adds up the channels with weights; the name `model.1` is that of the published file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_N1HW: Tensor = self.model["1"](x_NCHW)
        return y_N1HW


def check_lpips(path: Path) -> None:
    """ValueError, with the first names, unless the file has every tensor that LPIPS needs."""
    with torch.device("meta"):
        needed = {name: list(p.shape) for name, p in LpipsModule().named_parameters()}
    advice = "export torchvision's VGG16 and the LPIPS heads (models/perceptual.py says the keys)"
    if not path.is_file():
        raise ValueError(f"LPIPS weights {str(path)!r}: no such file; {advice}, or use Pyramid()")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing = sorted(needed.keys() - names)
            slices = {name: file.get_slice(name) for name in needed.keys() & names}
            wrong = [
                f"{name} is {part.get_shape()} {part.get_dtype()}, not {needed[name]} F32"
                for name, part in sorted(slices.items())
                if (part.get_shape(), part.get_dtype()) != (needed[name], "F32")
            ]
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"LPIPS weights {str(path)!r}: not a safetensors file ({error}); {advice}"
        ) from None
    if missing:
        raise ValueError(
            f"LPIPS weights {str(path)!r}: {len(missing)} of {len(needed)} tensors are missing, "
            f"such as {', '.join(missing[:3])}; {advice}"
        )
    if wrong:
        raise ValueError(f"LPIPS weights {str(path)!r}: {'; '.join(wrong[:3])}; {advice}")


def _frames(x_BCTHW: Tensor) -> Tensor:
    return rearrange(x_BCTHW, "b c t h w -> (b t) c h w")
