"""The course of a plan on a cluster: for each stage pin the clips, encode, train, show samples.

Safe to run again from the top at any time: every step looks at what is already there.
"""

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, WorkerCrashedError

from elastic.attempt import Latents, WorkerJob
from elastic.branch import left_because
from elastic.checkpoint_store import DEFAULT_KEEP, Keep
from elastic.data.assign import Members, assign, load_members
from elastic.data.clips import Clips
from elastic.data.encode import EncodeJob
from elastic.data.places import join
from elastic.data.probes import Probed, probe_all
from elastic.data.schema import NULL_TEXT
from elastic.data.sealed import read_null_text
from elastic.data.store_folder import folder_at
from elastic.data.table import read_tables
from elastic.data.verify import FIELDS, Verdict
from elastic.errors import InputError, last_line
from elastic.folders import LATENT_PINS, MEMBERS, RunFolder
from elastic.journal import read_events, read_metrics
from elastic.latent_pins import (
    codec_weights,
    forget_stale,
    jobs_of,
    pin_latents,
    pinned_latents,
    read_scale,
)
from elastic.preview import PreviewJob
from elastic.ray_encode import encode_on_ray, find_scale_on_ray, result_of
from elastic.ray_tracker import EncodeTeller, TrackerHandle
from elastic.ray_train import Claim, Limits, fit_stage
from elastic.record import start_stage
from elastic.sample import (
    SampleRequest,
    captions_of,
    clips_looked_at,
    longest_bucket,
    make_reconstructions,
    make_samples,
    text_error,
)
from elastic.showing import MOST_TRIES, Made, Showing, missing_line, tries_of, why_missing
from elastic.start import INIT, check_origin
from elastic.summary import COURSE_KINDS, poor_codec
from elastic.weights import WEIGHTS, finished
from elastic.worth_a_look import worth_a_look
from models.perceptual import Lpips
from stages.init import Align, FromFile, Init, parent_of
from stages.lineage import branches
from stages.plan import Plan
from stages.stage import AutoencoderStage, DiffusionStage, Stage

log = logging.getLogger(__name__)

_MORE_TRIES, _TRY_AGAIN_S = 2, 5.0  # for files that cannot be read just now, and lost workers
NUM_RECONSTRUCTIONS = 6


@dataclass(frozen=True)
class Course:
    """A plan, where it is kept, whom to tell, and what the cluster is like."""

    plan: Plan
    folder: RunFolder
    tracker: TrackerHandle
    use_gpu: bool  # whether it computes on GPUs
    limits: Limits
    keep: Keep = DEFAULT_KEEP
    checkpoints: str | None = None  # where those of all plans lie; none: in their run folders
    packs: bool = False  # whether stores of latents that are begun are compressed
    # Set when something is to be trained: from then on the driver keeps warm hosts.
    trains: threading.Event = field(default_factory=threading.Event)
    # What goes on while a stage trains.
    beside: "Callable[[Course, Stage], AbstractContextManager[None]]" = lambda *_: nullcontext()
    # Held while a stage trains: who is to stop after a save waits for its workers then.
    claim: Claim = field(default_factory=Claim)
    showing: Showing = field(default_factory=Showing)

    @property
    def gpus(self) -> float:
        """GPUs that one encoding or sampling task takes."""
        return 1.0 if self.use_gpu else 0.0


def train_plan(course: Course) -> None:
    """Do whatever is missing of the plan; a stage that is only branched from is left as it is."""
    for stage in course.plan.stages:
        why = left_because(course.plan, course.folder, stage)
        if why is not None:
            leave_stage(course, stage, why)
            continue
        if finished(course.folder.stage(stage.name)) is None:
            train_one(course, stage)
        elif not is_told(course, "stage_end", stage):
            # A driver was killed between the last file of the stage and the line about it.
            course.tracker.event("stage_end", stage.name, stage.budget)
        if not _samples_done(course, stage):
            show_samples(course, stage)


