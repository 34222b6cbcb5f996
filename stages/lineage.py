"""Which stages a stage needs, and whether it can start from them as its init policy says."""

from collections.abc import Sequence

from models.dit import GUIDANCE_LAYERS, DiT
from stages.init import (
    Align,
    Continue,
    FromFile,
    KeepTrunk,
    Switch,
    branch_of,
    is_asked_new,
    parent_of,
)
from stages.stage import AutoencoderStage, DiffusionStage, Stage

# Of a DiT: what may differ where a trunk is kept, and where a stage goes on with all of it.
_ENDS = {"patch", "rope_unit", "image_condition"}
_GAINED = {"image_condition"}


def parents(stage: Stage) -> list[tuple[str, Stage]]:
    """The stages that come first, with the field that names each."""
    found: list[tuple[str, Stage]] = []
    if isinstance(stage, DiffusionStage) and isinstance(stage.vae, AutoencoderStage):
        found.append(("vae", stage.vae))
    parent = parent_of(stage.init)
    if parent is not None:
        found.append(("init", parent))
    return found


def branches(stages: Sequence[Stage], parent: Stage) -> dict[str, int]:
    """The stages of a plan that branch from this one: their names, and from which position."""
    return {
        stage.name: at
        for stage in stages
        if (at := branch_of(stage.init)) is not None and parent_of(stage.init) == parent
    }


def is_left(stages: Sequence[Stage], stage: Stage) -> bool:
    """Whether a plan trains a stage no further than it has come.

    That is so where stages of the plan branch from it, and none needs what it is at its end: who
    writes `Continue(stage, at=...)` wants the branch in place of the rest. It loses nothing: a plan
    without its branches, or with a stage that needs its end, trains it on.
    """
    needed = any(
        other == stage and not (field == "init" and branch_of(child.init) is not None)
        for child in stages
        for field, other in parents(child)
    )
    return not needed and bool(branches(stages, stage))


def check_init(stage: Stage) -> None:
    """Raise ValueError where the policy does not fit the stage or its parent."""
    init, where = stage.init, f"stage {stage.name!r}: init: {type(stage.init).__name__}"
    if isinstance(init, Switch) and init.warmup_samples:
        room = stage.budget - stage.optimizer.warmup
        if init.warmup_samples >= room:
            raise ValueError(
                f"{where}.warmup_samples {init.warmup_samples}: with the optimizer's warmup of "
                f"{stage.optimizer.warmup} after it, what is held would not get its full rate in "
                f"the stage's {stage.budget} samples; write less than {max(room, 0)}"
            )
    if isinstance(init, Continue | KeepTrunk) and init.at is not None:
        _check_at(init.at, init.stage, where)
    _check_guidance(stage, where)
    if isinstance(init, Continue):
        _check_same(stage, init.stage, init.optimizer, where)
    elif isinstance(init, KeepTrunk):
        _check_trunk(stage, init.stage, where)
    elif isinstance(init, FromFile):
        is_codec, asked = isinstance(stage, AutoencoderStage), (init.layout, init.rotary)
        if is_codec and asked != ("auto", "auto"):
            raise ValueError(f"{where}: layout and rotary are a DiT's; leave them out for a codec")


def _check_at(at: int, parent: Stage, where: str) -> None:
    if at >= parent.budget:
        raise ValueError(
            f"{where}: at {at}: the parent {parent.name!r} ends at {parent.budget}; give a "
            "position before that, or leave `at` out to start from its end"
        )


def _check_guidance(stage: Stage, where: str) -> None:
    """A strength that is an input has to be known already: training shows one strength alone.

    A parent has been looked at in its own turn, and has the same field.
    """
    if not isinstance(stage, DiffusionStage) or not stage.model.guidance:
        return
    new = [name for name in GUIDANCE_LAYERS if is_asked_new(stage.init, name)]
    if new:
        raise ValueError(
            f"{where}: model.guidance is True, and {new[0]!r} would be new: training shows it the "
            "strength 1 alone, and sampling asks it for others in place of classifier-free "
            "guidance; leave guidance out of the model, or start from a file that has learnt it, "
            "as init=FromFile('flux1-dev.safetensors') does, and keep guidance_in of it"
        )


def _check_same(stage: Stage, parent: Stage, optimizer: str, where: str) -> None:
    if type(parent) is not type(stage):
        raise ValueError(
            f"{where}: the parent {parent.name!r} is a {type(parent).__name__}, this stage a "
            f"{type(stage).__name__}; both must train the same kind of model"
        )
    if optimizer == "carry" and type(parent.optimizer) is not type(stage.optimizer):
        raise ValueError(
            f"{where}: the parent {parent.name!r} has {type(parent.optimizer).__name__}, this "
            f"stage {type(stage.optimizer).__name__}, whose state is another one; write "
            "optimizer='reset', or use the same optimizer"
        )
    if isinstance(stage, AutoencoderStage) and isinstance(parent, AutoencoderStage):
        if stage.vae != parent.vae:
            raise ValueError(
                f"{where}: the vae is not that of the parent {parent.name!r}; continue with "
                f"vae={parent.vae!r}"
            )
        return
    assert isinstance(stage, DiffusionStage), type(stage)
    assert isinstance(parent, DiffusionStage), type(parent)
    if stage.vae != parent.vae:
        raise ValueError(
            f"{where}: its latents are not those of the parent {parent.name!r} (another vae); "
            "a switch of the autoencoder is KeepTrunk(stage), Align(stage) or Fresh()"
        )
    _check_models(stage, parent, where, _GAINED)
    if stage.model.image_condition and not parent.model.image_condition and optimizer == "carry":
        raise ValueError(
            f"{where}: the stage gains image_condition, whose layer has no optimizer state to "
            "carry; write optimizer='reset'"
        )
    if parent.model.image_condition and not stage.model.image_condition:
        raise ValueError(f"{where}: the parent has image_condition=True, so this stage has it too")


def _check_trunk(stage: Stage, parent: Stage, where: str) -> None:
    if isinstance(stage, AutoencoderStage):
        raise ValueError(
            f"{where}: an autoencoder has no trunk to keep; use Fresh, Continue or FromFile"
        )
    assert isinstance(parent, DiffusionStage), f"{parent.name} is a {type(parent).__name__}"
    _check_models(stage, parent, where, _ENDS)
    longest = max(bucket.frames for bucket in parent.buckets)
    if isinstance(stage.init, Align) and longest == 1 < max(b.frames for b in stage.buckets):
        raise ValueError(f"{where}: the parent {parent.name!r} has stills only, this stage clips")


def _check_models(stage: DiffusionStage, parent: DiffusionStage, where: str, may: set[str]) -> None:
    for field in DiT.model_fields:
        here, there = getattr(stage.model, field), getattr(parent.model, field)
        if here != there and field not in may:
            raise ValueError(
                f"{where}: model.{field} is {here!r}, that of the parent {parent.name!r} "
                f"{there!r}; take the parent's model, and replace no other field than "
                f"{', '.join(sorted(may))}"
            )
    if stage.text != parent.text:
        raise ValueError(
            f"{where}: text {stage.text!r} is not the parent's {parent.text!r}, whose embeddings "
            "the kept parameters know; use the same"
        )
