"""What share of the samples that a world computes are real: no batch divides by every world."""

from collections.abc import Iterator

from cluster.constants import MACHINE_GPUS
from elastic.data.deal import round_sizes
from elastic.fit import workers_on
from stages.layout import rounded
from stages.schedule import Bucket
from stages.stage import Stage

ENOUGH = 0.95


def computed(stage: Stage, bucket: Bucket, workers: int) -> int:
    """Samples that each of so many workers, or the workers of a context, compute in an update."""
    return sum(round_sizes(bucket.batch, bucket.micro, workers // stage.context, stage.exact))


def real_share(stage: Stage, bucket: Bucket, workers: int) -> float:
    """Share of the samples that so many workers compute that are real; the others are copies."""
    return bucket.batch / (computed(stage, bucket, workers) * (workers // stage.context))


def worlds(stage: Stage, gpus: int | None) -> dict[str, int]:
    """The most workers on so many GPUs, those without a machine, and the fewest.

    Without a worker, where all of them have room on one machine.
    """
    fewest, most = stage.workers
    most = most if gpus is None else workers_on(stage, gpus)
    machine = round(MACHINE_GPUS.value)
    less = rounded(most - (machine if most > machine else 1), stage.multiple)
    return {"most": most, "node_less": max(less, fewest), "fewest": fewest}


def share_lines(stage: Stage, bucket: Bucket, gpus: int | None) -> Iterator[str]:
    """Where too little of what is computed is real, and what would mend it."""
    asked = worlds(stage, gpus)
    shares = {size: real_share(stage, bucket, size) for size in asked.values()}
    if min(shares.values()) >= ENOUGH:
        return
    said = ", ".join(f"{share:.3g} on {size}" for size, share in shares.items())
    mended = ", or ".join(_remedies(stage, bucket, **asked))
    yield (
        f"real of what is computed: {said} workers{_idle(stage, bucket, asked['most'])}"
        + (f"; {ENOUGH} or more with {mended}" if mended else "")
    )


def _idle(stage: Stage, bucket: Bucket, workers: int) -> str:
    """Said where even the first round has too few samples for all workers."""
    readers = workers // stage.context
    size = round_sizes(bucket.batch, bucket.micro, readers, stage.exact)[0]
    idle = readers - -(-bucket.batch // size)
    return f"; {idle * stage.context} of {workers} never have a sample" if idle > 0 else ""


def _remedies(
    stage: Stage, bucket: Bucket, most: int, node_less: int, fewest: int
) -> Iterator[str]:
    """The nearest batch, the largest micro-batch, and the most workers that are enough."""

    def is_enough(one: Bucket, *sizes: int) -> bool:
        return all(real_share(stage, one, size) >= ENOUGH for size in sizes)

    largest = 2 * max(bucket.batch, most)
    for batch in sorted(range(1, largest + 1), key=lambda batch: abs(batch - bucket.batch)):
        if is_enough(bucket.replace(batch=batch), most, node_less, fewest):
            yield f"batch={batch}"
            break
    for micro in range(bucket.micro - 1, 0, -1) if stage.exact else ():
        if is_enough(bucket.replace(micro=micro), most, node_less, fewest):
            yield f"micro={micro}"
            break
    if not is_enough(bucket, most) and node_less < most:
        for workers in range(node_less, fewest - 1, node_less - most):
            if is_enough(bucket, workers):
                yield f"workers=({fewest}, {workers})"
                break
