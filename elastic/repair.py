"""Encodes again what is damaged of the latents of a plan."""

from elastic.course import Course, encode_stage, pin_members
from elastic.data.schema import PLAN
from elastic.data.store_folder import folder_at
from elastic.data.verify import Verdict, verdict_lines, verify
from elastic.errors import InputError
from elastic.latent_pins import pinned_latents
from stages.stage import DiffusionStage, Stage


def repair_plan(course: Course) -> None:
    """Encode again what is damaged of the latents that stages are pinned to.

    InputError where no stage has latents: there is nothing to repair.
    """
    stages = [s for s in course.plan.stages if pinned_latents(course.folder, s.name)]
    if not stages:
        raise InputError(
            f"no stage of {course.plan.name!r} has latents yet; encode or train it first"
        )
    done: set[str] = set()
    for stage in stages:
        damaged: dict[str, Verdict] = {}
        for root, _, _ in pinned_latents(course.folder, stage.name):
            if root in done or folder_at(root).size(PLAN) is None:  # learnt, and deleted since
                continue
            done.add(root)
            verdict = verify(root)
            print("\n".join(verdict_lines(root, verdict)), flush=True)
            if not verdict.is_whole:
                damaged[root] = verdict
        if damaged:
            _encode_again(course, stage, damaged)


def _encode_again(course: Course, stage: Stage, damaged: dict[str, Verdict]) -> None:
    assert isinstance(stage, DiffusionStage), f"{stage.name} has no latents"
    before = {root: digest for root, _, digest in pinned_latents(course.folder, stage.name)}
    for root, _, new in encode_stage(course, stage, pin_members(course, stage), damaged):
        if root not in damaged:
            continue
        print(f"{root}: encoded again: {len(damaged[root].shards)} shards; sealed as {new}")
        if new != before[root]:
            print(f"{root}: was {before[root]}; not the same bits: another machine?", flush=True)