def leave_stage(course: Course, stage: Stage, why: str) -> None:
    """Tell once that a stage is trained no further."""
    events = read_events(course.folder.root)
    told = [e["kind"] for e in events if e["stage"] == stage.name and e["kind"] in COURSE_KINDS]
    if told[-1:] != ["stage_left"]:
        position = max(branches(course.plan.stages, stage).values())
        course.tracker.event("stage_left", stage.name, position, why)
        print(f"{stage.name}  {why}", flush=True)


def encode_plan(course: Course) -> None:
    """Encode the latents of every diffusion stage that is not left and whose codec is finished."""
    for stage in course.plan.stages:
        is_left = left_because(course.plan, course.folder, stage) is not None
        if isinstance(stage, DiffusionStage) and not is_left:
            if not codec_weights(course.folder, stage).exists():
                raise InputError(
                    f"stage {stage.name!r}: its autoencoder has no weights yet "
                    f"({codec_weights(course.folder, stage)}); train it first: "
                    "python -m elastic train FILE"
                )
            encode_stage(course, stage, pin_members(course, stage))


def train_one(course: Course, stage: Stage) -> None:
    """Train one stage to its budget."""
    course.trains.set()
    folder = course.folder.stage(stage.name)
    course.tracker.event("stage_start", stage.name)
    members = pin_members(course, stage)
    start_stage(course.folder, stage)
    for said in worth_a_look(stage):
        log.warning("worth a look: %s", said)
    _warn_of_codec(course, stage)
    latents = encode_stage(course, stage, members) if isinstance(stage, DiffusionStage) else ()
    parent = parent_of(stage.init)
    if not (folder / INIT).exists():
        for line in check_origin(stage).lines():
            print(f"{stage.name}  start: {line}", flush=True)
    job = WorkerJob(
        with_absolute_weights(stage), folder, latents,
        parent=course.folder.stage(parent.name) if parent else None,
        parent_latents=_paired_latents(course.folder, stage.init),
        keep=course.keep, checkpoints=course.checkpoints,
        previews=_preview_job(course.folder, stage),
    )  # fmt: skip
    root, tracker = course.folder.root, course.tracker.name
    with course.beside(course, stage):
        fit_stage(job, root, tracker, course.limits, course.use_gpu, course.claim)
    course.tracker.event("stage_end", stage.name, stage.budget)


def _preview_job(folder: RunFolder, stage: Stage) -> PreviewJob | None:
    if not isinstance(stage, DiffusionStage) or stage.sample_every is None:
        return None
    pins = folder.stage(stage.name) / LATENT_PINS
    scale = read_scale(pins)
    assert scale is not None, f"stage {stage.name} is trained on latents without their scale"
    digest = json.loads(pins.read_text())["weights_sha256"]
    return PreviewJob(folder.root, codec_weights(folder, stage), digest, scale)


def _warn_of_codec(course: Course, stage: Stage) -> None:
    if isinstance(stage, DiffusionStage) and isinstance(stage.vae, AutoencoderStage):
        warning = poor_codec(read_metrics(course.folder.root), stage.vae.name)
        if warning is not None:
            log.warning("%s: %s", stage.name, warning)


def with_absolute_weights(stage: Stage) -> Stage:
    """The stage for workers, who run in another folder: its files by their whole paths."""
    if isinstance(stage.init, FromFile):
        path = os.path.abspath(stage.init.path)
        stage = stage.replace(init=stage.init.replace(path=path))
    if isinstance(stage, AutoencoderStage) and isinstance(stage.perceptual, Lpips):
        path = os.path.abspath(stage.perceptual.weights)
        stage = stage.replace(perceptual=stage.perceptual.replace(weights=path))
    return stage


