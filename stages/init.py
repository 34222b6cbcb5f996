"""Init policies: from which parameters a stage starts.

A parent stage is given as a value. What each policy does with parameters, average, optimizer,
position, warm-up and rotary positions stands in its docstring.
"""

import fnmatch
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from models.dit import codec_shaped
from models.layouts import LayoutName, RotaryName
from models.record import Record

if TYPE_CHECKING:  # a stage holds a policy and a policy may hold a stage: pydantic is told in stage
    from stages.stage import AutoencoderStage, DiffusionStage


class Fresh(Record):
    """Every parameter new; optimizer, average and position at zero.

    Each parameter is a function of (seed, stage name, parameter name) on its full shape, so a
    start on 3 workers and one on 8 are the same start. This is the published configuration of
    Open-Sora 2.0's switch (configs/diffusion/train/high_compression.py, `from_pretrained=None`).
    """

    seed: int = Field(default=0, ge=0)


class Continue(Record):
    """The parent's parameters and average as they were at its end: same shapes, other buckets.

    Optimizer: carried with its count of updates, or reset. Position, learning rate and its warm-up
    start at 0; the average's half-life goes on growing from where the parent left it. Latents are
    normalised as the parent's were. A DiT may gain `image_condition`: its layer starts at zero. A
    discriminator starts anew.

    The order of data is the stage's own, from its beginning, as (seed, name) draw it: clips that
    the parent has seen in its epoch under way may come again, and others later.

    With `at` it branches: it starts from the parent's checkpoint at that position, and the parent
    need not be finished (stages.lineage says how far it is trained then).
    """

    stage: "AutoencoderStage | DiffusionStage"
    optimizer: Literal["carry", "reset"] = "carry"
    at: int | None = Field(default=None, ge=1)
    """The parent's samples seen at one of its checkpoints; None is its end."""

    @field_validator("stage", mode="before")
    @classmethod
    def _is_a_stage(cls, stage: object) -> object:
        if isinstance(stage, dict) or "schedule" in getattr(type(stage), "model_fields", {}):
            return stage  # a dict: read back from JSON
        raise ValueError(f"{stage!r} is no stage; give the stage itself (its variable, not a name)")

    def __init__(self, stage: object = None, **fields: object) -> None:
        super().__init__(**({} if stage is None else {"stage": stage}), **fields)


class Switch(Record):
    """What every start from other weights has: fields that keep the first samples in check."""

    seed: int = Field(default=0, ge=0)
    """Seed of the parameters that are new."""
    fresh: tuple[str, ...] = ()
    """Patterns, such as "txt_in.*", of further parameters that start anew."""
    warmup_samples: int = Field(default=0, ge=0)
    """Samples for which only the new parameters move."""
    guard_samples: int = Field(default=1_000_000, ge=0)
    """Samples for which the loss is watched, unless a discriminator moves it; no result changes."""
    guard_factor: float = Field(default=2.0, gt=1, allow_inf_nan=False)
    """A loss this many times the lowest one, over several lines of the log, ends the stage."""


class KeepTrunk(Switch):
    """The parent's averaged parameters; only layers whose shape depends on the codec are new.

    Open-Sora 2.0's paper (arXiv 2503.09642, 4.3.3) and PixArt-Sigma. For `warmup_samples` the trunk
    is held (its gradients count neither for the norm nor for an update, only for its moments), then
    its learning rate warms up from 0 as the optimizer's `warmup` says. Optimizer, average and
    position start at 0.
    Rotary positions count tokens of another size now: give the model rope_unit="pixel" to keep the
    distances that the trunk knows. `at` is that of Continue.
    """

    stage: "DiffusionStage"
    at: int | None = Field(default=None, ge=1)
    """The parent's samples seen at one of its checkpoints; None is its end."""

    @field_validator("stage", mode="before")
    @classmethod
    def _has_a_trunk(cls, stage: object) -> object:
        fits = isinstance(stage, dict) or "model" in getattr(type(stage), "model_fields", {})
        if not fits:  # a dict: read back from JSON
            shown = getattr(stage, "name", stage)
            raise ValueError(
                f"{shown!r} is no DiffusionStage, so it has no trunk to keep; give the stage that "
                "trains the DiT (its variable, not its name)"
            )
        return stage

    def __init__(self, stage: object = None, **fields: object) -> None:
        super().__init__(**({} if stage is None else {"stage": stage}), **fields)  # type: ignore[arg-type]  # pydantic checks them


class Align(KeepTrunk):
    """As KeepTrunk, but the new patch embedding is solved for: it imitates the old one.

    One ridge regression of the parent's embedding of the old latents, averaged over the pixels of
    each new token, on the new latents of the same clips, at the noise levels that training draws;
    no captions, one pass. What the old patch could not see is embedded afresh. The output layer is
    new and starts at zero. After DC-VideoGen's alignment
    phase (arXiv 2509.25182), which trains the same quadratic for 20,000 steps.
    """

    clips: int = Field(default=256, ge=1)
    """Clips that are in both stages' latents to solve from."""
    ridge: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Weight of the penalty, as a share of the latents' mean square."""

    def __init__(self, stage: object = None, **fields: object) -> None:
        super().__init__(stage, **fields)


class FromFile(Switch):
    """Parameters from safetensors: Open-Sora v2, BFL FLUX or diffusers FLUX, or a codec's own file.

    Everything in the file is used and everything in the model comes from it, but for what `fresh`
    and `drop` name; anything else is refused. Optimizer, average and position start at 0; rotary
    pairs are converted to ours, positions are what `rope_unit` says ("token" in published files).
    """

    path: str = Field(min_length=1)
    layout: Literal["auto"] | LayoutName = "auto"
    rotary: Literal["auto"] | RotaryName = "auto"
    """Which channels of a head are turned together; "half-split" for fused files made so."""
    drop: tuple[str, ...] = ()
    """Patterns of the file's keys that are left out."""

    def __init__(self, path: object = None, **fields: object) -> None:
        super().__init__(**({} if path is None else {"path": path}), **fields)  # type: ignore[arg-type]  # pydantic checks them


Init = Fresh | Continue | KeepTrunk | Align | FromFile


def parent_of(init: Init) -> "AutoencoderStage | DiffusionStage | None":
    """The stage that a policy starts from."""
    return init.stage if isinstance(init, Continue | KeepTrunk) else None


def branch_of(init: Init) -> int | None:
    """The position in the midst of its parent that a policy starts from; None for all others."""
    return init.at if isinstance(init, Continue | KeepTrunk) else None


def parent_samples(init: Continue | KeepTrunk) -> int:
    """Samples that the parent has seen where a policy starts from it."""
    return init.stage.budget if init.at is None else init.at


def seed_of(init: Init) -> int:
    """The seed of the parameters that are new."""
    return 0 if isinstance(init, Continue) else init.seed


def is_asked_new(init: Init, name: str) -> bool:
    """Whether the policy itself says that this parameter starts anew."""
    if isinstance(init, Fresh):
        return True
    if isinstance(init, KeepTrunk) and codec_shaped(name):
        return True
    return isinstance(init, Switch) and matches(init.fresh, name)


def is_held(init: Init, name: str) -> bool:
    """Whether this parameter waits until the policy's warm-up is over."""
    return isinstance(init, Switch) and init.warmup_samples > 0 and not is_asked_new(init, name)


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Whether any of the patterns fits the whole name; `*` stands for anything."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
