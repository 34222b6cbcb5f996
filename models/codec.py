"""The contract of an autoencoder: pixels to latents and back, and which clips it takes."""

from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from models.record import Record

# B sample, C channel, T frame, H, W rows and columns of pixels or of the latent grid.


class Reconstruction(NamedTuple):
    """What training sees: the decoded clip, and the KL per sample in nats per latent element."""

    # A tuple, since FSDP2 looks for output tensors in tuples, lists and dicts only.
    x_BCTHW: Tensor
    kl_B: Tensor


class CodecModule(nn.Module):
    """A built autoencoder.

    Under FSDP2 only `forward` gathers the parameters; call `encode` and `decode` on a whole module.
    """

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Latents of clips in [-1, 1]: deterministic, and not normalised."""
        raise NotImplementedError

    def moments(self, x_BCTHW: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior, (B, 2C, T, H, W); not normalised.

        Asked only of codecs whose `mode` is "sample".
        """
        raise NotImplementedError

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Clips of latents; about [-1, 1], not clamped."""
        raise NotImplementedError

    def forward(self, x_BCTHW: Tensor, noise_BCTHW: Tensor | None = None) -> Reconstruction:
        """Encode and decode; `noise` is standard normal in the shape of the latents."""
        raise NotImplementedError


class Codec(Record):
    """An autoencoder as a stage file names it."""

    stride: ClassVar[tuple[int, int, int]]
    """Pixels per latent element along T, H, W."""
    lead: ClassVar[int]
    """Frames before the first whole temporal stride: 1 makes the rule 4k+1, 0 makes it 4k."""

    weights: str | None = None
    channels: int = Field(ge=1)
    pixel_centre: float = Field(default=0.0, ge=-1, le=1)
    """The pixel value that the network sees as 0; the published weights take 0.0.

    Training from scratch on mostly dark clips learns far faster with the value of their ground.
    """

    @property
    def name(self) -> str:
        """The word for this autoencoder in logs and fingerprints."""
        return type(self).__name__

    @property
    def mode(self) -> Literal["mean", "sample"]:
        """Whether a DiT is trained on the latent itself, or on samples of its posterior."""
        return "mean"

    @property
    def stored_channels(self) -> int:
        """Channels in a latent store: with samples, those of the mean and of the deviation."""
        return self.channels * (2 if self.mode == "sample" else 1)

    @property
    def frame_rule(self) -> str:
        """The frame counts that are taken, as `4k+1`."""
        return f"{self.stride[0]}k" + (f"+{self.lead}" if self.lead else "")

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The latent's T, H, W for a clip that `check` accepts."""
        down_t, down_h, down_w = self.stride
        return (frames - self.lead) // down_t + self.lead, height // down_h, width // down_w

    def nearest_frames(self, frames: int) -> int:
        """The frame count nearest to `frames` that is taken; the lower of two equally near."""
        step = self.stride[0]
        below = (frames - self.lead) // step * step + self.lead
        nearest = below if frames - below <= below + step - frames else below + step
        return max(nearest, self.lead or step)

    def check(self, frames: int, height: int, width: int, patch: int = 1) -> None:
        """Raise ValueError for a clip that would be cut or does not fill whole patches."""
        nearest = self.nearest_frames(frames)
        if frames != nearest:
            raise ValueError(
                f"{self.name}: {frames} frames do not fit; the rule is {self.frame_rule} frames "
                f"from {self.nearest_frames(0)} up, and the nearest is {nearest}"
            )
        sides = (("height", height, self.stride[1]), ("width", width, self.stride[2]))
        for side, pixels, down in sides:
            unit = down * patch
            fitting = max(unit, round(pixels / unit) * unit)
            if pixels != fitting:
                raise ValueError(
                    f"{self.name}: a {side} of {pixels} px does not fit; the rule is a multiple of "
                    f"{unit} px (stride {down} x patch {patch}), and the nearest is {fitting}"
                )

    def fingerprint_fields(
        self, dtype: torch.dtype = torch.float32
    ) -> dict[str, str | int | float | list[int]]:
        """What decides the latents' values, but for the weights; `dtype` is that of encoding."""
        fields = self.model_dump(mode="json", exclude={"weights", "posterior"})
        return {
            **fields,
            "class": self.name,
            "frame_rule": self.frame_rule,
            "mode": self.mode,
            "dtype": str(dtype).removeprefix("torch."),
            "tiling": "none",
        }

    @abstractmethod
    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module with the library's default values; on `meta`, with no values at all."""
