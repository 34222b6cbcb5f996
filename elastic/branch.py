"""Branches: which checkpoints of a stage are there to start from, or to look at, and stay so.

A stage that names another one's position (`Continue(stage, at=...)`) starts from the checkpoint at
exactly that position. It is looked for before anything runs, and kept from the first start of a
plan that names it until the branch is finished, or is in the plan no more.
"""

from collections.abc import Sequence
from pathlib import Path

from elastic.checkpoint_fence import quiet
from elastic.checkpoint_manifest import whole_positions
from elastic.checkpoint_place import Register, Wanted, storage_of
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.weights import finished
from stages.init import branch_of, parent_of
from stages.lineage import branches, is_left
from stages.plan import Plan
from stages.stage import Stage


def checkpoints_of(folder: Path) -> list[int]:
    """Positions of a stage's whole checkpoints, newest first; one that is being deleted is none.

    InputError where they cannot be listed just now.
    """
    try:
        there, listed = whole_positions(storage_of(folder)), Register(folder).positions()
    except OSError as error:
        raise InputError(
            f"the checkpoints of stage {folder.name!r} cannot be listed just now ({error}); give "
            "the same command again when they can"
        ) from None
    # Stages of versions that kept no list have an empty one.
    return [position for position in there if not listed or position in listed]


def require_checkpoint(folder: Path, position: int, where: str) -> None:
    """InputError, with those that are there, unless the stage has a checkpoint at the position."""
    there = checkpoints_of(folder)
    if position in there:
        return
    if not there:
        raise InputError(
            f"{where}: stage {folder.name!r} has no checkpoint in {storage_of(folder).where}; "
            "train that stage first"
        )
    raise InputError(
        f"{where}: stage {folder.name!r} has no checkpoint there; it has those at {shown(there)}: "
        "give one of these"
    )


def shown(positions: Sequence[int]) -> str:
    """Positions as people read them."""
    return ", ".join(f"{position:,}" for position in positions)


def check_branches(plan: Plan, folder: RunFolder) -> None:
    """InputError unless each branch that is yet to begin finds the checkpoint that it names."""
    for stage in plan.stages:
        parent, at = parent_of(stage.init), branch_of(stage.init)
        if parent is None or at is None or _has_begun(folder.stage(stage.name)):
            continue
        where = f"stage {stage.name!r}: init: {type(stage.init).__name__}: at {at:,}"
        require_checkpoint(folder.stage(parent.name), at, where)


def _has_begun(folder: Path) -> bool:
    """Whether a stage has something of its own to go on from."""
    return finished(folder) is not None or bool(Register(folder).positions())


def keep_for_branches(plan: Plan, folder: RunFolder) -> None:
    """Have no checkpoint deleted that a branch of the plan needs; InputError as `check_branches`.

    Those that were kept for branches which need them no more may be deleted again.
    """
    check_branches(plan, folder)
    for parent in plan.stages:
        own = folder.stage(parent.name)
        wanted = {
            name: at
            for name, at in branches(plan.stages, parent).items()
            if finished(folder.stage(name)) is None
        }
        known = Wanted(own)
        if own.exists() and (wanted or known.path.exists()):
            with quiet(own):
                known.write(wanted)
    check_branches(plan, folder)  # a worker that was left behind may have deleted one meanwhile


def left_because(plan: Plan, folder: RunFolder, stage: Stage) -> str | None:
    """Why the plan trains a stage no further; None where it does, or has done."""
    if finished(folder.stage(stage.name)) is not None or not is_left(plan.stages, stage):
        return None
    from_it = branches(plan.stages, stage)
    starts = " and ".join(f"{name!r} starts at {at:,} of it" for name, at in from_it.items())
    return (
        f"left as it is: {starts}, and no stage needs its end; a plan without "
        f"{' and '.join(map(repr, from_it))} trains it on"
    )
