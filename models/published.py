"""Other published autoencoders, on the classes of diffusers: to be used with their weights.

Each goes through whole unless `tiling` says otherwise: whatever diffusers cuts by itself is off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.codec import Codec, CodecModule, Reconstruction, Statistics, gaussian_kl_B
from models.published_statistics import WAN21, WAN22

# B sample, C channel, T frame, H, W grid.

Four = tuple[int, int, int, int]
Five = tuple[int, int, int, int, int]
Six = tuple[int, int, int, int, int, int]


@contextmanager
def _diffusers(codec: Codec, since: str) -> Iterator[None]:
    """Build inside: imports late, and says which diffusers it takes where that fails."""
    # Late: diffusers takes seconds to import, and a stage file must import fast.
    try:
        yield
    except ImportError as error:
        try:
            found = f"diffusers {metadata.version('diffusers')}"
        except metadata.PackageNotFoundError:
            found = "no diffusers"
        raise ImportError(
            f"{codec.name} needs a class that came with diffusers {since}, and {found} is "
            f"installed: pip install 'diffusers>={since}'"
        ) from error


class _PublishedCodec(Codec):
    is_trainable: ClassVar[bool] = False

    @model_validator(mode="after")
    def _centre_is_published(self) -> Self:
        if self.pixel_centre:
            raise ValueError(
                f"{self.name}: pixel_centre {self.pixel_centre} does not fit; the published "
                "weights take 0.0"
            )
        return self


class HunyuanVAE15(_PublishedCodec):
    """HunyuanVideo 1.5: 4x16x16, 32 channels, 4k+1 frames, a Gaussian posterior."""

    stride: ClassVar[tuple[int, int, int]] = (4, 16, 16)
    lead: ClassVar[int] = 1
    # A factor: z * 1.03682.
    published: ClassVar[Statistics] = Statistics((0.0,) * 32, (1 / 1.03682,) * 32)

    kind: Literal["hunyuan-vae-1.5"] = "hunyuan-vae-1.5"
    channels: int = Field(default=32, ge=1)
    widths: Five = (128, 256, 512, 1024, 1024)
    layers: int = Field(default=2, ge=1)

    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module, its keys and shapes those of diffusers' AutoencoderKLHunyuanVideo15."""
        with _diffusers(self, "0.36"), torch.device(device):
            from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
                AutoencoderKLHunyuanVideo15,
            )

            published = AutoencoderKLHunyuanVideo15(
                latent_channels=self.channels,
                block_out_channels=self.widths,
                layers_per_block=self.layers,
            )
        # One sample at a time: its attention fails on more (diffusers 0.42.1; the mask of shape
        # B L L does not fit scores of shape B 1 L L).
        published.use_slicing = True
        return GaussianModule(self, published)


class Wan21VAE(_PublishedCodec):
    """Wan 2.1: 4x8x8, 16 channels, 4k+1 frames, a Gaussian posterior."""

    stride: ClassVar[tuple[int, int, int]] = (4, 8, 8)
    lead: ClassVar[int] = 1
    published: ClassVar[Statistics] = WAN21

    kind: Literal["wan-2.1-vae"] = "wan-2.1-vae"
    channels: int = Field(default=16, ge=1)
    width: int = Field(default=96, ge=1)
    layers: int = Field(default=2, ge=1)

    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module, its keys and shapes those of diffusers' AutoencoderKLWan."""
        with _diffusers(self, "0.35"), torch.device(device):
            from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

            published = AutoencoderKLWan(
                z_dim=self.channels, base_dim=self.width, num_res_blocks=self.layers
            )
        return GaussianModule(self, published)


class Wan22VAE(_PublishedCodec):
    """Wan 2.2 (TI2V-5B): 4x16x16, 48 channels, 4k+1 frames, a Gaussian posterior."""

    stride: ClassVar[tuple[int, int, int]] = (4, 16, 16)
    lead: ClassVar[int] = 1
    published: ClassVar[Statistics] = WAN22

    kind: Literal["wan-2.2-vae"] = "wan-2.2-vae"
    channels: int = Field(default=48, ge=1)
    width: int = Field(default=160, ge=1)
    decoder_width: int = Field(default=256, ge=1)
    layers: int = Field(default=2, ge=1)

    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module, its keys and shapes those of diffusers' AutoencoderKLWan."""
        with _diffusers(self, "0.35"), torch.device(device):
            from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

            published = AutoencoderKLWan(
                z_dim=self.channels,
                base_dim=self.width,
                decoder_base_dim=self.decoder_width,
                num_res_blocks=self.layers,
                is_residual=True,
                patch_size=2,  # pixels to channels first: 3 * 2 * 2
                in_channels=12,
                out_channels=12,
                scale_factor_spatial=16,
            )
        return GaussianModule(self, published)


class LTXVAE(_PublishedCodec):
    """LTX-Video 0.9: 8x32x32, 128 channels, 8k+1 frames; its statistics lie in its weight file.

    It may be trained from fresh parameters as well; then it has no published statistics.
    """

    stride: ClassVar[tuple[int, int, int]] = (8, 32, 32)
    lead: ClassVar[int] = 1
    is_trainable: ClassVar[bool] = True

    kind: Literal["ltx-vae"] = "ltx-vae"
    channels: int = Field(default=128, ge=1)
    widths: Four = (128, 256, 512, 512)
    layers: Five = (4, 3, 3, 3, 4)

    def check_published(self) -> None:
        """Raise ValueError without a weight file."""
        if self.weights is None:
            raise ValueError(
                f"{self.name}: normalisation 'published' without weights: the statistics lie in "
                "the published weight file; give weights='path.safetensors'"
            )

    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module, its keys and shapes those of diffusers' AutoencoderKLLTXVideo."""
        with _diffusers(self, "0.35"), torch.device(device):
            from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

            published = AutoencoderKLLTXVideo(
                latent_channels=self.channels,
                block_out_channels=self.widths,
                decoder_block_out_channels=self.widths,
                layers_per_block=self.layers,
                decoder_layers_per_block=self.layers,
            )
        return LTXModule(self, published)


