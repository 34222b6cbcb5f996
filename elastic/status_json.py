"""What `status` says, for programs; names and units as docs/json.md has them."""

from typing import Any

from elastic.branch import left_because
from elastic.checkpoint_place import Register
from elastic.data.growth import load_growths
from elastic.encode_progress import read_encoding
from elastic.folders import RunFolder
from elastic.showing import why_missing
from elastic.speed import speeds
from elastic.summary import History, StageSummary, summarise_history
from elastic.timeline import ACTIVITIES
from elastic.weights import finished
from stages.plan import Plan
from stages.stage import Stage

_LOSSES = ("loss_first", "loss_last", "held_out_first", "held_out_last")
_COUNTS = ("samples", "samples_lost", "resizes", "crashes", "seconds")


def status_json(
    folder: RunFolder, plan: Plan, history: History
) -> dict[str, Any]:  # Any: a JSON tree
    """How far a run has come."""
    begun = {one.stage: one for one in summarise_history(history)}
    fast = {one.stage: {"workers": one.world, **one.values} for one in speeds(history)}
    stages = [
        {
            **_stage(folder, stage, history, begun.get(stage.name)),
            "left": left_because(plan, folder, stage) is not None,
            "speed": fast.get(stage.name),
        }
        for stage in plan.stages
    ]
    return {
        "plan": plan.name,
        "folder": str(folder.root),
        "finished": all(one["finished"] or one["left"] for one in stages),
        "goodput": history.account.goodput(),
        "seconds": {name: history.account.seconds(name) for name in ACTIVITIES},
        "stages": stages,
    }


def _stage(
    folder: RunFolder, stage: Stage, history: History, one: StageSummary | None
) -> dict[str, Any]:
    """One that has not begun has zeros, and null where nothing was measured."""
    encoding = read_encoding(folder.root, stage.name)
    return {
        "stage": stage.name,
        "budget": stage.budget,
        "finished": finished(folder.stage(stage.name)) is not None,
        "checkpoints": sorted(Register(folder.stage(stage.name)).positions()),
        **{name: 0 if one is None else getattr(one, name) for name in _COUNTS},
        **{name: None if one is None else getattr(one, name) for name in _LOSSES},
        "longest_gap_s": 0 if one is None else one.longest_gap,
        "psnr_db": None if one is None else one.psnr,
        "ssim": None if one is None else one.ssim,
        "goodput": history.account.goodput(stage.name),
        "samples_failed": why_missing(history.events, stage.name),
        "encoding": None if encoding is None else encoding[1].as_json(),
        "grown": [
            {"position": grown.position, "clips": grown.members.num_clips()}
            for grown in load_growths(folder.stage(stage.name))
        ],
    }
