"""The two kinds of stage: training an autoencoder, and training a DiT on its latents."""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from models.codec import Codec, CodecModule
from models.dc_ae import DCAE
from models.dit import DiT, MMDiT
from models.flow import Times
from models.hunyuan_vae import HunyuanVAE
from models.perceptual import SMALLEST_SIDE, Lpips, Pyramid
from models.published import LTXVAE, HunyuanVAE15, ImageDCAE, Wan21VAE, Wan22VAE
from models.recompute import Recompute
from models.record import Record
from models.t5_clip import T5Clip
from models.text import WordHash
from stages.adversarial import Adversarial
from stages.given import Given
from stages.init import Align, Continue, Fresh, FromFile, KeepTrunk
from stages.layout import check_heads, check_layout, multiple
from stages.names import SafeName
from stages.noise import Noise
from stages.optimizer import AdamW, Ema, Muon
from stages.schedule import Bucket, Phase, Windows, check_schedule
from stages.videos import Data, Mix, Videos

# A closed union rather than `Codec`: it reads back from JSON, and dumps every field.
AnyCodec = Annotated[
    HunyuanVAE | DCAE | HunyuanVAE15 | Wan21VAE | Wan22VAE | LTXVAE | ImageDCAE,
    Field(discriminator="kind"),
]


Match = Literal["aspect", "any"]
"""Which buckets have a clip: those that are nearest to its shape, or any that it can fill."""


