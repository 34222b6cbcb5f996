"""What identifies a stage: every field that can change its result, and no other."""

from typing import Any

from stages.init import parent_of
from stages.noise import Noise
from stages.stage import AutoencoderStage, DiffusionStage, Stage

# What may change between two starts of the same stage: none of it changes the result, but for the
# rounding of compiled blocks and of sums over other ranks.
RUNTIME_FIELDS = frozenset(
    {
        *("workers", "context", "shard_within", "recompute", "compile"),
        *("save_every", "log_every", "evaluate_every", "sample_every"),
    }
)


def description(stage: Stage) -> dict[str, Any]:  # Any: JSON of whatever the fields hold
    """What identifies the stage: every field that can change its result, a parent by its name.

    How an autoencoder cuts and normalises latents is no part of its training: the stores that are
    encoded with it have that in their fingerprint.
    """
    fields = stage.model_dump(mode="json", exclude=set(RUNTIME_FIELDS))
    if isinstance(stage, AutoencoderStage):
        for later in ("tiling", "normalisation", "posterior"):
            fields["vae"].pop(later, None)
    if isinstance(stage, DiffusionStage) and isinstance(stage.vae, AutoencoderStage):
        fields["vae"] = {"stage": stage.vae.name}
    parent = parent_of(stage.init)
    if parent is not None:
        fields["init"]["stage"] = parent.name
    fields["init"] = {"policy": type(stage.init).__name__} | {
        name: value
        for name, value in fields["init"].items()
        if not name.startswith("guard_") and (name, value) != ("at", None)
    }
    if stage.order is None:  # as in runs of before there were others
        del fields["order"]
    if stage.match == "aspect":  # those of before there were two keep the clips they began with
        del fields["match"]
    if isinstance(stage, DiffusionStage) and stage.noise == Noise():  # as before there were others
        del fields["noise"]
    if not stage.exact:  # the order in which a batch is added up
        for phase in fields["schedule"]:
            for bucket in phase["buckets"]:
                del bucket["micro"]
    return {"kind": type(stage).__name__, **fields}