def pin_members(course: Course, stage: Stage) -> Members:
    """The clips of the stage, chosen at its first start, or before it (elastic.ray_ahead)."""
    forget_stale(course.folder, stage)
    path = course.folder.stage(stage.name) / MEMBERS
    if path.exists():
        return load_members(path)
    if path.with_suffix(".parquet").exists():
        raise InputError(
            f"stage {stage.name!r} of {str(course.folder.root)!r} was begun by an earlier version, "
            "which kept its clips in another way (CHANGELOG.md); finish it with that version, or "
            "give --storage another folder to begin anew"
        )
    spilled = path.with_name(".table.arrow")
    try:
        return _choose_members(course, stage, path, spilled)
    finally:
        spilled.unlink(missing_ok=True)


def _choose_members(course: Course, stage: Stage, path: Path, spilled: Path) -> Members:
    tables = read_tables(stage.data, spilled)
    probed = probe_clips(course, stage, Clips.joined(tables))
    assigned = assign(stage, probed, [len(table) for table in tables])
    for line in assigned.lines(stage, probed):
        print(f"{stage.name}  {line}", flush=True)
    return assigned.save(path)


def probe_clips(course: Course, stage: Stage, clips: Clips) -> Probed:
    """What is known of each clip; InputError where some cannot be read just now."""
    probed = probe_all(clips, course.folder.probes, workers=os.cpu_count() or 1)
    for _ in range(_MORE_TRIES):
        if probed.unreachable:
            time.sleep(_TRY_AGAIN_S)
            probed = probe_all(clips, course.folder.probes, workers=os.cpu_count() or 1)
    if probed.unreachable:
        # Pinned without them, the stage would never see them again.
        raise InputError(
            f"stage {stage.name!r}: {len(probed.unreachable)} of {len(clips)} files cannot be read "
            f"just now, such as {probed.at(probed.unreachable[0])}; give the same command again "
            "when they can, or take them out of the table"
        )
    reasons: Counter[str] = Counter()
    for clip, reason in probed.quarantined():
        reasons[reason] += 1
        log.warning("quarantined %r: %s", clip.path, reason)
    if reasons:
        course.tracker.event(
            "quarantine", stage.name, None,
            f"{reasons.total()} of {len(clips)} clips cannot be used",
            count=reasons.total(), reasons=dict(reasons),
        )  # fmt: skip
    return probed


def encode_stage(
    course: Course,
    stage: DiffusionStage,
    members: Members,
    damaged: Mapping[str, Verdict] | None = None,
) -> tuple[Latents, ...]:
    """Encode what is missing or damaged of the stage's latents, and pin the stores that it uses.

    There is one of what it began with, and one of each growth. InputError if the stage was pinned
    to other latents than it would get now.
    """
    jobs = jobs_of(
        course.folder, stage, members,
        lambda weights: find_scale_on_ray(stage, weights, members, course.gpus),
        course.packs,
    )  # fmt: skip
    digests = [_encode_store(course, job, (damaged or {}).get(job.root)) for job in jobs]
    return pin_latents(course.folder, jobs, digests)


def _encode_store(course: Course, job: EncodeJob, damaged: Verdict | None) -> str:
    name = job.stage.name
    course.tracker.event("encode_start", name, None, f"to {job.fingerprint}")
    began, teller = time.monotonic(), EncodeTeller(course.tracker.name, name)
    done = encode_on_ray(job, course.gpus, teller, damaged)
    course.tracker.event(
        "encode_end", name, None, f"sealed as {done.digest}",
        clips=job.members.num_clips(), quarantined=len(done.quarantined), encoded=done.clips,
        seconds=round(time.monotonic() - began, 3), device_frames_per_s=done.frames_per_s,
    )  # fmt: skip
    return done.digest


def _paired_latents(folder: RunFolder, init: Init) -> tuple[Latents, ...]:
    """Those that the parent was trained on, where the policy pairs them with the stage's."""
    return pinned_latents(folder, init.stage.name) if isinstance(init, Align) else ()


def _samples_done(course: Course, stage: Stage) -> bool:
    sheet = course.folder.samples(stage.name) / "contact-sheet.png"
    return sheet.exists() and is_told(course, "sample", stage)


