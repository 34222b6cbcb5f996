"""What a stage minimises: reconstruction for an autoencoder, flow matching for a DiT."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from elastic.critic import Critic
from elastic.data.load import Micro, Source, held_out_rounds
from elastic.randomness import normals, sample_generator, uniforms
from elastic.world import World
from models.codec import Reconstruction
from models.flow import flow_loss_B, time_shift, timesteps
from models.reconstruction import psnr_B, reconstruction_loss, ssim_B
from models.text import TextBatch
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage

_CPU = torch.device("cpu")


class Losses(NamedTuple):
    """The losses of each sample of a micro-batch, without the weights of the samples."""

    model_B: Tensor
    """What the model minimises, and what is called the loss."""
    critic_B: Tensor | None = None
    """What the critic minimises; its gradients reach the critic alone, and no other does."""
    parts_B: Mapping[str, Tensor] = MappingProxyType({})
    """The addends of `model_B` by name, if there are several, and `critic_B`."""

    @property
    def both_B(self) -> Tensor:
        """The sum whose gradients are those of both."""
        return self.model_B if self.critic_B is None else self.model_B + self.critic_B


class Objective(Protocol):
    """What the training loop asks of a stage."""

    source: Source
    critic: Critic | None  # what is trained against the model, in the same updates

    def build(self) -> nn.Module:
        """The model on the meta device."""
        ...

    def losses(self, model: nn.Module, micro: Micro) -> Losses:
        """The losses of each sample of a micro-batch, unweighted."""
        ...

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Means over the held-out samples; every rank calls it."""
        ...


