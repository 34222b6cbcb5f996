"""Which latents a stage uses: pinned at its turn, or before it.

What is pinned before is valid as long as nothing changes that it follows from.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic.attempt import Latents
from elastic.data.assign import Members
from elastic.data.encode import EncodeJob, plan_job
from elastic.data.growth import load_growths
from elastic.data.latents import Scale
from elastic.data.places import join, parent
from elastic.data.store_folder import folder_at
from elastic.data.verify import FIELDS
from elastic.errors import InputError
from elastic.files import write_atomic
from elastic.folders import LATENT_PINS, MEMBERS, RunFolder
from elastic.record import described, difference, has_started
from elastic.weights import WEIGHTS, file_digest
from stages.init import Continue
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


def jobs_of(
    folder: RunFolder,
    stage: DiffusionStage,
    members: Members,
    find_scale: Callable[[Path], Scale],
    packed: bool = False,
) -> list[EncodeJob]:
    """What the stage's latents are: those of what it began with, and those of each growth.

    The scale is found, with the codec's weights, if need be. InputError if the stage was pinned to
    others.
    """
    weights = codec_weights(folder, stage)
    pinned = pin_of(folder, stage)
    scale = read_scale(pinned) or scale_ahead(folder, stage, file_digest(weights))
    if scale is None and isinstance(stage.init, Continue):
        # The parameters that go on know latents of this scale.
        scale = read_scale(folder.stage(stage.init.stage.name) / LATENT_PINS)
    if scale is None:
        scale = find_scale(weights)
    jobs: list[EncodeJob] = []
    for part in (members, *(growth.members for growth in load_growths(folder.stage(stage.name)))):
        job = replace(plan_job(stage, weights, scale, part, folder.latents), packed=packed)
        check_pinned(job, pinned, len(jobs))
        jobs.append(job)
    return jobs


def pin_latents(
    folder: RunFolder, jobs: Sequence[EncodeJob], digests: Sequence[str]
) -> tuple[Latents, ...]:
    """Note that a stage uses the stores of its jobs, which were sealed with these digests."""
    pairs = zip(jobs, digests, strict=True)
    found = tuple(Latents(job.root, job.fingerprint, digest) for job, digest in pairs)
    first, *later = ({"fingerprint": name, "digest": digest} for _, name, digest in found)
    job = jobs[0]
    content = {
        **first,
        "scale": {"mean": job.scale.mean, "std": job.scale.std},
        "weights": str(job.weights),
        "weights_sha256": job.weights_digest,
        **({"later": later} if later else {}),
    }
    write_atomic(pin_of(folder, job.stage), json.dumps(content, indent=1).encode())
    return found


def pinned_latents(folder: RunFolder, stage: str) -> tuple[Latents, ...]:
    """The latents that a stage is pinned to; none before they are encoded."""
    path = folder.stage(stage) / LATENT_PINS
    if not path.exists():
        return ()
    pinned = json.loads(path.read_text())
    return tuple(
        Latents(join(folder.latents, one["fingerprint"]), one["fingerprint"], one["digest"])
        for one in (pinned, *pinned.get("later", []))
    )


def check_pinned(job: EncodeJob, pinned: Path, number: int = 0) -> None:
    """InputError, with what differs, if the stage was pinned to other latents than the job's.

    The first store is of what the stage began with; `number` counts those after it.
    """
    if not pinned.exists():
        return
    known = json.loads(pinned.read_text())
    stores = (known, *known.get("later", []))
    if number >= len(stores) or stores[number]["fingerprint"] == job.fingerprint:
        return
    before = stores[number]["fingerprint"]
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


def note_ahead(
    folder: RunFolder, stage: DiffusionStage, scale: Scale | None = None, weights: str = ""
) -> None:
    """Note what the stage's clips are pinned for, and its scale once that is known.

    `weights` is the digest of the codec's file that the scale was found with.
    """
    known = scale and {"mean": scale.mean, "std": scale.std}
    note = {"stage": _asked(stage), "scale": known, "weights": weights}
    write_atomic(folder.stage(stage.name) / AHEAD, json.dumps(note, indent=1).encode())


def scale_ahead(folder: RunFolder, stage: DiffusionStage, weights: str) -> Scale | None:
    """The scale that was found ahead: measured elsewhere it might differ in its last bit.

    None for a codec of other weights.
    """
    path = folder.stage(stage.name) / AHEAD
    note = json.loads(path.read_text()) if path.exists() else {}
    scale = note.get("scale")
    if not scale or note["weights"] != weights:
        return None
    return Scale(tuple(scale["mean"]), tuple(scale["std"]))


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
    return {**fields, "match": stage.match, "buckets": buckets, "goes_on": goes_on}
