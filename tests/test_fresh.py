"""Fresh parameters: a function of the name, with PyTorch's own distribution."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.dit import DiT
from models.fresh import fresh_parameters, fresh_tensor, named_generator, named_seed

SMALL = DiT(depth=1, depth_single=1, width=32, heads=2)
PARTS = st.lists(st.one_of(st.text(max_size=5), st.integers(-(2**70), 2**70)), min_size=1)


def generator_for(name: str) -> torch.Generator:
    return named_generator(0, "stage", name)


def all_fresh(model: nn.Module) -> dict[str, Tensor]:
    return dict(fresh_parameters(model, generator_for))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(3))


class Wrong(Unknown):
    def fresh(self, leaf: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.zeros(2, 2)


@given(first=PARTS, second=PARTS)
def test_seeds_differ_unless_the_parts_are_the_same(
    first: list[str | int], second: list[str | int]
) -> None:
    same = [(type(part), part) for part in first] == [(type(part), part) for part in second]
    assert (named_seed(*first) == named_seed(*second)) == same
    assert 0 <= named_seed(*first) < 2**63


@pytest.mark.parametrize(
    ("first", "second"), [(("ab",), ("a", "b")), ((1,), ("1",)), ((1, 2), (12,)), (("",), ("", ""))]
)
def test_seeds_do_not_run_parts_together(
    first: tuple[str | int, ...], second: tuple[str | int, ...]
) -> None:
    assert named_seed(*first) != named_seed(*second)


def test_seeds_are_pinned_for_runs_that_resume_elsewhere() -> None:
    assert named_seed("hunyuan", 0, "img_in.weight") == 7_442_432_467_008_561_171


def test_a_seed_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        named_seed()


def test_meta_and_cpu_models_get_the_same_start_for_every_parameter() -> None:
    on_meta = all_fresh(SMALL.build(4, 8, 8, device="meta"))
    on_cpu = SMALL.build(4, 8, 8)
    assert on_meta.keys() == dict(on_cpu.named_parameters()).keys()
    for name, value in fresh_parameters(on_cpu, generator_for):
        assert torch.equal(value, on_meta[name]), name
        assert value.dtype == torch.float32
    on_cpu.load_state_dict(on_meta)
    assert not list(on_cpu.named_buffers())


def test_a_parameter_does_not_depend_on_what_else_is_in_the_model() -> None:
    small = all_fresh(SMALL.build(4, 8, 8, device="meta"))
    deeper = all_fresh(SMALL.replace(depth=3, depth_single=0).build(4, 8, 8, device="meta"))
    shared = small.keys() & deeper.keys()
    assert any(name.startswith("double_blocks.0") for name in shared)
    assert all(torch.equal(small[name], deeper[name]) for name in shared)


@given(order=st.permutations(range(4)))
def test_the_order_of_the_draws_does_not_matter(order: list[int]) -> None:
    layers = {f"layer{i}": nn.Linear(3, 2, device="meta") for i in order}
    values = all_fresh(nn.ModuleDict(layers))
    for name, value in all_fresh(
        nn.ModuleDict({f"layer{i}": layers[f"layer{i}"] for i in range(4)})
    ).items():
        assert torch.equal(values[name], value)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(50, 400),
        nn.Conv2d(8, 64, 5, groups=2),
        nn.Conv3d(6, 40, (3, 3, 3)),
        nn.ConvTranspose2d(16, 24, 5),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_start_with_pytorchs_own_distribution(module: nn.Module) -> None:
    fresh = all_fresh(module)
    for leaf, theirs in module.named_parameters():
        ours = fresh[leaf]
        assert ours.shape == theirs.shape
        # Theirs is drawn without a seed, so take the bound from its fan-in, not from its maximum.
        bound = 1 / math.sqrt(module.weight.shape[1:].numel())
        assert theirs.abs().max().item() <= bound * (1 + 1e-6)
        assert ours.abs().max().item() == pytest.approx(bound, rel=0.1)
        assert ours.mean().abs().item() < 4 * bound / math.sqrt(3 * ours.numel())
    weight = fresh["weight"]
    assert weight.std().item() == pytest.approx(weight.abs().max().item() / math.sqrt(3), rel=0.02)


def test_norms_start_as_identities_and_embeddings_as_unit_normal() -> None:
    for norm in (nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)):
        fresh = all_fresh(norm)
        assert torch.equal(fresh["weight"], torch.ones(4))
        assert torch.equal(fresh.get("bias", torch.zeros(4)), torch.zeros(4))
    rows = all_fresh(nn.Embedding(500, 40, padding_idx=3))["weight"]
    assert rows.std().item() == pytest.approx(1, abs=0.02)
    assert not rows[3].any()


def test_zero_layers_of_the_transformer_start_at_zero_and_its_head_norms_at_one() -> None:
    fresh = all_fresh(SMALL.build(4, 8, 8, device="meta"))
    zeros = {name for name, value in fresh.items() if not value.any()}
    expected = {
        name
        for name in fresh
        if "mod.lin." in name or "modulation.lin." in name or name.startswith("final_layer.")
    }
    assert zeros == expected
    assert torch.equal(fresh["single_blocks.0.norm.query_norm.scale"], torch.ones(16))


def test_a_parameter_without_a_rule_is_named() -> None:
    model = nn.ModuleDict({"inner": Unknown()})
    with pytest.raises(LookupError, match=r"inner.table: .*Unknown.*fresh"):
        all_fresh(model)
    with pytest.raises(LookupError, match="'gain' of a Linear"):
        fresh_tensor(nn.Linear(2, 2), "gain", torch.Size([2]), generator_for("gain"))


def test_a_rule_that_returns_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"table: Wrong.fresh returned \(2, 2\).*\(3,\)"):
        all_fresh(Wrong())


def test_a_shared_parameter_comes_once() -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "second": nn.Linear(3, 3)})
    model["second"].weight = model["first"].weight
    assert list(all_fresh(model)) == ["first.weight", "second.bias"]
