"""Sums of gradients, squares and losses have the same bits, whoever adds up what in which order."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import world_of_one
from torch import Tensor

from elastic.data.deal import deal
from elastic.ema import EmaWeights
from elastic.exact import ChangedLayout, InOrder, fold, reproducible, square_sum, totals
from elastic.loop import build_optimizer
from elastic.world import World
from stages import AdamW, Ema


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def drawn(seed: int, count: int) -> Tensor:
    """Values of both signs over 80 powers of two, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-60, 20, (count,), generator=generator)
    values = torch.randn(count, generator=generator).double() * 2.0 ** exponents.double()
    values[torch.rand(count, generator=generator) < 0.1] = -0.0
    return values.float()


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def _folded(gradients_MN: Tensor, world: int) -> Tensor:
    """The sum that a world of this size makes of the gradients of M micro-batches."""
    dealt = [deal(len(gradients_MN), 1, rank, world) for rank in range(world)]
    total_N = None
    for turn in range(len(dealt[0])):
        rounds = [dealt[rank][turn] for rank in range(world)]
        rows_WN = torch.stack([gradients_MN[offset] * real for [offset], real in rounds])
        into_N = torch.empty_like(rows_WN[0])
        fold(total_N, rows_WN, into_N)
        total_N = into_N
    assert total_N is not None
    return total_N


@settings(deadline=None)
@given(num_micros=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_gradients_add_up_alike_whoever_computes_which(num_micros: int, seed: int) -> None:
    gradients_MN = drawn(seed, num_micros * 17).view(num_micros, 17)
    sums = [bits(_folded(gradients_MN, world)) for world in range(1, 14)]
    assert all(torch.equal(sums[0], other) for other in sums[1:])


@settings(deadline=None)
@given(num_micros=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_their_sum_is_off_by_half_an_ulp_an_addition_at_most(num_micros: int, seed: int) -> None:
    gradients_MN = drawn(seed, num_micros * 17).view(num_micros, 17)
    error_N = (_folded(gradients_MN, 3).double() - gradients_MN.double().sum(0)).abs()
    size_N = gradients_MN.double().abs().sum(0)
    assert (error_N <= num_micros * 2.0**-24 * size_N).all()


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_squares_add_up_alike_in_any_order_and_any_parts(
    world: World, data: st.DataObject, count: int, seed: int
) -> None:
    values = drawn(seed, count)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    ends = itertools.pairwise([0, *cuts, count])
    parts = [values[order][a:b] for a, b in ends if b > a]
    total, whole = square_sum(parts, world), square_sum([values], world)
    assert total.view(torch.int64) == whole.view(torch.int64)
    exact = math.fsum(float(value) ** 2 for value in values)
    largest = float(values.abs().max()) ** 2
    # A unit is 2^-52 of a power of four that is at most four times the largest square.
    assert abs(float(total) - exact) <= count * 2.0**-51 * largest + 2.0**-50 * exact


@pytest.mark.parametrize("size", [2.0**-149, 3e38])
def test_the_smallest_and_the_largest_values_have_squares(world: World, size: float) -> None:
    value = torch.full((3,), size)
    assert float(square_sum([value], world)) == pytest.approx(3 * float(value[0]) ** 2, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_leaves_no_sum(world: World, bad: float) -> None:
    assert math.isnan(float(square_sum([torch.tensor([1.0, bad]), torch.ones(2)], world)))
    assert float(square_sum([torch.zeros(3)], world)) == 0.0


@settings(deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50))
def test_losses_are_added_with_one_rounding(world: World, values: list[float]) -> None:
    scalars = [torch.tensor(value) for value in values]
    forth, back, nothing = totals([scalars, scalars[::-1], []], world)
    assert forth == back == math.fsum(values)
    assert nothing == 0.0


def test_an_update_does_not_depend_on_where_a_value_lies() -> None:
    """What a fused AdamW on a CPU does not promise: there it depends on the place in a vector."""
    rows = 67

    def updated(first: int, last: int) -> Tensor:
        model = torch.nn.Linear(3, rows, bias=False)
        with torch.no_grad():
            model.weight = torch.nn.Parameter(_whole(0)[first:last].clone())
        average = EmaWeights(model, Ema(halflife=40))
        stepper = build_optimizer(AdamW(lr=3e-3), model, fused=False)
        for update in range(1, 4):
            model.weight.grad = _whole(update)[first:last].clone()
            stepper.step()
            average.update(8 * update, 8)
        return torch.cat([model.weight.detach(), average.tensors["weight"]], dim=1)

    def _whole(seed: int) -> Tensor:
        return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))

    whole = updated(0, rows)
    for length in (1, 2, 3, 5, 8, 11, 13, 32):
        starts = range(0, rows, length)
        parts = torch.cat([updated(at, min(at + length, rows)) for at in starts])
        assert torch.equal(bits(parts), bits(whole)), length


def test_a_gradient_of_another_length_is_refused(world: World) -> None:
    total = InOrder()
    total.add_flat(torch.ones(6), world)
    with pytest.raises(ChangedLayout, match="of 5 values a rank follows one of 6"):
        total.add_flat(torch.ones(5), world)


@pytest.mark.parametrize("wanted", [True, False])
def test_one_thread_computes_whatever_the_device(wanted: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with reproducible(wanted):
            assert torch.get_num_threads() == (1 if wanted else 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
