"""Which latents a stage uses: pinned at its turn, or before it.

What is pinned before is valid as long as nothing changes that it follows from.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic.attempt import Latents
from elastic.data.assign import Members
from elastic.data.encode import EncodeJob, plan_job
from elastic.data.latents import Scale
from elastic.data.places import join, parent
from elastic.data.store_folder import folder_at
from elastic.data.verify import FIELDS
from elastic.errors import InputError
from elastic.files import write_atomic
from elastic.folders import LATENT_PINS, MEMBERS, RunFolder
from elastic.record import described, difference, has_started
from elastic.weights import WEIGHTS
from stages.init import Align, Continue, Init
from stages.stage import AutoencoderStage, DiffusionStage, Stage

AHEAD = "ahead.json"  # in a stage's folder: what its clips and latents were chosen for
_FIELDS = ("data", "vae", "text", "rate", "given")


def pin_of(folder: RunFolder, stage: Stage) -> Path:
    """The file that says which latents a stage uses; there once they are encoded."""
    return folder.stage(stage.name) / LATENT_PINS


def codec_weights(folder: RunFolder, stage: DiffusionStage) -> Path:
    """The file with the weights of the stage's codec."""
    if isinstance(stage.vae, AutoencoderStage):
        return folder.stage(stage.vae.name) / WEIGHTS
    assert stage.vae.weights is not None, "checked when the stage was made"
    path = Path(stage.vae.weights).absolute()
    if not path.is_file():
        raise InputError(f"stage {stage.name!r}: vae.weights {str(path)!r}: no such file")
    return path


def job_of(
    folder: RunFolder,
    stage: DiffusionStage,
    members: Members,
    find_scale: Callable[[Path], Scale],
    packed: bool = False,
) -> EncodeJob:
    """What the stage's latents are; the scale is found, with the codec's weights, if need be.

    InputError if the stage was pinned to others.
    """
    weights = codec_weights(folder, stage)
    pinned = pin_of(folder, stage)
    scale = read_scale(pinned) or scale_ahead(folder, stage)
    if scale is None and isinstance(stage.init, Continue):
        # The parameters that go on know latents of this scale.
        scale = read_scale(folder.stage(stage.init.stage.name) / LATENT_PINS)
    if scale is None:
        scale = find_scale(weights)
    job = plan_job(stage, weights, scale, members, folder.latents)
    job = replace(job, packed=packed)
    check_pinned(job, pinned)
    return job


def pin_latents(folder: RunFolder, job: EncodeJob, digest: str) -> Latents:
    """Note that the stage uses the store of a job, which was sealed with this digest."""
    content = {
        "fingerprint": job.fingerprint,
        "digest": digest,
        "scale": {"mean": job.scale.mean, "std": job.scale.std},
        "weights": str(job.weights),
        "weights_sha256": job.weights_digest,
    }
    write_atomic(pin_of(folder, job.stage), json.dumps(content, indent=1).encode())
    return Latents(job.root, job.fingerprint, digest)


def pinned_latents(folder: RunFolder, init: Init) -> Latents | None:
    """The latents that the parent was trained on, where the policy pairs them with the stage's."""
    if not isinstance(init, Align):
        return None
    pinned = json.loads((folder.stage(init.stage.name) / LATENT_PINS).read_text())
    root = join(folder.latents, pinned["fingerprint"])
    return Latents(root, pinned["fingerprint"], pinned["digest"])


def check_pinned(job: EncodeJob, pinned: Path) -> None:
    """InputError, with what differs, if the stage was pinned to other latents than the job's."""
    if not pinned.exists():
        return
    before = json.loads(pinned.read_text())["fingerprint"]
    if before == job.fingerprint:
        return
    new = json.loads(folder_at(job.root).read(FIELDS))
    try:
        fields = json.loads(folder_at(join(parent(job.root), before)).read(FIELDS))
        changes = difference(fields, new)
    except FileNotFoundError:
        changes = ["those are gone, so what differs is not known"]
    raise InputError(
        f"stage {job.stage.name!r} was pinned to the latents {before}, and would now get others: "
        f"{'; '.join(changes)}. Put back what was there, or give the stage another "
        f"name; while it has not been trained, {pinned} may be deleted instead"
    )


def read_scale(path: Path) -> Scale | None:
    """The normalisation that a stage's latents were stored with, if it is known."""
    if not path.exists():
        return None
    scale = json.loads(path.read_text())["scale"]
    return Scale(tuple(scale["mean"]), tuple(scale["std"]))


def note_ahead(folder: RunFolder, stage: DiffusionStage, scale: Scale | None = None) -> None:
    """Note what the stage's clips, and its scale once that is known, are pinned for."""
    note = {"stage": _asked(stage), "scale": scale and {"mean": scale.mean, "std": scale.std}}
    write_atomic(folder.stage(stage.name) / AHEAD, json.dumps(note, indent=1).encode())


def scale_ahead(folder: RunFolder, stage: DiffusionStage) -> Scale | None:
    """The scale that was found ahead: measured elsewhere it might differ in its last bit."""
    path = folder.stage(stage.name) / AHEAD
    scale = json.loads(path.read_text())["scale"] if path.exists() else None
    return scale and Scale(tuple(scale["mean"]), tuple(scale["std"]))


def forget_stale(folder: RunFolder, stage: Stage) -> None:
    """Remove what was pinned ahead for the stage as it is no more; not once it has started."""
    own = folder.stage(stage.name)
    if not (own / AHEAD).exists() or has_started(folder, stage):
        return
    assert isinstance(stage, DiffusionStage), f"{stage.name}: {AHEAD} of another kind of stage"
    before = json.loads((own / AHEAD).read_text())["stage"]
    if difference(before, json.loads(json.dumps(_asked(stage)))):
        # The note last: what a kill leaves is found stale again.
        for name in (LATENT_PINS, MEMBERS, AHEAD):
            (own / name).unlink(missing_ok=True)


def _asked(stage: DiffusionStage) -> dict[str, Any]:  # Any: JSON
    """All that decides which clips and latents a stage gets, but the files themselves."""
    fields = {name: value for name, value in described(stage).items() if name in _FIELDS}
    goes_on = stage.init.stage.name if isinstance(stage.init, Continue) else None
    buckets = [[b.name, b.frames, b.height, b.width] for b in stage.buckets]
    return {**fields, "buckets": buckets, "goes_on": goes_on}
