"""Clips to latents on one device: a codec, the scale of what it gives, and chunks on their way."""

# B clip, C channel, T frame, H, W pixels or latent grid

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from elastic.data.decode import to_unit
from elastic.heap import keep_freed_memory
from elastic.kernels import compiled_encoder
from elastic.weights import file_digest, load_weights
from models.codec import Codec, CodecModule

_CHUNK = 8


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each latent channel: stored latents are normalised by it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, z_BCTHW: Tensor) -> Tensor:
        """Latents of the codec to latents of the store."""
        mean, std = self._shaped(z_BCTHW)
        return (z_BCTHW - mean) / std

    def spread(self, deviation_BCTHW: Tensor) -> Tensor:
        """Deviations of the codec to deviations of the store."""
        return deviation_BCTHW / self._shaped(deviation_BCTHW)[1]

    def restore(self, z_BCTHW: Tensor) -> Tensor:
        """Latents of the store to latents of the codec."""
        mean, std = self._shaped(z_BCTHW)
        return z_BCTHW * std + mean

    def _shaped(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        return like.new_tensor(self.mean).view(shape), like.new_tensor(self.std).view(shape)


class Stored(NamedTuple):
    """What a store holds of one clip, both bf16 on the CPU."""

    latent_CTHW: Tensor
    given_CTHW: Tensor | None  # stills of the first and last frame, where they were asked for


@dataclass(frozen=True)
class Pending:
    """A chunk that its device may still be working on."""

    codec: Codec
    scale: Scale
    posterior_BCTHW: Tensor
    stills_BCTHW: Tensor | None
    copied: torch.cuda.Event | None

    def wait(self) -> list[Stored]:
        """What is stored of each clip, in order."""
        if self.copied is not None:
            self.copied.synchronize()
        latents = [z_CTHW.contiguous() for z_CTHW in self._stored().to(torch.bfloat16)]
        if self.stills_BCTHW is None:
            return [Stored(latent_CTHW, None) for latent_CTHW in latents]
        stills_BCTHW = self.scale.normalise(self.stills_BCTHW).to(torch.bfloat16)
        return [Stored(*pair) for pair in zip(latents, stills_BCTHW, strict=True)]

    def _stored(self) -> Tensor:
        if self.codec.mode == "mean":
            return self.scale.normalise(self.posterior_BCTHW)
        mean_BCTHW, deviation_BCTHW = self.posterior_BCTHW.chunk(2, dim=1)
        parts = self.scale.normalise(mean_BCTHW), self.scale.spread(deviation_BCTHW)
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Encoder:
    """A codec on its device."""

    codec: Codec
    module: CodecModule
    scale: Scale

    @property
    def device(self) -> torch.device:
        """Where the codec lies."""
        return next(self.module.parameters()).device

    @torch.no_grad()
    def begin(self, clips: Sequence[Tensor], ends: bool, compiled: bool = False) -> Pending:
        """Start on clips, uint8 C,T,H,W; with `ends` on stills of their first and last frame too.

        Nothing here waits for a GPU: what it does next is laid out while it works. `compiled` is
        for whole chunks alone, as every size is compiled for on its own.
        """
        x_BCTHW = to_unit(self._moved(clips))
        if compiled and len(clips) == chunk_size(self.codec):
            posterior_BCTHW = compiled_encoder(self.module)(x_BCTHW)
        else:
            posterior_BCTHW = posterior(self.module, x_BCTHW)
        stills_BCTHW = None
        if ends:
            first_and_last = (x_BCTHW[:, :, :1], x_BCTHW[:, :, -1:])
            stills = [_encode_still(self.module, x_BC1HW) for x_BC1HW in first_and_last]
            stills_BCTHW = torch.cat(stills, dim=2).to("cpu", non_blocking=True)
        posterior_BCTHW = posterior_BCTHW.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if x_BCTHW.is_cuda else None
        if copied is not None:
            copied.record()
        return Pending(self.codec, self.scale, posterior_BCTHW, stills_BCTHW, copied)

    def _moved(self, clips: Sequence[Tensor]) -> Tensor:
        # From pinned memory a copy waits for nobody. As bytes: it is a quarter of what floats are.
        shape, is_pinned = (len(clips), *clips[0].shape), self.device.type == "cuda"
        x_BCTHW = torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned)
        torch.stack(list(clips), out=x_BCTHW)
        return x_BCTHW.to(self.device, non_blocking=True)


def chunk_size(codec: Codec) -> int:
    """How many clips are encoded or decoded at once."""
    # Clips that need tiles are large themselves, and tiles go through one sample at a time.
    return _CHUNK if codec.tiling is None else 1


@torch.no_grad()
def posterior(module: CodecModule, x_BCTHW: Tensor) -> Tensor:
    """Latents, not normalised; where samples are asked for, the deviation in further channels."""
    return module.moments(x_BCTHW) if module.codec.mode == "sample" else module.encode(x_BCTHW)


def encode_still(module: CodecModule, scale: Scale, x_BC1HW: Tensor) -> Tensor:
    """One picture as a store normalises it, (B, C, 1, H, W): the posterior's mean, always.

    Encoded as the shortest clip that the codec takes, the picture in every frame of it.
    """
    return scale.normalise(_encode_still(module, x_BC1HW))


@torch.no_grad()
def _encode_still(module: CodecModule, x_BC1HW: Tensor) -> Tensor:
    num_frames = module.codec.nearest_frames(0)
    z_BC1HW = module.encode(x_BC1HW.expand(-1, -1, num_frames, -1, -1))
    assert z_BC1HW.shape[2] == 1, f"{module.codec.name}: {num_frames} frames gave {z_BC1HW.shape}"
    return z_BC1HW


@functools.lru_cache(maxsize=1)
def load_codec(codec: Codec, weights: Path, digest: str) -> CodecModule:
    """The codec with its weights, once a process; the digest makes other weights another codec."""
    assert file_digest(weights) == digest, f"{weights} changed while it was being used"
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = load_weights(codec.build(), weights).to(device)
    assert isinstance(module, CodecModule), f"{codec.name} built {type(module)}"
    return module