class _Stage(Record):
    name: SafeName
    data: Data
    init: Fresh | Continue | KeepTrunk | Align | FromFile = Fresh()
    schedule: tuple[Phase, ...]
    optimizer: AdamW | Muon
    ema: Ema
    rate: float = Field(default=24.0, gt=0, le=240)
    """Frames per second at which clips are sampled."""
    match: Match = "aspect"
    """Which buckets have a clip, of those that are as long and of like area.

    "aspect": the ones whose height over width is nearest to the clip's. "any": every one, however
    much is cut off or, of a narrow clip, blown up.
    """
    seed: int = Field(default=0, ge=0)
    """Seed of the sample order and of the noise."""
    order: Windows | None = None
    """None: any sample may follow any other; `Windows()` keeps what is read together together."""
    workers: tuple[int, int] = (1, 64)
    """Fewest and most workers; the stage starts with what is free."""
    context: int = Field(default=1, ge=1)
    """Workers that share the tokens of one sample of a DiT (context parallelism): for long clips.

    The number of workers is always a multiple of it, and the heads are too.
    """
    shard_within: int | None = Field(default=None, ge=1)
    """Neighbouring workers that hold a model together; each group of so many holds all of it.

    None: all workers together (FSDP). Else hybrid sharding (HSDP), say of the GPUs of a node: the
    number of workers is always a multiple of it, and what is gathered does not leave the group.
    """
    save_every: int = Field(gt=0)
    """Samples between checkpoints."""
    log_every: int = Field(gt=0)
    """Samples between lines of metrics."""
    evaluate_every: int = Field(gt=0)
    """Samples between measurements on the held-out clips."""
    held_out: int = Field(default=64, ge=1)
    """Most held-out clips to measure on."""
    recompute: Recompute = "none"
    """What layers compute again in the backward pass instead of keeping it; same result.

    "selective", for a DiT, keeps what is dear for its bytes: attention and the products after it.
    """
    compile: bool | None = None
    """Whether the blocks of a DiT are compiled; None compiles them on a GPU, unless `exact`.

    And the encoder of a DC-AE that makes its latents: with None on a GPU where there are so many
    clips that it pays, with True always. Some latents then differ in the last bit of bf16.
    Samples of the finished stage likewise, where there is so much to compute that it pays.
    """
    exact: bool = False
    """Whether losses and parameters are the same to the bit on any number of workers.

    Through every resize and restart, with one kind of processor and one version of torch. The
    micro-batch of a bucket is then a part of the result.
    """

    @field_validator("data", mode="before")
    @classmethod
    def _check_data(cls, data: object) -> object:
        """One message instead of one for each branch of the union."""
        if isinstance(data, Videos | Mix | dict):  # a dict: read back from JSON
            return data
        raise ValueError(
            f"{data!r} is no source of clips; give Videos('clips.parquet'), Videos('folder/'), or "
            "Mix((Videos(...), 0.7), (Videos(...), 0.3))"
        )

    @property
    def budget(self) -> int:
        """Samples after which the stage is finished."""
        return self.schedule[-1].until

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every bucket of the schedule, once by name, in order of first use."""
        by_name = {b.name: b for phase in self.schedule for b in phase.buckets}
        return tuple(by_name.values())

    def _check(self, codec: Codec, patch: int) -> None:
        where = f"stage {self.name!r}"
        try:
            check_schedule(self.schedule)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for index, phase in enumerate(self.schedule):
            for number, bucket in enumerate(phase.buckets):
                try:
                    codec.check(bucket.frames, bucket.height, bucket.width, patch)
                except ValueError as error:
                    field = f"schedule[{index}].buckets[{number}]"
                    raise ValueError(f"{where}: {field}: {error}") from None
        low, high = self.workers
        if not 1 <= low <= high:
            raise ValueError(f"{where}: workers {self.workers}: write (fewest, most), 1 or more")
        try:
            check_layout(self.workers, self.context, self.shard_within, self.exact)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for field in ("warmup", "decay"):
            value = getattr(self.optimizer, field)
            if value > self.budget:
                raise ValueError(
                    f"{where}: optimizer.{field} {value}: longer than the stage "
                    f"({self.budget} samples)"
                )

    @property
    def multiple(self) -> int:
        """What the number of workers is always a multiple of."""
        return multiple(self.context, self.shard_within)

    def holders(self, workers: int) -> int:
        """Over how many of so many workers one copy of the model is sharded."""
        return min(workers, self.shard_within or workers)


class AutoencoderStage(_Stage):
    """Train a codec from pixels: absolute plus squared error, and whatever else is wanted.

    That is a small KL term, a perceptual loss, and from some phase on a discriminator.
    """

    vae: AnyCodec
    kl_weight: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    """Weight of the KL in nats per latent element; 0 trains at the posterior's mean, no noise."""
    perceptual: Lpips | Pyramid | None = None
    """How unlike the frames look; `Pyramid` where there are no weights for `Lpips`."""
    adversarial: Adversarial | None = None
    """The discriminator, and the phase from which on it judges."""

    @field_validator("perceptual", mode="before")
    @classmethod
    def _check_perceptual(cls, perceptual: object) -> object:
        """One message instead of one for each branch of the union."""
        if perceptual is None or isinstance(perceptual, Lpips | Pyramid | dict):  # a dict: of JSON
            return perceptual
        raise ValueError(
            f"{perceptual!r} is no perceptual loss; give Lpips(weights='path.safetensors'), "
            "Pyramid(), or None"
        )

    @model_validator(mode="after")
    def _check_stage(self) -> "AutoencoderStage":
        self._check(self.vae, patch=1)
        if not self.vae.is_trainable:
            raise ValueError(
                f"stage {self.name!r}: vae: {self.vae.name} cannot be trained here, since no rule "
                "says how its layers start; give its weights to a DiffusionStage, or train "
                "HunyuanVAE, DCAE or LTXVAE"
            )
        if self.recompute == "selective":
            raise ValueError(
                f"stage {self.name!r}: recompute 'selective': that is for the blocks of a DiT; "
                "write 'full' or 'none'"
            )
        if self.compile:
            raise ValueError(
                f"stage {self.name!r}: compile True: only the blocks of a DiT are compiled; leave "
                "it out"
            )
        if self.context > 1:
            raise ValueError(
                f"stage {self.name!r}: context {self.context}: the tokens of a DiT can be shared, "
                "the pixels of an autoencoder cannot; leave it out"
            )
        if self.recompute == "full" and not self.vae.can_recompute:
            raise ValueError(
                f"stage {self.name!r}: recompute 'full': {self.vae.name} keeps what it computes; "
                "write 'none', or train a DCAE"
            )
        if self.vae.normalisation == "published":
            raise ValueError(
                f"stage {self.name!r}: vae.normalisation 'published': the constants are those of "
                "published weights, and a stage trains its own; write 'measured'"
            )
        if self.vae.weights is not None:
            raise ValueError(
                f"stage {self.name!r}: vae.weights {self.vae.weights!r}: an autoencoder stage "
                "trains from fresh parameters; leave weights out"
            )
        if self.adversarial is not None:
            try:
                self.adversarial.check(self.schedule)
            except ValueError as error:
                raise ValueError(f"stage {self.name!r}: adversarial.{error}") from None
        if isinstance(self.perceptual, Lpips):
            self._check_lpips_sides()
        return self

    def _check_lpips_sides(self) -> None:
        for index, phase in enumerate(self.schedule):
            for number, bucket in enumerate(phase.buckets):
                if min(bucket.height, bucket.width) >= SMALLEST_SIDE:
                    continue
                sides = zip((bucket.height, bucket.width), self.vae.stride[1:], strict=True)
                # Whole strides, rounded up.
                high, wide = (max(p, -(-SMALLEST_SIDE // down) * down) for p, down in sides)
                raise ValueError(
                    f"stage {self.name!r}: schedule[{index}].buckets[{number}]: {bucket.size!r} is "
                    f"too small for perceptual=Lpips, which halves frames four times and needs "
                    f"sides of {SMALLEST_SIDE} px; the nearest is '{high}x{wide}', or take Pyramid"
                )

    @property
    def codec(self) -> Codec:
        """The codec that is trained."""
        return self.vae

    def build(self, device: torch.device | str = "meta") -> CodecModule:
        """The codec's module."""
        return self.vae.build(device).recompute(self.recompute == "full")


class DiffusionStage(_Stage):
    """Train a DiT by flow matching on the latents of a codec, or of the stage that trains one."""

    vae: AnyCodec | AutoencoderStage
    model: DiT
    text: WordHash | T5Clip = WordHash()
    precision: Literal["fp32", "bf16"] = "fp32"
    """What blocks compute in, samples included; parameters, optimizer and sums are fp32 always."""
    text_dropout: float | tuple[float, float] = 0.1
    """Share of samples trained with the null text, for classifier-free guidance.

    A pair is one share for the tokens and one for the pooled vector, drawn independently: with
    the published (0.31622777, 0.31622777) a tenth of the samples loses both.
    """
    given: Given | None = None
    """How often frames of the clip are given; with `model.image_condition`, and only then.

    Clips of one latent frame are given nothing.
    """
    noise: Noise = Noise()
    """How much noise samples are trained with."""
    sample_every: int | None = Field(default=None, gt=0)
    """Samples seen between videos for a few captions; None: there are videos only at the end."""

    @field_validator("vae", mode="before")
    @classmethod
    def _check_vae(cls, vae: object) -> object:
        """One message instead of one for each branch of the union."""
        if isinstance(vae, Codec | AutoencoderStage | dict):  # a dict: read back from JSON
            return vae
        shown = f"the {type(vae).__name__} {vae.name!r}" if isinstance(vae, _Stage) else repr(vae)
        raise ValueError(
            f"{shown} is no autoencoder; give the AutoencoderStage itself (its variable, not its "
            "name), or a codec with weights"
        )

    @field_validator("text", mode="before")
    @classmethod
    def _check_text(cls, text: object) -> object:
        """One message instead of one for each branch of the union."""
        if isinstance(text, WordHash | T5Clip | dict):  # a dict: read back from JSON
            return text
        raise ValueError(
            f"{text!r} is no text encoder; give WordHash(), or T5Clip(t5='FOLDER', clip='FOLDER')"
        )

    @field_validator("text_dropout", mode="before")
    @classmethod
    def _check_dropout(cls, dropout: object) -> object:
        """One message instead of one for each branch of the union."""
        shares = dropout if isinstance(dropout, tuple | list) else (dropout, dropout)
        # A bool is an int in Python, and False would be a share of 0.
        numbers = [s for s in shares if isinstance(s, float | int) and not isinstance(s, bool)]
        if len(shares) != 2 or len(numbers) != 2 or not all(0 <= s < 1 for s in numbers):
            raise ValueError(
                f"{dropout!r}: write a share of 0 or more and less than 1, or a pair of them: "
                "(of the tokens, of the pooled vector)"
            )
        return dropout

    @model_validator(mode="after")
    def _check_stage(self) -> "DiffusionStage":
        self._check(self.codec, self.model.patch)
        if isinstance(self.vae, Codec) and self.vae.weights is None:
            raise ValueError(
                f"stage {self.name!r}: vae: {self.vae.name} has no weights; give "
                "weights='path.safetensors', or the AutoencoderStage that trains it"
            )
        if self.compile and self.exact:
            raise ValueError(
                f"stage {self.name!r}: compile True with exact=True: kernels are chosen by timing "
                "them, so the bits would depend on the moment; leave compile out"
            )
        self._check_given()
        try:
            check_heads(self.model.heads, self.context)
        except ValueError as error:
            raise ValueError(f"stage {self.name!r}: {error}") from None
        return self

    def _check_given(self) -> None:
        where, takes = f"stage {self.name!r}: given", self.model.image_condition
        if self.given is None and takes:
            raise ValueError(
                f"{where}: None, but the model takes frames (image_condition=True): say how often "
                "they are given, as published with given=Given()"
            )
        if self.given is not None and not takes:
            raise ValueError(
                f"{where}: {self.given!r}, but the model takes no frames: write "
                "model=DiT(..., image_condition=True), or leave given out"
            )
        if self.given is not None and not any(self.gives(bucket) for bucket in self.buckets):
            raise ValueError(
                f"{where}: {self.given!r}, but every bucket has a single latent frame, for which "
                "nothing is given: add a bucket of longer clips"
            )

    def gives(self, bucket: Bucket) -> bool:
        """Whether frames are given in this bucket."""
        grid = self.codec.grid(bucket.frames, bucket.height, bucket.width)
        return self.given is not None and grid[0] > 1

    def times(self, bucket: Bucket) -> Times:
        """How times are drawn in this bucket; the shift is that of its samples too."""
        grid = self.codec.grid(bucket.frames, bucket.height, bucket.width)
        frames, height, width = self.model.token_grid(grid)
        return self.noise.times(height * width, frames)

    @property
    def codec(self) -> Codec:
        """The codec whose latents are used."""
        return self.vae.vae if isinstance(self.vae, AutoencoderStage) else self.vae

    def build(self, device: torch.device | str = "meta") -> MMDiT:
        """The DiT for the stage's codec and text."""
        codec, text = self.codec, self.text
        model = self.model.build(
            codec.channels, text.width, text.pooled_width, device, stride=codec.stride
        )
        return model.recompute(self.recompute)


Stage = AutoencoderStage | DiffusionStage

for _record in (Continue, KeepTrunk, Align, AutoencoderStage, DiffusionStage):
    _record.model_rebuild()
