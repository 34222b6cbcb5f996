"""What a stage minimises: reconstruction for an autoencoder, flow matching for a DiT."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from elastic.critic import Critic
from elastic.data.ahead import read_ahead
from elastic.data.load import Micro, Source, Step, held_out_rounds
from elastic.errors import InputError
from elastic.exact import column_totals, totals
from elastic.inputs import Inputs, on_device
from elastic.kernels import compiles, text_room
from elastic.level_names import level_means
from elastic.noise_levels import by_level, level_rounds, times_of
from elastic.randomness import normals, sample_generator, uniforms
from elastic.workload import Workload, workload
from elastic.world import World
from models.codec import Reconstruction
from models.flow import conditioned, flow_loss_B, timesteps
from models.given import given_frames
from models.reconstruction import psnr_B, reconstruction_loss, ssim_B
from models.text import TextEmbedding, padded, trimmed, without_text
from stages.given import Choice
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage

_CPU = torch.device("cpu")
Use = Literal["train", "held-out", "level"]
Graph = tuple[str, int, int]  # bucket, samples, and tokens of text


class Losses(NamedTuple):
    """The losses of each sample of a micro-batch, without the weights of the samples."""

    model_B: Tensor
    """What the model minimises, and what is called the loss."""
    work: Workload
    critic_B: Tensor | None = None
    """What the critic minimises; its gradients reach the critic alone, and no other does."""
    parts_B: Mapping[str, Tensor] = MappingProxyType({})
    """The addends of `model_B` by name, if there are several, and `critic_B`."""
    t_B: Tensor | None = None
    """The times of flow matching, by which losses are told apart."""

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

    def inputs(self, micro: Micro, device: torch.device) -> Inputs:
        """What the model is given for a micro-batch, ready for the device, but not there yet.

        Another thread than the training's calls it. All that is drawn for it is drawn here: it is a
        function of the samples alone.
        """
        ...

    def losses(self, model: nn.Module, inputs: Inputs) -> Losses:
        """The losses of each sample of a micro-batch, unweighted; the inputs are on the device."""
        ...

    def graphs(self, step: Step[Inputs]) -> frozenset[Graph]:
        """What this rank compiles for a step, unless it has before."""
        ...

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Means over the held-out samples; every rank calls it."""
        ...


