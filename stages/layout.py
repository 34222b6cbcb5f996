"""How the workers of a stage share the work beyond whole samples: what fits, and what does not."""

import math


def multiple(context: int, shard_within: int | None) -> int:
    """What the number of workers must be a multiple of."""
    return math.lcm(context, shard_within or 1)


def rounded(workers: int, multiple: int) -> int:
    """As many of so many workers as a group can have; 0 where they are too few for one."""
    return workers - workers % multiple


def check_layout(
    workers: tuple[int, int], context: int, shard_within: int | None, exact: bool
) -> None:
    """ValueError unless groups of so many workers can be cut of the fewest and of the most."""
    one, (low, high) = multiple(context, shard_within), workers
    asked = f"context={context}, shard_within={shard_within}"
    if exact and (context > 1 or shard_within is not None):
        raise ValueError(
            f"exact True with {asked}: sums over other ranks round otherwise; leave context and "
            "shard_within out, or exact"
        )
    if low % one or high % one:
        fewest = -(-low // one) * one
        nearest = fewest, max(fewest, high // one * one)
        raise ValueError(
            f"workers {workers} with {asked}: both must be multiples of {one}; "
            f"nearest: workers={nearest}"
        )


def check_heads(heads: int, context: int) -> None:
    """ValueError unless each worker of a context can attend with as many heads as the others."""
    if heads % context == 0:
        return
    fitting = [count for count in range(1, heads + 1) if heads % count == 0]
    nearest = min(fitting, key=lambda count: abs(count - context))
    raise ValueError(
        f"context {context}: each worker attends with its share of the {heads} heads, so it must "
        f"divide them; nearest: {nearest}"
    )
