"""Muon moves matrices by orthogonal steps, alike on any world, and its momentum survives."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HALF_UPDATES, STAGE, Attempt, Turn, in_turn, train
from torch import nn
from worlds import run_world

from elastic.muon import MuonAdamW, is_matrix, orthogonalise, shares
from stages import Muon

MUON = STAGE.replace(optimizer=Muon(lr=1e-3, matrix_lr=2e-2, warmup=40, decay=100))


@settings(deadline=None)
@given(rows=st.integers(4, 24), columns=st.integers(4, 24), seed=st.integers(0, 2**31))
def test_an_update_is_made_nearly_orthogonal(rows: int, columns: int, seed: int) -> None:
    update = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(orthogonalise(update))
    before = torch.linalg.svdvals(update)
    # The quintic brings to about 1 what is not tiny beside the norm.
    kept = before > 0.02 * before.norm()
    assert values[kept].min() > 0.5
    assert values.max() < 1.3


def test_only_dense_matrices_are_moved_by_muon() -> None:
    assert is_matrix(nn.Linear(8, 8).weight)
    assert is_matrix(nn.Conv3d(4, 8, 3).weight)
    assert not is_matrix(nn.Conv3d(8, 8, 3, groups=8).weight)
    assert not is_matrix(nn.Conv3d(8, 3, 3).weight)
    assert not is_matrix(nn.Linear(8, 8).bias)


def test_one_step_is_the_formula() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 12)
    start, gradient = layer.weight.detach().clone(), torch.randn(12, 6)
    optimizer = MuonAdamW(
        Muon(lr=1e-3, matrix_lr=0.1, momentum=0.8, weight_decay=0.5),
        [{"params": list(layer.parameters())}],
    )
    layer.weight.grad, layer.bias.grad = gradient.clone(), torch.ones(12)
    optimizer.step()
    # Nesterov: momentum 0.2 g, then 0.2 g + 0.8 * 0.2 g; only its direction counts.
    moved = start * (1 - 0.1 * 0.5) - 0.1 * 2**0.5 * orthogonalise(0.36 * gradient)
    torch.testing.assert_close(layer.weight.detach(), moved)
    optimizer.zero_grad()
    assert layer.weight.grad is None


def test_any_world_moves_alike_and_goes_on_from_another_ones_momentum(tmp_path: Path) -> None:
    half = tmp_path / "half"
    turns = [Turn(size, train, (tmp_path / str(size), None, MUON)) for size in (1, 2, 3)]
    turns += [Turn(2, train, (half, HALF_UPDATES, MUON)), Turn(3, train, (half, None, MUON))]
    attempts = run_world(in_turn, 3, tmp_path, turns)[0]
    whole = losses(attempts[0])
    assert len(whole) > 10
    # Looser than for AdamW: the iteration magnifies differences in directions of small momentum.
    for other in attempts[1:3]:
        assert losses(other) == pytest.approx(whole, rel=1e-4)
    rest = losses(attempts[4])
    assert 3 < len(rest) < len(whole)
    assert rest == pytest.approx(whole[-len(rest) :], rel=1e-4)


def losses(attempt: Attempt) -> list[float]:
    return [line["values"]["loss"] for line in attempt.lines if not line["context"]]


@given(
    sides=st.lists(st.tuples(st.integers(4, 64), st.integers(4, 64)), max_size=20),
    size=st.integers(1, 6),
)
def test_the_matrices_are_shared_out_evenly(sides: list[tuple[int, int]], size: int) -> None:
    shapes = [torch.Size(pair) for pair in sides]
    owners = shares(shapes, size)
    cost = [min(pair) ** 2 * max(pair) for pair in sides]
    load = [
        sum(c for c, owner in zip(cost, owners, strict=True) if owner == r) for r in range(size)
    ]
    assert sum(load) == sum(cost), "every matrix has one owner"
    assert max(load) <= sum(cost) / size + max(cost, default=0)
