"""HunyuanVideo's causal autoencoder: 4x8x8, 16 channels (arXiv 2412.03603, section 4.1)."""

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.codec import Codec, CodecModule, Reconstruction, Statistics, gaussian_kl_B

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # that of the published class


class HunyuanVAE(Codec):
    """HunyuanVAE: 4k+1 frames, a Gaussian posterior; the default fields are the published ones."""

    stride: ClassVar[tuple[int, int, int]] = (4, 8, 8)
    lead: ClassVar[int] = 1
    # The published scale is a factor: z * 0.476986.
    published: ClassVar[Statistics] = Statistics((0.0,) * 16, (1 / 0.476986,) * 16)

    kind: Literal["hunyuan-vae"] = "hunyuan-vae"
    channels: int = Field(default=16, ge=1)
    widths: tuple[int, int, int, int] = (128, 256, 512, 512)
    layers: int = Field(default=2, ge=1)
    norm_groups: int = Field(default=32, ge=1)
    posterior: Literal["mean", "sample"] = "mean"
    """What a DiT is trained on: the posterior's mean, or, as published, a new sample every time.

    With "sample" a latent store holds the mean and the deviation, twice the bytes.
    """

    @property
    def mode(self) -> Literal["mean", "sample"]:
        """As `posterior` says."""
        return self.posterior

    @model_validator(mode="after")
    def _widths_hold_groups(self) -> Self:
        for width in self.widths:
            if width < self.norm_groups or width % self.norm_groups:
                raise ValueError(
                    f"HunyuanVAE: a width of {width} in {self.widths} does not fit; every width is "
                    f"a multiple of norm_groups={self.norm_groups}"
                )
        return self

    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module, its keys and shapes those of the published file."""
        # Late: diffusers takes seconds to import, and a stage file must import fast.
        from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
            AutoencoderKLHunyuanVideo,
        )

        with torch.device(device):
            published = AutoencoderKLHunyuanVideo(
                latent_channels=self.channels,
                block_out_channels=self.widths,
                layers_per_block=self.layers,
                norm_num_groups=self.norm_groups,
            )
        return HunyuanVAEModule(self, published)


class HunyuanVAEModule(CodecModule):
    """The layers of diffusers' AutoencoderKLHunyuanVideo, called directly.

    Its own encode() silently cuts clips of more than 16 frames into overlapping pieces, which
    changes the latents; here a clip is cut only where the codec's tiling says so.
    """

    def __init__(self, codec: HunyuanVAE, published: nn.Module) -> None:
        super().__init__(codec)
        self.pixel_centre = codec.pixel_centre
        self.encoder = published.get_submodule("encoder")
        self.decoder = published.get_submodule("decoder")
        self.quant_conv = published.get_submodule("quant_conv")
        self.post_quant_conv = published.get_submodule("post_quant_conv")
        for name, module in self.named_modules():
            # Residual branches start at zero: random ones drown the colours on the way.
            if name.endswith("conv2.conv"):
                module.zero_init = True

    def encode_whole(self, x_BCTHW: Tensor) -> Tensor:
        """The posterior's mean."""
        return self._posterior(x_BCTHW)[0]

    def moments_whole(self, x_BCTHW: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior, (B, 2C, T, H, W)."""
        mean_BCTHW, log_variance_BCTHW = self._posterior(x_BCTHW)
        return torch.cat([mean_BCTHW, (0.5 * log_variance_BCTHW).exp()], dim=1)

    def decode_whole(self, z_BCTHW: Tensor) -> Tensor:
        """Clips of 4t-3 frames from t latent frames."""
        x_BCTHW: Tensor = self.decoder(self.post_quant_conv(z_BCTHW))
        return x_BCTHW + self.pixel_centre

    def forward(self, x_BCTHW: Tensor, noise_BCTHW: Tensor | None = None) -> Reconstruction:
        """Decode a sample of the posterior, or its mean without noise."""
        mean_BCTHW, log_variance_BCTHW = self._posterior(x_BCTHW)
        z_BCTHW = mean_BCTHW
        if noise_BCTHW is not None:
            z_BCTHW = mean_BCTHW + (0.5 * log_variance_BCTHW).exp() * noise_BCTHW
        kl_B = gaussian_kl_B(mean_BCTHW, log_variance_BCTHW)
        return Reconstruction(self.decode_whole(z_BCTHW), kl_B)

    def _posterior(self, x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        moments_BCTHW = self.quant_conv(self.encoder(x_BCTHW - self.pixel_centre))
        mean_BCTHW, log_variance_BCTHW = moments_BCTHW.chunk(2, dim=1)
        return mean_BCTHW, log_variance_BCTHW.clamp(*LOG_VARIANCE_RANGE)
