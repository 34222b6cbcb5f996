"""Sharding: groups inside groups, and worlds with more ranks than a parameter has rows."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from worlds import run_world

from elastic import shard as sharding
from elastic.ema import EmaWeights
from elastic.loop import build_optimizer, clip_gradients
from elastic.shard import initialise, shard
from elastic.world import World
from models import DCAE, LTXVAE, DiT, HunyuanVAE
from models.codec import Codec
from models.recompute import Recompute
from stages import AdamW, Ema, Muon

# Both keep blocks inside lists of blocks; so small that every block becomes a group of its own.
CODECS: dict[str, tuple[Codec, int]] = {
    "HunyuanVAE": (HunyuanVAE(channels=4, widths=(4, 4, 8, 8), layers=1, norm_groups=2), 5),
    "DCAE": (
        DCAE(
            channels=8,
            widths=(8, 8, 8, 8, 8, 8),
            encoder_depths=(1, 1, 1, 1, 1, 1),
            decoder_depths=(1, 1, 1, 1, 1, 1),
            head_width=8,
        ),
        4,
    ),
    "LTXVAE": (LTXVAE(channels=8, widths=(8, 8, 8, 8), layers=(1, 1, 1, 1, 1)), 9),
}


def _trained(
    world: World, name: str, smallest_group: int, recompute: bool = False
) -> tuple[int, list[float]]:
    """Groups of a codec, and its losses over three updates; every rank sees the same clips."""
    codec, frames = CODECS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALLEST_GROUP", smallest_group)
        model = shard(codec.build(device="meta").recompute(recompute), world)
    initialise(model, 0, "nested")
    optimizer = build_optimizer(AdamW(lr=1e-3), model)
    x_BCTHW = torch.randn(1, 3, frames, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = (model(x_BCTHW, None).x_BCTHW - x_BCTHW).square().mean()
        loss.backward()
        clip_gradients(model, 1.0, world)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(isinstance(module, FSDPModule) for module in model.modules()), losses


@pytest.mark.parametrize("name", list(CODECS))
def test_a_codec_with_groups_inside_groups_trains_like_one_without(name: str) -> None:
    (num_groups, alone), *_ = run_world(_trained, 1, name, 1 << 30)
    assert num_groups == 1
    for num_groups, losses in run_world(_trained, 2, name, 1):
        assert num_groups > 10
        assert losses == pytest.approx(alone, rel=1e-5)


def test_a_codec_that_computes_again_trains_to_the_same_bits() -> None:
    assert run_world(_trained, 2, "DCAE", 1, True) == run_world(_trained, 2, "DCAE", 1, False)


class _Narrow(nn.Module):
    """Four rows in every parameter: matrices for Muon, vectors for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x_BD: Tensor) -> Tensor:
        y_BD: Tensor = self.back(self.wide(x_BD))
        return y_BD


def _narrow(world: World) -> tuple[float, float, dict[str, list[float]]]:
    with torch.device("meta"):
        model = shard(_Narrow(), world)
    initialise(model, 0, "narrow")
    optimizer = build_optimizer(Muon(lr=0.1, matrix_lr=0.1), model)
    ema = EmaWeights(model, Ema(halflife=10))
    (100 * model(torch.ones(3, 8)).square().sum()).backward()
    norm, clipped = (float(clip_gradients(model, 0.5, world)) for _ in range(2))
    optimizer.step()
    ema.update(10, 10)
    averages = {
        name: tensor.full_tensor().flatten().tolist()  # type: ignore[attr-defined]  # DTensors
        for name, tensor in ema.tensors.items()
    }
    return norm, clipped, averages


def test_a_rank_that_holds_no_rows_takes_part_like_the_others() -> None:
    ((norm, clipped, averages),) = run_world(_narrow, 1)
    assert norm > 1
    assert clipped == pytest.approx(0.5, rel=1e-4)
    for other_norm, other_clipped, others in run_world(_narrow, 5):
        assert other_norm == pytest.approx(norm, rel=1e-6)
        assert other_clipped == pytest.approx(clipped, rel=1e-6)
        for name, values in averages.items():
            # Products of matrices on the way: fp32 sums in another order show in the 4th digit.
            assert others[name] == pytest.approx(values, rel=1e-3, abs=1e-5)


def _dit_losses(
    world: World, precision: Literal["fp32", "bf16"], recompute: Recompute
) -> list[Any]:
    """Losses and gradient norms of a small DiT over three updates, and the dtype of its shards."""
    shape = DiT(depth=1, depth_single=1, width=48, heads=2)
    model = shard(shape.build(4, 12, 10, device="meta").recompute(recompute), world, precision)
    initialise(model, 0, "precise")
    optimizer = build_optimizer(AdamW(lr=1e-3), model)
    draw = torch.Generator().manual_seed(0)
    z, text = torch.randn(2, 4, 2, 4, 4, generator=draw), torch.randn(2, 3, 12, generator=draw)
    result: list[Any] = []
    for _ in range(3):
        velocity = model(
            z, torch.tensor([0.2, 0.7]), text, None, torch.randn(2, 10, generator=draw)
        )
        loss = (velocity.float() - z).square().mean()
        loss.backward()
        result += [loss.item(), float(clip_gradients(model, 1.0, world))]
        optimizer.step()
        optimizer.zero_grad()
    return [*result, {parameter.dtype for parameter in model.parameters()}]


def test_recomputed_blocks_give_the_same_bits() -> None:
    kept = run_world(_dit_losses, 2, "fp32", "none")
    assert run_world(_dit_losses, 2, "fp32", "selective") == kept
    assert run_world(_dit_losses, 2, "fp32", "full") == kept


def test_bf16_blocks_keep_fp32_parameters_and_come_close_to_fp32() -> None:
    ((*exact, _),) = run_world(_dit_losses, 1, "fp32", "none")
    ((*rounded, dtypes),) = run_world(_dit_losses, 1, "bf16", "none")
    assert dtypes == {torch.float32}
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert rounded != exact
