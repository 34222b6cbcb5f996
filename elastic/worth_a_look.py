"""What a stage file may say and seldom means: told by `plan`, and when the stage begins."""

from collections.abc import Iterator

from models.text import WordHash
from stages.init import Continue
from stages.stage import DiffusionStage, Stage

LARGE = 100_000_000
"""Parameters from which on a DiT is meant to be used, and its training costs something."""
_HIGHEST_RATE, _MOST_DECAY = 0.1, 1.0
_INTERVALS = {
    "save_every": "a crash loses all of it",
    "log_every": "there is one line of metrics, at its end",
    "evaluate_every": "held-out clips are measured at its end alone",
    "sample_every": "there are no films before its end",
}


def worth_a_look(stage: Stage) -> Iterator[str]:
    """Each thing of the stage that is probably not meant: field, value, why, what to write."""
    where = f"stage {stage.name!r}"
    if isinstance(stage, DiffusionStage):
        yield from (f"{where}: {said}" for said in _of_a_large_dit(stage))
    optimizer, budget = stage.optimizer, f"longer than the stage ({stage.budget:,} samples)"
    if optimizer.lr > _HIGHEST_RATE:
        yield (
            f"{where}: optimizer.lr {optimizer.lr:g}: greater than {_HIGHEST_RATE:g}, and usual "
            "are 1e-5 to 1e-3"
        )
    if optimizer.weight_decay > _MOST_DECAY:
        yield (
            f"{where}: optimizer.weight_decay {optimizer.weight_decay:g}: greater than "
            f"{_MOST_DECAY:g}, and usual are 0 to 0.1"
        )
    for field, follows in _INTERVALS.items():
        every = getattr(stage, field, None)
        if every is not None and every > stage.budget:
            yield f"{where}: {field} {every:,}: {budget}: {follows}"
    # The half-life of a stage that is continued goes on growing.
    if stage.ema.halflife > stage.budget and not isinstance(stage.init, Continue):
        yield f"{where}: ema.halflife {stage.ema.halflife:,}: {budget}: it is never reached"


def _of_a_large_dit(stage: DiffusionStage) -> Iterator[str]:
    count = sum(parameter.numel() for parameter in stage.build().parameters())
    if count <= LARGE:
        return
    if stage.precision == "fp32":
        yield (
            f"precision 'fp32' for a DiT of {count:,} parameters: activations take twice the "
            "memory, and GPUs are slowest at it; write precision='bf16'"
        )
    if isinstance(stage.text, WordHash):
        yield (
            f"text WordHash for a DiT of {count:,} parameters: to it every word is a random "
            "vector, without meaning; give T5Clip(t5='FOLDER', clip='FOLDER')"
        )
