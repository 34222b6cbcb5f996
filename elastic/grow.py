"""Takes clips into stages that have begun: what was added to their tables and folders since."""

from pathlib import Path

import numpy as np

from elastic.branch import left_because
from elastic.checkpoint_fence import Fence
from elastic.checkpoint_place import Register, storage_of
from elastic.course import Course, encode_stage, pin_members, probe_clips, train_plan
from elastic.data.assign import Assignment, fitting, held_out_name
from elastic.data.clips import Clips, ids_of
from elastic.data.growth import load_growths, record_growth, starts_after
from elastic.data.order import Layout, layout_of
from elastic.data.sealed import SealedStore
from elastic.data.sources import LatentSource
from elastic.data.table import read_tables
from elastic.errors import InputError
from elastic.folders import MEMBERS
from elastic.weights import finished
from stages.stage import DiffusionStage, Stage


def grow_and_train(course: Course) -> None:
    """As `train_plan`, but stages that are under way take in what is new first."""
    for stage in course.plan.stages:
        folder = course.folder.stage(stage.name)
        is_left = left_because(course.plan, course.folder, stage) is not None
        if finished(folder) is None and not is_left and (folder / MEMBERS).exists():
            grow_stage(course, stage)
    train_plan(course)


def grow_stage(course: Course, stage: Stage) -> None:
    """Record which clips a stage that has begun takes in, and from where in its order on."""
    spilled = course.folder.stage(stage.name) / ".table.arrow"
    try:
        new = _new_clips(course, stage, read_tables(stage.data, spilled))
    finally:
        spilled.unlink(missing_ok=True)
    counts = {} if new is None else {b.name: len(new.rows[b.name]) for b in stage.buckets}
    if new is None or not any(counts.values()):
        print(f"{stage.name}  grow: nothing to train on is new", flush=True)
        return
    folder = course.folder.stage(stage.name)
    layouts = _layouts(course, stage)
    # From here on nobody who began before can publish, and so go beyond this position.
    Fence.take(folder)
    position = _newest(folder)
    if position >= stage.budget:
        print(f"{stage.name}  grow: it has seen all of its samples", flush=True)
        return
    starts = starts_after(stage, position, layouts)
    record_growth(folder, position, starts, new)
    course.tracker.event(
        "grow", stage.name, position, f"{max(counts.values())} clips are new",
        clips=counts, starts=starts,
    )  # fmt: skip
    for bucket, count in counts.items():
        places = " and ".join(f"{start:,}" for start in starts[bucket])
        print(f"{stage.name}  grow: {bucket} from sample {places} on with {count:,} more clips")


def _new_clips(course: Course, stage: Stage, tables: list[Clips]) -> Assignment | None:
    """The new clips of each bucket that are trained on; None where there is no new row."""
    members = pin_members(course, stage)
    growths = load_growths(course.folder.stage(stage.name))
    pinned = [*members.clips.values(), *(c for g in growths for c in g.members.clips.values())]
    known = np.unique(np.concatenate([ids_of(clips) for clips in pinned]))
    new = [table.picked(~np.isin(table.ids(), known)) for table in tables]
    sizes = [len(table) for table in new]
    if not any(sizes):
        return None
    stage = stage.replace(match=members.match)  # one bucket's clips are chosen by one rule
    probed = probe_clips(course, stage, Clips.joined(new))
    assigned = fitting(stage, probed, sizes)
    for line in assigned.lines(stage, probed):
        print(f"{stage.name}  new: {line}", flush=True)
    if any(len(assigned.rows[held_out_name(bucket)]) for bucket in stage.buckets):
        print(f"{stage.name}  new: what is held out is left out: the measure stays what it was")
    return assigned.added_to(members)


def _layouts(course: Course, stage: Stage) -> dict[str, Layout]:
    """Where the samples of the stage lie now."""
    members, folder = pin_members(course, stage), course.folder.stage(stage.name)
    growths = load_growths(folder)
    if not isinstance(stage, DiffusionStage):
        names = [bucket.name for bucket in stage.buckets]
        return {b: layout_of(members.sizes(b), [g.later(b) for g in growths]) for b in names}
    latents = encode_stage(course, stage, members)  # what is missing, if that was cut off
    stores = [SealedStore.open(*one) for one in latents]
    source = LatentSource(stage, stores, held_out=False, members=members, growths=growths)
    return source.layouts()


def _newest(folder: Path) -> int:
    """The position of the newest checkpoint, damaged or not: nothing beyond it was kept."""
    try:
        return max({*storage_of(folder).positions(), *Register(folder).positions()}, default=0)
    except OSError as error:
        raise InputError(
            f"the checkpoints of stage {folder.name!r} cannot be read just now ({error}), so it is "
            "not known how far it has come; give the same command again when they can"
        ) from error