class FlowMatching:
    """Rectified flow on latents (DiffusionStage); `null` takes the place of dropped text.

    A DiT that takes the strength of guidance is trained at strength 1, the convention for
    finetuning FLUX.1-dev: the data is what guidance 1 would make. Given frames count in the loss
    like all others, as in Open-Sora 2.0.
    """

    def __init__(
        self,
        stage: DiffusionStage,
        source: Source,
        held_out: Source,
        null: TextEmbedding,
        text_tokens: int = 0,
    ) -> None:
        """`text_tokens` are those of the longest text that the sources hold, if it is known."""
        self.source = source
        self._text_tokens = text_tokens or sys.maxsize
        self.critic: Critic | None = None
        self.held_out = held_out
        self._stage = stage
        self.null = null
        self._times = {bucket.name: stage.times(bucket) for bucket in stage.buckets}

    def build(self) -> nn.Module:
        """The DiT on the meta device."""
        return self._stage.build()

    def inputs(self, micro: Micro, device: torch.device) -> Inputs:
        """Latents, noise, times, text and given frames."""
        return self._inputs(micro, device, "train")

    def losses(self, model: nn.Module, inputs: Inputs) -> Losses:
        """Squared error of the velocity, per sample."""
        noise_BCTHW, t_B, text = inputs.noise_BCTHW, inputs.t_B, inputs.text
        assert noise_BCTHW is not None, "flow matching adds noise"
        assert t_B is not None, "flow matching draws times"
        assert text is not None, "a diffusion stage reads latents with their text"
        strength = 1.0 if self._stage.model.guidance else None
        conditioned_model = conditioned(model, strength, inputs.given_BCTHW)
        loss_B = flow_loss_B(conditioned_model, inputs.x_BCTHW, noise_BCTHW, t_B, text)
        return Losses(loss_B, inputs.work, t_B=t_B)

    def _inputs(
        self, micro: Micro, device: torch.device, use: Use, choice: Choice | None = None
    ) -> Inputs:
        """Given are the frames of `choice`; None draws it for each sample."""
        samples = micro.samples
        generators = self._generators(micro, use)
        t_B = self._times_of(micro, normals(generators, ()), use)
        dropped = self._dropped(micro, uniforms(generators), use)
        z_BCTHW = self._latents(micro, use)
        noise_BCTHW = normals(generators, tuple(z_BCTHW.shape[1:]))
        assert samples.text is not None, "a diffusion stage reads latents with their text"
        text = without_text(samples.text, self.null, *dropped)
        is_compiled = compiles(self._stage, device)
        text = (
            padded(text, self._room(micro.bucket, micro.text_tokens))
            if is_compiled
            else trimmed(text)
        )
        found = Inputs(
            micro=micro,
            work=workload(self._stage, micro, text),
            x_BCTHW=z_BCTHW,
            weight_B=samples.weight_B,
            noise_BCTHW=noise_BCTHW,
            t_B=t_B,
            text=text,
            given_BCTHW=self._given(micro, choice),
        )
        return found.ready_for(device)

    def _times_of(self, micro: Micro, normal_B: Tensor, use: Use) -> Tensor:
        if use == "level":
            return times_of(micro)
        times = self._times[micro.bucket.name]
        return timesteps(
            normal_B, times, uniforms(self._generators(micro, "time")) if times.uniform else None
        )

    def graphs(self, step: Step[Inputs]) -> frozenset[Graph]:
        """What this rank compiles for a step, unless it has before."""
        bucket = step.plan.bucket
        sizes = {(len(one.weight_B), one.micro.text_tokens) for one in step.micros}
        return frozenset((bucket.name, size, self._room(bucket, text)) for size, text in sizes)

    def _room(self, bucket: Bucket, longest: int) -> int:
        """Text tokens that are computed for; the null text may take the place of any other."""
        grid = self._stage.codec.grid(bucket.frames, bucket.height, bucket.width)
        tokens = self._stage.model.tokens(grid)
        null = len(self.null.embedding_LD)
        return text_room(max(longest, null), tokens, max(self._text_tokens, null))

    def _generators(self, micro: Micro, use: str) -> list[torch.Generator]:
        """The randomness of each sample of the micro-batch for one use.

        Levels of noise are measured alike in all stages, so that these can be compared.
        """
        stage, bucket = self._stage, micro.bucket.name
        seed, name = (0, "") if use == "level" else (stage.seed, stage.name)
        return [
            sample_generator(seed, name, use, bucket, int(epoch), int(sample_id))
            for epoch, sample_id in zip(micro.epochs, micro.samples.ids, strict=True)
        ]

    def _latents(self, micro: Micro, use: Use) -> Tensor:
        """The latents to be noised: where the posterior is sampled, a new sample or its mean."""
        x_BCTHW = micro.samples.x_BCTHW
        if self._stage.codec.mode == "mean":
            return x_BCTHW
        mean_BCTHW, deviation_BCTHW = x_BCTHW.float().chunk(2, dim=1)
        if use != "train":
            return mean_BCTHW
        generators = self._generators(micro, "posterior")
        return mean_BCTHW + deviation_BCTHW * normals(generators, tuple(mean_BCTHW.shape[1:]))

    def _given(self, micro: Micro, choice: Choice | None) -> Tensor | None:
        """The mask and latents of the given frames; None where the bucket has none to give."""
        stage, ends_BCTHW = self._stage, micro.samples.given_BCTHW
        if stage.given is None or not stage.gives(micro.bucket):
            return None
        assert ends_BCTHW is not None, f"bucket {micro.bucket.name} was stored without its stills"
        num_samples, frames = len(ends_BCTHW), micro.samples.x_BCTHW.shape[2]
        if choice is None:
            draws = uniforms(self._generators(micro, "given")).tolist()
            choices = [stage.given.choose(draw) for draw in draws]
        else:
            choices = [choice] * num_samples
        head_B = torch.tensor([each in ("head", "loop") for each in choices])
        tail_B = torch.tensor([each in ("tail", "loop") for each in choices])
        return given_frames(ends_BCTHW, head_B, tail_B, frames)

    def _dropped(self, micro: Micro, draw_B: Tensor, use: Use) -> tuple[Tensor, Tensor]:
        """Whose tokens and whose pooled vectors are dropped."""
        if use != "train":
            nobody_B = torch.zeros_like(draw_B, dtype=torch.bool)
            return nobody_B, nobody_B
        dropout = self._stage.text_dropout
        if isinstance(dropout, float):
            return draw_B < dropout, draw_B < dropout
        tokens, pooled = dropout
        return draw_B < tokens, uniforms(self._generators(micro, "pooled")) < pooled

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Mean flow loss, at noise and times that are fixed for each held-out sample.

        `loss` is that of text to video. Where frames are given in training, `loss_head` is the
        loss with the first one given, over the buckets that have frames to give. `loss_t0` and so
        on are those at fixed times, of fewer clips (elastic.noise_levels).
        """
        buckets = self._stage.buckets
        giving = tuple(bucket for bucket in buckets if self._stage.gives(bucket))
        means = {"loss": self._mean_loss(model, world, "none", buckets)}
        if giving:
            means["loss_head"] = self._mean_loss(model, world, "head", giving)
        found = {name: mean for name, mean in means.items() if mean is not None}
        return found | self._level_losses(model, world)

    def _mean_loss(
        self, model: nn.Module, world: World, choice: Choice, buckets: tuple[Bucket, ...]
    ) -> float | None:
        """The mean over the held-out samples of these buckets; None if there are none."""
        losses: list[Tensor] = []
        weights: list[Tensor] = []
        ready = partial(self._inputs, device=world.device, use="held-out", choice=choice)
        for bucket in buckets:
            micros = held_out_rounds(self.held_out, self._stage, bucket, world)
            for loss_B, inputs in self._measured(model, read_ahead(ready, micros, most=2), world):
                weight_B = inputs.weight_B.double()
                losses.append((loss_B * weight_B).sum())
                weights.append(weight_B.sum())
        total, count = totals([losses, weights], world)
        return total / count if count else None

    def _level_losses(self, model: nn.Module, world: World) -> dict[str, float]:
        """The mean at each level of noise, without given frames; none without held-out clips."""
        rows: list[Tensor] = []
        ready = partial(self._inputs, device=world.device, use="level", choice="none")
        for bucket in self._stage.buckets:
            micros = level_rounds(self.held_out, self._stage, bucket, world)
            for loss_B, inputs in self._measured(model, read_ahead(ready, micros, most=2), world):
                assert inputs.t_B is not None, "flow matching has times"
                rows.append(by_level(inputs.t_B, loss_B, inputs.weight_B))
        return level_means(column_totals(torch.cat(rows), world)) if rows else {}

    def _measured(
        self, model: nn.Module, ready: Iterable[Inputs], world: World
    ) -> Iterator[tuple[Tensor, Inputs]]:
        """The losses of each micro-batch, without gradients."""
        for inputs in on_device(ready, world.device):
            with torch.no_grad():
                loss_B = self.losses(model, inputs).model_B
            yield loss_B, inputs


class Reconstructing:
    """Pixels, and what else the stage names: KL, perceptual loss, critic (AutoencoderStage)."""

    def __init__(
        self,
        stage: AutoencoderStage,
        source: Source,
        held_out: Source,
        device: torch.device = _CPU,
    ) -> None:
        """`device` is the model's; the frozen perceptual network and the critic lie on it too.

        InputError if this machine's file of the perceptual network cannot be used.
        """
        self.source = source
        self._held_out = held_out
        self._stage = stage
        perceptual, adversarial = stage.perceptual, stage.adversarial
        # Frozen, and no part of the model: not sharded, not saved, not exported.
        try:
            self._perceptual = None if perceptual is None else perceptual.build().to(device)
        except ValueError as error:
            # Another try on this machine would only repeat it.
            raise InputError(
                f"stage {stage.name!r}: perceptual: {error}; every machine needs the same file at "
                "this path"
            ) from None
        self.critic = None if adversarial is None else Critic(stage, adversarial, device)

    def build(self) -> nn.Module:
        """The codec on the meta device."""
        return self._stage.build()

    def inputs(self, micro: Micro, device: torch.device) -> Inputs:
        """Pixels, and noise for the latent if its KL has a weight."""
        noise = self._noise(micro) if self._stage.kl_weight else None
        samples, work = micro.samples, workload(self._stage, micro)
        return Inputs(micro, work, samples.x_BCTHW, samples.weight_B, noise).ready_for(device)

    def _noise(self, micro: Micro) -> Tensor:
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
        return normals(generators, shape)

    def losses(self, model: nn.Module, inputs: Inputs) -> Losses:
        """Reconstruction loss per sample; the latent is sampled if its KL has a weight."""
        x_BCTHW, position = inputs.x_BCTHW, inputs.micro.position
        reconstruction = model(x_BCTHW, inputs.noise_BCTHW)
        parts_B = self._parts_B(x_BCTHW, reconstruction)
        critic_B = None
        if self.critic is not None and self.critic.judges_at(position):
            parts_B["loss_adversarial"] = self.critic.deception_B(reconstruction.x_BCTHW)
            critic_B = self.critic.loss_B(x_BCTHW, reconstruction.x_BCTHW)
        loss_B = torch.stack(list(parts_B.values())).sum(0)
        if critic_B is not None:
            parts_B["loss_critic"] = critic_B
        return Losses(loss_B, inputs.work, critic_B, parts_B if len(parts_B) > 1 else {})

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

    def graphs(self, step: Step[Inputs]) -> frozenset[Graph]:
        """Nothing of an autoencoder is compiled."""
        return frozenset()

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Means over held-out clips of PSNR in dB, SSIM and the loss, the latent at its mean.

        The loss is that without the critic, which changes with the position.
        """
        measured: list[list[Tensor]] = [[], [], [], []]
        for bucket in self._video_buckets():
            for micro in held_out_rounds(self._held_out, self._stage, bucket, world):
                x_BCTHW = micro.samples.x_BCTHW.to(world.device)
                with torch.no_grad():
                    output = model(x_BCTHW, None)
                    loss_B = torch.stack(list(self._parts_B(x_BCTHW, output).values())).sum(0)
                qualities_B = [q(x_BCTHW, output.x_BCTHW) for q in (psnr_B, ssim_B)]
                weight_B = micro.samples.weight_B.to(world.device).double()
                values_B = [*qualities_B, loss_B, torch.ones_like(weight_B)]
                for values, value_B in zip(measured, values_B, strict=True):
                    values.append((value_B * weight_B).sum())
        psnr, ssim, loss, count = totals(measured, world)
        return {"psnr": psnr / count, "ssim": ssim / count, "loss": loss / count} if count else {}

    def _video_buckets(self) -> tuple[Bucket, ...]:
        longest = max(bucket.frames for bucket in self._stage.buckets)
        return tuple(bucket for bucket in self._stage.buckets if bucket.frames == longest)
