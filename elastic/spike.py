"""Watches the loss after a start from other weights: a trunk that does not take is ended early.

DC-VideoGen (arXiv 2509.25182) reports a kept trunk under a new autoencoder that fell back to noise
after thousands of updates; a run that does so unseen costs days.
"""

from collections.abc import Callable, Mapping

from elastic.errors import StageBlocked
from elastic.meter import Sum
from elastic.state import Progress
from stages.init import Switch
from stages.stage import AutoencoderStage, Stage

PATIENCE = 3  # log points in a row: one may be a batch of odd clips


class LossSpike(StageBlocked):
    """The loss stayed far above what it had been; the last checkpoint is from before or amid it."""


def watch(
    stage: Stage,
    progress: Progress,
    sums: Mapping[str, Sum],
    is_log_point: bool,
    event: Callable[[str, int, str], None],
) -> None:
    """Take in what one line of the log adds up, by bucket; the same on every rank.

    Judges at log points, which every run of the stage has: what a save or a resize in between adds
    to the log is put together again first, so it has no say in how a run ends. (Losses are fp32
    values, whose sums in fp64 are not rounded unless they are a million times apart.)

    Keeps the lowest mean of each bucket, the count of log points above it and what is not judged
    yet in `progress`, so that a restart forgets nothing. Raises LossSpike at the PATIENCE-th log
    point in a row that is above `guard_factor` times the lowest.
    """
    init = stage.init
    if not isinstance(init, Switch) or progress.samples > init.guard_samples:
        progress.unjudged.clear()
        return
    if isinstance(stage, AutoencoderStage) and stage.adversarial is not None:
        return  # a loss that a discriminator moves has no lowest value to compare with
    for bucket, (total, count) in sums.items():
        before, num_before = progress.unjudged.get(bucket, (0.0, 0))
        progress.unjudged[bucket] = [before + total, num_before + count]
    if not is_log_point:
        return
    for bucket in sorted(progress.unjudged):
        total, num_samples = progress.unjudged.pop(bucket)
        loss = total / num_samples
        lowest, above = progress.guard.get(bucket, [loss, 0])
        above = above + 1 if loss > init.guard_factor * lowest > 0 else 0
        progress.guard[bucket] = [min(lowest, loss), above]
        if not above:
            continue
        said = (
            f"loss {loss:.4g} of bucket {bucket!r} is {loss / lowest:.1f} times the lowest since "
            f"the switch ({lowest:.4g}), log point {above:.0f} of {PATIENCE}"
        )
        event("loss_spike", progress.samples, said)
        if above >= PATIENCE:
            raise LossSpike(
                f"stage {stage.name!r} at {progress.samples:,} samples: {said}. The new start did "
                "not hold: lower optimizer.lr, lengthen optimizer.warmup or init.warmup_samples, "
                "start with Fresh, or branch from a checkpoint before that with init=Continue("
                "STAGE, at=POSITION), under another stage name. To train on as it is, raise "
                "init.guard_factor"
            )
