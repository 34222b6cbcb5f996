"""What `plan` says of memory is a maximum over moments; tests/bench/memory.py counts it."""

from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from test_benches import load
from tiny import STAGE

from elastic.fit import needed
from elastic.memory import peak_memory
from elastic.moments import FP32, Layer, Sums, most
from elastic.shard import MOST_WHOLE, each_round
from models import DiT
from models.recompute import RECOMPUTE
from stages import Bucket

BENCH = load(Path(__file__).parent / "bench" / "memory.py")
KEPT = st.integers(0, 10**9).map(float)
LAYERS = st.lists(
    st.builds(Layer, st.integers(1, 10**7), st.booleans(), KEPT, KEPT, KEPT), max_size=6
)
MILLION = 1_000_000


def count(layers: list[Layer], outer: int) -> tuple[int, int]:
    """Parameters of the root, and of all."""
    root = outer + sum(layer.parameters for layer in layers if not layer.is_apart)
    return root, outer + sum(layer.parameters for layer in layers)


@given(
    layers=LAYERS,
    outer=st.integers(1, 10**7),
    width=st.sampled_from([2, FP32]),
    holders=st.tuples(st.integers(1, 64), st.integers(1, 64)).map(sorted),
    rounds=st.tuples(st.integers(1, 9), st.integers(1, 9)).map(sorted),
    asked=st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_more_workers_never_need_more(
    layers: list[Layer],
    outer: int,
    width: int,
    holders: list[int],
    rounds: list[int],
    asked: tuple[bool, bool],
) -> None:
    """Activations are what they are; with more workers shards shrink, and rounds become fewer."""
    root, whole = count(layers, outer)
    each, is_ordered = asked

    def need(workers: int, num_rounds: int) -> float:
        sums = Sums(width, workers, num_rounds, each, is_ordered and workers > 1)
        # Values, two moments and their average.
        return 4 * FP32 * whole / workers + most(layers, root, sums).total

    few, many = need(holders[0], rounds[1]), need(holders[1], rounds[0])
    assert many <= few * (1 + 1e-9)


@given(
    depths=st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    heads=st.integers(1, 40),
    ratio=st.floats(1, 6),
    micro=st.integers(1, 9),
    workers=st.integers(1, 9),
    precision=st.sampled_from(["fp32", "bf16"]),
)
@example(depths=(1, 0), heads=1, ratio=4.0, micro=1, workers=1, precision="fp32")
def test_recompute_never_needs_more(
    depths: tuple[int, int], heads: int, ratio: float, micro: int, workers: int, precision: str
) -> None:
    shape = DiT(
        depth=depths[0], depth_single=depths[1], width=16 * heads, heads=heads, mlp_ratio=ratio
    )
    stage = STAGE.replace(model=shape, precision=precision)
    bucket, module = Bucket("64px", frames=17, batch=12, micro=micro), stage.build()
    none, selective, full = (
        needed(stage, module, bucket, workers, policy).total for policy in RECOMPUTE
    )
    more = 1 + 1e-9  # sums of the same parts in another order
    assert none * more >= selective
    assert selective * more >= full


@given(layers=LAYERS, outer=st.integers(1, 10**7), holders=st.integers(1, 9))
def test_no_moment_is_forgotten(layers: list[Layer], outer: int, holders: int) -> None:
    """It is at least what must be there at the end of the forward pass, and of the update."""
    root, whole = count(layers, outer)
    found = most(layers, root, Sums(FP32, holders, 1, False, False)).total
    last = layers[-1].inner if layers else 0.0
    assert layers == [] or found >= FP32 * root + sum(layer.kept for layer in layers) + last
    assert found >= FP32 * whole / holders


def test_gradients_wait_whole_unless_they_are_many() -> None:
    """Three rounds: of all parameters, whole; where each round is sent, this worker's part."""
    layers = [Layer(MILLION, True, 0.0, 0.0, 0.0)] * 3
    whole = most(layers, MILLION, Sums(FP32, 8, 3, False, False))
    sent = most(layers, MILLION, Sums(FP32, 8, 3, True, False))
    assert whole.gradients >= 4 * FP32 * MILLION
    assert whole.total - sent.total > 2 * FP32 * MILLION
    assert not each_round(MOST_WHOLE)
    assert each_round(MOST_WHOLE + 1)
    assert each_round(1, is_ordered=True)


def test_what_is_never_there_at_once_is_not_added_up() -> None:
    """Activations of the forward pass have gone when the root's gradients are sent."""
    kept = 100.0 * FP32 * MILLION
    layers = [Layer(MILLION, False, kept, 0.0, 0.0)] * 4
    found = most(layers, 4 * MILLION, Sums(FP32, 2, 1, False, False))
    # Gathered, with the message that stays until the root's forward pass ends.
    assert (found.gathered, found.gradients) == (2 * 4 * FP32 * MILLION, 0)
    assert found.activations == 4 * kept
    small = [layer._replace(kept=0.0) for layer in layers]
    found = most(small, 4 * MILLION, Sums(FP32, 2, 1, False, False))
    assert (found.gathered, found.activations) == (0, 0)
    # Whole, once more as the message, and the half that comes of it.
    assert found.gradients == 2.5 * 4 * FP32 * MILLION


def test_a_smaller_micro_batch_may_need_more_as_it_makes_rounds() -> None:
    stage = STAGE.replace(model=STAGE.model.replace(width=256, heads=4))
    module = stage.build()
    layers = [Layer(0, False, 1.0, 0.0, 0.0)]
    one, two = (
        peak_memory(stage, module, Bucket("32px", frames=5, batch=4, micro=micro), 2, layers).total
        for micro in (2, 1)
    )
    assert two > one


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20),
    told=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_the_bench_counts_what_went_without_a_word(sizes: list[int], told: list[bool]) -> None:
    """One at a time at the same place, whoever says that it goes: the most is the largest."""
    changes = []
    for size, is_told in zip(sizes, told, strict=False):
        changes.append((1000, size))
        if is_told:
            changes.append((1000, -size))
    assert BENCH.most_at_once(changes) == max(sizes)
    beside = [(1000 * n, size) for n, size in enumerate(sizes)]
    assert BENCH.most_at_once(beside) == sum(sizes)
    assert BENCH.most_at_once([*beside, (0, 1000 * len(sizes))]) == max(
        sum(sizes), 1000 * len(sizes)
    )