class FlowMatching:
    """Rectified flow on latents (DiffusionStage)."""

    def __init__(self, stage: DiffusionStage, source: Source, held_out: Source) -> None:
        self.source = source
        self.critic: Critic | None = None
        self._held_out = held_out
        self._stage = stage
        self._null = stage.text.null()
        self._alpha = {}
        for bucket in stage.buckets:
            grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
            frames, height, width = stage.model.token_grid(grid)
            self._alpha[bucket.name] = time_shift(height * width, frames)

    def build(self) -> nn.Module:
        """The DiT on the meta device."""
        return self._stage.build()

    def losses(self, model: nn.Module, micro: Micro) -> Losses:
        """Squared error of the velocity, per sample."""
        return Losses(self._loss_B(model, micro, "train", self._stage.text_dropout))

    def _loss_B(self, model: nn.Module, micro: Micro, use: str, dropout: float) -> Tensor:
        samples, stage, bucket = micro.samples, self._stage, micro.bucket.name
        generators = [
            sample_generator(stage.seed, stage.name, use, bucket, int(epoch), int(sample_id))
            for epoch, sample_id in zip(micro.epochs, samples.ids, strict=True)
        ]
        t_B = timesteps(normals(generators, ()), self._alpha[bucket])
        dropped_B = uniforms(generators) < dropout
        noise_BCTHW = normals(generators, tuple(samples.x_BCTHW.shape[1:]))
        assert samples.text is not None, "a diffusion stage reads latents with their text"
        text = without_text(samples.text, dropped_B)
        device = next(model.parameters()).device
        return flow_loss_B(
            model,
            samples.x_BCTHW.to(device),
            noise_BCTHW.to(device),
            t_B.to(device),
            TextBatch(*(None if x is None else x.to(device) for x in text)),  # type: ignore[arg-type]  # only the mask may be None
        )

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Mean flow loss, at noise and times that are fixed for each held-out sample."""
        totals = torch.zeros(2, dtype=torch.float64, device=world.device)
        for bucket in self._stage.buckets:
            for micro in held_out_rounds(self._held_out, bucket, self._stage.held_out, world):
                with torch.no_grad():
                    loss_B = self._loss_B(model, micro, "held-out", 0.0).cpu().double()
                weight_B = micro.samples.weight_B.double()
                totals += torch.stack([(loss_B * weight_B).sum(), weight_B.sum()]).to(totals)
        total, count = world.sum(totals).tolist()
        return {"loss": total / count} if count else {}


def without_text(text: TextBatch, dropped_B: Tensor) -> TextBatch:
    """The batch with the null text (one zero token) in the rows that are dropped."""
    mask_BL = text.mask_BL
    if mask_BL is None:
        mask_BL = torch.ones(text.text_BLD.shape[:2], dtype=torch.bool)
    first_L = torch.arange(mask_BL.shape[1]) == 0
    keep_B = ~dropped_B
    return TextBatch(
        text.text_BLD * keep_B[:, None, None],
        torch.where(keep_B[:, None], mask_BL, first_L[None]),
        text.pooled_BD * keep_B[:, None],
    )


class Reconstructing:
    """Pixels, and what else the stage names: KL, perceptual loss, critic (AutoencoderStage)."""

    def __init__(
        self,
        stage: AutoencoderStage,
        source: Source,
        held_out: Source,
        device: torch.device = _CPU,
    ) -> None:
        """`device` is the model's; the frozen perceptual network and the critic lie on it too."""
        self.source = source
        self._held_out = held_out
        self._stage = stage
        perceptual, adversarial = stage.perceptual, stage.adversarial
        # Frozen, and no part of the model: not sharded, not saved, not exported.
        self._perceptual = None if perceptual is None else perceptual.build().to(device)
        self.critic = None if adversarial is None else Critic(stage, adversarial, device)

    def build(self) -> nn.Module:
        """The codec on the meta device."""
        return self._stage.build()

    def losses(self, model: nn.Module, micro: Micro) -> Losses:
        """Reconstruction loss per sample; the latent is sampled if its KL has a weight."""
        stage, bucket = self._stage, micro.bucket
        shape = (
            stage.codec.channels,
            *stage.codec.grid(bucket.frames, bucket.height, bucket.width),
        )
        generators = [
            sample_generator(
                stage.seed, stage.name, "train", bucket.name, int(epoch), int(sample_id)
            )
            for epoch, sample_id in zip(micro.epochs, micro.samples.ids, strict=True)
        ]
        device = next(model.parameters()).device
        x_BCTHW = micro.samples.x_BCTHW.to(device)
        noise = normals(generators, shape).to(device) if stage.kl_weight else None
        reconstruction = model(x_BCTHW, noise)
        parts_B = self._parts_B(x_BCTHW, reconstruction)
        critic_B = None
        if self.critic is not None and self.critic.judges_at(micro.position):
            parts_B["loss_adversarial"] = self.critic.deception_B(reconstruction.x_BCTHW)
            critic_B = self.critic.loss_B(x_BCTHW, reconstruction.x_BCTHW)
        loss_B = torch.stack(list(parts_B.values())).sum(0)
        if critic_B is not None:
            parts_B["loss_critic"] = critic_B
        return Losses(loss_B, critic_B, parts_B if len(parts_B) > 1 else {})

    def _parts_B(self, x_BCTHW: Tensor, reconstruction: Reconstruction) -> dict[str, Tensor]:
        """The addends of the loss by name, without the critic's."""
        parts_B = {
            "loss_pixel": reconstruction_loss(x_BCTHW, reconstruction, self._stage.kl_weight)
        }
        if self._perceptual is not None:
            assert self._stage.perceptual is not None, "built from it"
            distance_B = self._perceptual(x_BCTHW, reconstruction.x_BCTHW)
            parts_B["loss_perceptual"] = self._stage.perceptual.weight * distance_B
        return parts_B

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Means over held-out clips of PSNR in dB, SSIM and the loss, the latent at its mean.

        The loss is that without the critic, which changes with the position.
        """
        totals = torch.zeros(4, dtype=torch.float64, device=world.device)
        for bucket in self._video_buckets():
            for micro in held_out_rounds(self._held_out, bucket, self._stage.held_out, world):
                x_BCTHW = micro.samples.x_BCTHW.to(world.device)
                with torch.no_grad():
                    output = model(x_BCTHW, None)
                    loss_B = torch.stack(list(self._parts_B(x_BCTHW, output).values())).sum(0)
                qualities_B = [q(x_BCTHW, output.x_BCTHW) for q in (psnr_B, ssim_B)]
                values = torch.stack([*qualities_B, loss_B]).double().cpu()
                weight_B = micro.samples.weight_B.double()
                totals[:3] += (values * weight_B).sum(1).to(totals)
                totals[3] += weight_B.sum().to(totals)
        psnr, ssim, loss, count = world.sum(totals).tolist()
        return {"psnr": psnr / count, "ssim": ssim / count, "loss": loss / count} if count else {}

    def _video_buckets(self) -> tuple[Bucket, ...]:
        longest = max(bucket.frames for bucket in self._stage.buckets)
        return tuple(bucket for bucket in self._stage.buckets if bucket.frames == longest)
