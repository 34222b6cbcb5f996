"""The contract of an autoencoder: pixels to latents and back, and which clips it takes."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.record import Record
from models.tiling import Tiling, decode_tiled, encode_tiled

# B sample, C channel, T frame, H, W rows and columns of pixels or of the latent grid.


class Reconstruction(NamedTuple):
    """What training sees: the decoded clip, and the KL per sample in nats per latent element."""

    # A tuple, since FSDP2 looks for output tensors in tuples, lists and dicts only.
    x_BCTHW: Tensor
    kl_B: Tensor


class Statistics(NamedTuple):
    """Of each latent channel; a DiT sees (z - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def gaussian_kl_B(mean_BCTHW: Tensor, log_variance_BCTHW: Tensor) -> Tensor:
    """KL of a diagonal Gaussian from the standard normal, in nats per latent element, in fp32."""
    mean, log_variance = mean_BCTHW.float(), log_variance_BCTHW.float()
    kl_BCTHW = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return kl_BCTHW.flatten(1).mean(1)


class CodecModule(nn.Module):
    """A built autoencoder.

    Under FSDP2 only `forward` gathers the parameters; call `encode` and `decode` on a whole module.
    A subclass gives `encode_whole`, `decode_whole` and `forward`; the codec's tiling applies to
    `encode` and `decode`, never to `forward`.
    """

    optional_keys: frozenset[str] = frozenset()
    """Of the state, what a weight file may lack."""

    def __init__(self, codec: "Codec") -> None:
        super().__init__()
        self.codec = codec

    def encode(self, x_BCTHW: Tensor, whole: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Latents of clips in [-1, 1]: deterministic, not normalised; ValueError for a wrong shape.

        Tiled as the codec says. `whole` stands for `encode_whole`: the same, compiled.
        """
        return self._tiled(whole or self.encode_whole, x_BCTHW)

    def moments(self, x_BCTHW: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior, (B, 2C, T, H, W); not normalised, tiled.

        Asked only of codecs whose `mode` is "sample".
        """
        return self._tiled(self.moments_whole, x_BCTHW)

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Clips of latents; about [-1, 1], not clamped; tiled as the codec says."""
        codec = self.codec
        if codec.tiling is None:
            return self.decode_whole(z_BCTHW)
        return decode_tiled(self.decode_whole, z_BCTHW, codec.tiling, codec.stride, codec.lead)

    def recompute(self, whether: bool) -> Self:
        """Keep only the inputs of each layer for the backward pass, or everything."""
        assert not whether, f"{self.codec.name} cannot; the stage has checked that"
        return self

    def recomputed(self) -> list[nn.Module]:
        """The layers that are computed again one by one, if the codec can."""
        return []

    def encode_whole(self, x_BCTHW: Tensor) -> Tensor:
        """Latents of clips in one piece."""
        raise NotImplementedError

    def moments_whole(self, x_BCTHW: Tensor) -> Tensor:
        """`moments` of clips in one piece."""
        raise NotImplementedError

    def decode_whole(self, z_BCTHW: Tensor) -> Tensor:
        """Clips of latents in one piece."""
        raise NotImplementedError

    def _tiled(self, encode: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
        codec = self.codec
        if x_BCTHW.ndim != 5:
            raise ValueError(
                f"{codec.name}: a tensor of shape {tuple(x_BCTHW.shape)} holds no clips; the rule "
                "is (clips, 3, frames, height, width): give a single clip as x[None]"
            )
        codec.check(*x_BCTHW.shape[2:])
        if codec.tiling is None:
            return encode(x_BCTHW)
        return encode_tiled(encode, x_BCTHW, codec.tiling, codec.stride, codec.lead)

    def published_statistics(self) -> Statistics:
        """Those that the published DiTs were trained with; ValueError if none are known."""
        return self.codec.published_statistics()

    def forward(self, x_BCTHW: Tensor, noise_BCTHW: Tensor | None = None) -> Reconstruction:
        """Encode and decode; `noise` is standard normal in the shape of the latents."""
        raise NotImplementedError


class Codec(Record):
    """An autoencoder as a stage file names it."""

    stride: ClassVar[tuple[int, int, int]]
    """Pixels per latent element along T, H, W."""
    lead: ClassVar[int]
    """Frames before the first whole temporal stride: 1 makes the rule 4k+1, 0 makes it 4k."""
    published: ClassVar[Statistics | None] = None
    """What latents of the published weights are normalised with, if it does not lie in the file."""
    is_trainable: ClassVar[bool] = True
    """Whether there is a rule for the start of every layer; without one it needs weights."""

    can_recompute: ClassVar[bool] = False
    """Whether training may compute layers again instead of keeping their inner values."""
    can_compile: ClassVar[bool] = False
    """Whether encoding gains by being compiled."""

    weights: str | None = None
    channels: int = Field(ge=1)
    pixel_centre: float = Field(default=0.0, ge=-1, le=1)
    """The pixel value that the network sees as 0; the published weights take 0.0.

    Training from scratch on mostly dark clips learns far faster with the value of their ground.
    """
    tiling: Tiling | None = None
    """How large clips are cut for `encode` and `decode`; None never cuts."""
    normalisation: Literal["measured", "published"] = "measured"
    """Stored latents are normalised by their own mean and deviation, or by published constants.

    A published DiT expects the published ones.
    """

    @model_validator(mode="after")
    def _tiles_and_statistics_fit(self) -> Self:
        if self.tiling is not None:
            self.tiling.check(self.name, self.stride)
        if self.normalisation == "published":
            self.check_published()
        return self

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

    def frame_edges(self, latent_frames: int) -> list[int]:
        """Where each latent frame begins, in frames of the clip, and where the last one ends."""
        down, first = self.stride[0], self.lead or self.stride[0]
        return [0, *(first + down * step for step in range(latent_frames))]

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
                f"{self.name}: {frames} frames do not fit; the rule is {self._frames_allowed}, "
                f"and the nearest is {nearest}"
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

    @property
    def _frames_allowed(self) -> str:
        return f"{self.frame_rule} frames from {self.nearest_frames(0)} up"

    def check_published(self) -> None:
        """Raise ValueError if no published statistics are known for this codec."""
        self.published_statistics()

    def published_statistics(self) -> Statistics:
        """Those that the published DiTs were trained with; ValueError if none are known."""
        known = self.published
        if known is None or len(known.mean) != self.channels:
            those = "none are" if known is None else f"those of {len(known.mean)} channels are"
            raise ValueError(
                f"{self.name}: normalisation 'published' with {self.channels} channels: {those} "
                f"published; write normalisation='measured'"
            )
        return known

    def fingerprint_fields(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:  # Any: JSON
        """What decides the latents' values, but for the weights; `dtype` is that of encoding."""
        fields = self.model_dump(mode="json", exclude={"weights", "kind", "posterior"})
        return {
            **fields,
            "class": self.name,
            "frame_rule": self.frame_rule,
            "mode": self.mode,
            "dtype": str(dtype).removeprefix("torch."),
            "tiling": fields["tiling"] or "none",
        }

    @abstractmethod
    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module with the library's default values; on `meta`, with no values at all."""