def is_told(course: Course, kind: str, stage: Stage) -> bool:
    """Whether an event of this kind about the stage is in the journal."""
    events = read_events(course.folder.root)
    return any(event["kind"] == kind and event["stage"] == stage.name for event in events)


def show_samples(course: Course, stage: Stage) -> None:
    """Make the videos that show what a finished stage can do; what fails is told, and that is all.

    It is tried once a start, and so many times in all.
    """
    began, tries = time.monotonic(), tries_of(course.folder, stage.name)
    told = why_missing(read_events(course.folder.root), stage.name)
    if tries.count() < MOST_TRIES:
        told, made = None, course.showing.make(tries, lambda: make_films(course, stage))
    else:  # untold, each of them ended with its driver
        made = told or f"{MOST_TRIES} starts ended while they were made"
    event = partial(course.tracker.event, stage=stage.name, position=stage.budget)
    seconds = round(time.monotonic() - began, 3)
    if isinstance(made, Made):
        paths = [str(path.relative_to(course.folder.root)) for path in made.paths]
        event(
            "sample", reason="averaged weights",
            paths=paths, captions=made.captions, seconds=seconds,
        )  # fmt: skip
        return
    log.warning("%s", missing_line(course.folder, stage.name, made))
    if told is None:
        event("sample_failed", reason=made, seconds=seconds)


def make_films(course: Course, stage: Stage) -> Made:
    """The videos of a finished stage, made on a worker."""
    members = load_members(course.folder.stage(stage.name) / MEMBERS)
    clips = clips_looked_at(stage, members)
    weights, folder = course.folder.stage(stage.name) / WEIGHTS, course.folder.samples(stage.name)
    if isinstance(stage, AutoencoderStage):
        given = (stage, weights, clips, folder, NUM_RECONSTRUCTIONS)
        return Made(*_on_worker(course, make_reconstructions, *given))
    captions = captions_of(clips)
    request = sample_request(course.folder, stage, tuple(captions), folder)
    return Made(_on_worker(course, make_samples, request), captions)


def _on_worker(course: Course, work: Callable[..., Any], *given: Any) -> Any:  # Any: as Ray
    """What a task gives; a machine that is lost meanwhile is replaced.

    Not by Ray: one that takes all memory it would start again without end.
    """
    task = ray.remote(work).options(num_gpus=course.gpus, max_retries=0)
    for _ in range(_MORE_TRIES):
        try:
            return result_of(task.remote(*given))
        except (NodeDiedError, WorkerCrashedError) as error:
            log.warning("a worker was lost, another one begins again: %s", last_line(error))
    return result_of(task.remote(*given))


def sample_request(
    folder: RunFolder, stage: DiffusionStage, captions: tuple[str, ...], target: Path,
    weights: Path | None = None,
) -> SampleRequest:  # fmt: skip
    """A request for samples of a stage; InputError if it is not finished and has no `weights`."""
    own = folder.stage(stage.name)
    scale = read_scale(own / LATENT_PINS)
    if (finished(own) is None and weights is None) or scale is None:
        raise InputError(
            f"stage {stage.name!r} of {str(folder.root)!r} is not finished, so there is nothing "
            "to sample from; go on with python -m elastic train FILE"
        )
    pinned = json.loads((own / LATENT_PINS).read_text())
    store = folder_at(join(folder.latents, pinned["fingerprint"]))
    # Latents may be deleted once they are learnt, and older ones came without the null text.
    if store.size(NULL_TEXT) is not None:
        null = read_null_text(store)
    else:
        try:
            null = stage.text.null()
        except ValueError as error:
            raise text_error(stage, error) from None
    try:
        text_fields = json.loads(store.read(FIELDS))["text"]
    except FileNotFoundError:
        text_fields = None
    return SampleRequest(
        stage=stage.replace(text=stage.text.located()),
        bucket=longest_bucket(stage),
        weights=weights or own / WEIGHTS,
        codec_weights=codec_weights(folder, stage),
        scale=scale,
        null=null,
        captions=captions,
        folder=target,
        text_fields=text_fields,
    )