class ImageDCAE(_PublishedCodec):
    """DC-AE f32c32 for pictures (SANA 1.1): 32x32, 32 channels, one frame, no posterior."""

    stride: ClassVar[tuple[int, int, int]] = (1, 32, 32)
    lead: ClassVar[int] = 0
    # A factor: z * 0.41407.
    published: ClassVar[Statistics] = Statistics((0.0,) * 32, (1 / 0.41407,) * 32)

    kind: Literal["image-dc-ae"] = "image-dc-ae"
    channels: int = Field(default=32, ge=1)
    widths: Six = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: Six = (2, 2, 2, 3, 3, 3)
    decoder_depths: Six = (3, 3, 3, 3, 3, 3)
    head_width: int = Field(default=32, ge=1)

    @property
    def frame_rule(self) -> str:
        """The only frame count that is taken."""
        return "1"

    @property
    def _frames_allowed(self) -> str:
        return "exactly 1 frame"

    def nearest_frames(self, frames: int) -> int:
        """1, whatever is asked for."""
        return 1

    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module, its keys and shapes those of diffusers' AutoencoderDC."""
        blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
        with _diffusers(self, "0.35"), torch.device(device):
            from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

            published = AutoencoderDC(
                latent_channels=self.channels,
                attention_head_dim=self.head_width,
                encoder_block_types=blocks,
                decoder_block_types=blocks,
                encoder_block_out_channels=self.widths,
                decoder_block_out_channels=self.widths,
                encoder_layers_per_block=self.encoder_depths,
                decoder_layers_per_block=self.decoder_depths,
                downsample_block_type="Conv",
                upsample_block_type="interpolate",
            )
        return PictureModule(self, published)


class PublishedModule(CodecModule):
    """The layers of a diffusers autoencoder under its own keys, called through its own methods."""

    # Any: diffusers has no types here.
    def __init__(self, codec: Codec, published: Any) -> None:
        super().__init__(codec)
        # In a tuple, which torch does not look into: the layers are registered once, below.
        self._published = (published,)
        for name, child in published.named_children():
            self.add_module(name, child)
        # Whatever diffusers would cut by itself would not be in the latents' fingerprint.
        published.use_tiling = False
        published.use_framewise_encoding = published.use_framewise_decoding = False


class PictureModule(PublishedModule):
    """An autoencoder of B C H W pictures, which takes clips of one frame."""

    def encode_whole(self, x_BCTHW: Tensor) -> Tensor:
        """The latent itself: there is no posterior."""
        z_BCHW: Tensor = self._published[0].encode(x_BCTHW.squeeze(2)).latent
        return z_BCHW.unsqueeze(2)

    def decode_whole(self, z_BCTHW: Tensor) -> Tensor:
        """Clips of one frame."""
        x_BCHW: Tensor = self._published[0].decode(z_BCTHW.squeeze(2)).sample
        return x_BCHW.unsqueeze(2)

    def forward(self, x_BCTHW: Tensor, noise_BCTHW: Tensor | None = None) -> Reconstruction:
        """Encode and decode; the noise is not used and the KL is zero, as nothing is sampled."""
        decoded_BCTHW = self.decode_whole(self.encode_whole(x_BCTHW))
        return Reconstruction(decoded_BCTHW, decoded_BCTHW.new_zeros(len(x_BCTHW)).float())


class GaussianModule(PublishedModule):
    """An autoencoder of clips with a Gaussian posterior."""

    def encode_whole(self, x_BCTHW: Tensor) -> Tensor:
        """The posterior's mean."""
        mean_BCTHW: Tensor = self._published[0].encode(x_BCTHW).latent_dist.mode()
        return mean_BCTHW

    def decode_whole(self, z_BCTHW: Tensor) -> Tensor:
        """Clips of as many frames as the latents stand for; the Wan classes clamp to [-1, 1]."""
        x_BCTHW: Tensor = self._published[0].decode(z_BCTHW).sample
        return x_BCTHW

    def forward(self, x_BCTHW: Tensor, noise_BCTHW: Tensor | None = None) -> Reconstruction:
        """Decode a sample of the posterior, or its mean without noise."""
        posterior = self._published[0].encode(x_BCTHW).latent_dist
        z_BCTHW = posterior.mean
        if noise_BCTHW is not None:
            z_BCTHW = z_BCTHW + posterior.std * noise_BCTHW
        kl_B = gaussian_kl_B(posterior.mean, posterior.logvar)
        return Reconstruction(self.decode_whole(z_BCTHW), kl_B)


class LTXModule(GaussianModule):
    """LTX-Video, with the statistics of its weight file; trained from scratch it has none."""

    def __init__(self, codec: Codec, published: nn.Module) -> None:
        super().__init__(codec, published)
        if codec.weights is not None:
            for name, buffer in published.named_buffers(recurse=False):
                self.register_buffer(name, buffer)
            if codec.normalisation == "measured":  # not asked for, and missing where we trained it
                self.optional_keys = frozenset(
                    name for name, _ in self.named_buffers(recurse=False)
                )

    def published_statistics(self) -> Statistics:
        """Those of the weight file."""
        self.codec.check_published()
        mean, std = self.get_buffer("latents_mean"), self.get_buffer("latents_std")
        return Statistics(tuple(mean.tolist()), tuple(std.tolist()))
