"""Published layouts: the same numbers as diffusers and as Open-Sora's split blocks, both ways."""

# B sample, C channel, T frame, H, W latent grid, L text token, N video token, S = L + N,
# D width, A attention head, E channel of a head, P rotary pair of a head

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_flux
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from elastic.convert import in_layout, write_spans
from elastic.weight_source import WeightSource, fill, open_weights, own_weights
from models.dit import DiT, MMDiT, patches, sinusoid
from models.layouts import (
    LayoutName,
    RotaryName,
    Widths,
    detect_layout,
    half_split,
    implied_widths,
    interleaved,
    layout_of,
    our_names,
    pieces,
    shared_prefix,
)
from models.rotary import Grid

SHAPE = DiT(depth=2, depth_single=2, width=64, heads=2, patch=2)
CHANNELS, TEXT, POOLED, LENGTH = 4, 24, 20, 5
GRID: Grid = (3, 4, 6)
LAYOUTS: list[tuple[LayoutName, RotaryName]] = [
    (layout, rotary)
    for layout in ("bfl", "diffusers", "open-sora")
    for rotary in ("interleaved", "half-split")
]


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter drawn, zeros and ones too, so that nothing can be exchanged unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval().requires_grad_(False)


def ours(shape: DiT = SHAPE) -> MMDiT:
    model = randomised(shape.build(CHANNELS, TEXT, POOLED))
    assert isinstance(model, MMDiT)
    return model


def theirs(*, guidance: bool) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS * SHAPE.patch**2,
        num_layers=SHAPE.depth,
        num_single_layers=SHAPE.depth_single,
        attention_head_dim=SHAPE.head_width,
        num_attention_heads=SHAPE.heads,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance,
        axes_dims_rope=tuple(2 * pairs for pairs in SHAPE.rotary_pairs),
    )
    return randomised(model)


def filled(source: WeightSource, shape: DiT) -> MMDiT:
    model = shape.build(CHANNELS, TEXT, POOLED)
    for name, parameter in model.named_parameters():
        fill(parameter, source, name)
    return model.eval().requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "z_BCTHW": (2, CHANNELS, *GRID),
        "text_BLD": (2, LENGTH, TEXT),
        "pooled_BD": (2, POOLED),
    }
    drawn = {name: torch.randn(size, generator=generator) for name, size in shapes.items()}
    return {**drawn, "t_B": torch.tensor([0.3, 0.8]), "guidance_B": torch.tensor([3.5, 7.0])}


def run_ours(model: MMDiT) -> Tensor:
    x = inputs()
    guidance_B = x["guidance_B"] if model.shape.guidance else None
    velocity_BCTHW: Tensor = model(
        x["z_BCTHW"], x["t_B"], x["text_BLD"], None, x["pooled_BD"], guidance_B
    )
    return patches(velocity_BCTHW, SHAPE.patch)


def run_theirs(model: FluxTransformer2DModel) -> Tensor:
    x = inputs()
    axes = [torch.arange(size) for size in SHAPE.token_grid(GRID)]
    ids_N3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    out: Tensor = model(
        hidden_states=patches(x["z_BCTHW"], SHAPE.patch),
        encoder_hidden_states=x["text_BLD"],
        pooled_projections=x["pooled_BD"],
        timestep=x["t_B"],
        guidance=x["guidance_B"] if model.config.guidance_embeds else None,
        img_ids=ids_N3.float(),
        txt_ids=torch.zeros(LENGTH, 3),
        return_dict=False,
    )[0]
    return out


def turn_halves(x: Tensor, freqs_cis: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
    """diffusers' rotary in its half-split form; its tables repeat each angle for neighbours."""
    tables = tuple(torch.cat((table[:, ::2], table[:, ::2]), dim=-1) for table in freqs_cis)
    turn = embeddings.apply_rotary_emb
    turned: Tensor = turn(x, tables, use_real_unbind_dim=-2, sequence_dim=sequence_dim)
    return turned


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(params=["interleaved", "half-split"])
def rotary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RotaryName:
    """Both orders of rotary channels; diffusers has the second where it is asked to."""
    if request.param == "half-split":
        monkeypatch.setattr(transformer_flux, "apply_rotary_emb", turn_halves)
    order: RotaryName = request.param
    return order


@pytest.mark.parametrize("guidance", [False, True])
def test_diffusers_weights_give_the_same_velocity_here(
    guidance: bool, rotary: RotaryName, tmp_path: Path
) -> None:
    reference = theirs(guidance=guidance)
    save_file(reference.state_dict(), tmp_path / "flux.safetensors")
    shape = SHAPE.replace(guidance=guidance)
    source = open_weights(tmp_path / "flux.safetensors", shape, rotary=rotary)
    assert list(source.leftover) == []
    model = filled(source, shape)
    assert relative(run_ours(model), run_theirs(reference)) < 1e-5


def test_the_orders_of_rotary_channels_are_told_apart_by_these_tests(tmp_path: Path) -> None:
    """The control: the wrong order shows far above the tolerance."""
    reference = theirs(guidance=False)
    save_file(reference.state_dict(), tmp_path / "flux.safetensors")
    source = open_weights(tmp_path / "flux.safetensors", SHAPE, rotary="half-split")
    assert relative(run_ours(filled(source, SHAPE)), run_theirs(reference)) > 1e-2


def exported(
    model: MMDiT, folder: Path, layout: LayoutName, rotary: RotaryName, dtype: torch.dtype
) -> Path:
    """The model in a file of the layout, through the code of the verb."""
    save_file(dict(model.state_dict()), folder / "own.safetensors")
    source = own_weights(folder / "own.safetensors")
    spans = in_layout(source, layout_of(layout, rotary), Widths.of(model.shape))
    write_spans(source, spans, dtype, folder / "out.safetensors", {"format": "pt"})
    return folder / "out.safetensors"


@pytest.mark.parametrize("guidance", [False, True])
def test_our_weights_give_the_same_velocity_in_diffusers(
    guidance: bool, rotary: RotaryName, tmp_path: Path
) -> None:
    model = ours(SHAPE.replace(guidance=guidance))
    path = exported(model, tmp_path, "diffusers", rotary, torch.float32)
    reference = theirs(guidance=guidance)
    reference.load_state_dict(load_file(path))
    assert relative(run_theirs(reference), run_ours(model)) < 1e-5


class SplitReference:
    """Open-Sora's blocks with split projections and half-split rotary, written out plainly."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def embedder(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.out_layer", functional.silu(self.linear(f"{name}.in_layer", x)))

    def modulation(self, name: str, condition_BD: Tensor, parts: int) -> tuple[Tensor, ...]:
        return self.linear(name, functional.silu(condition_BD))[:, None].chunk(parts, dim=-1)

    def heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b s (a e) -> b a s e", a=SHAPE.heads)

    def qk(self, name: str, kind: str, norm: str, x: Tensor) -> Tensor:
        q_BASE = self.heads(self.linear(f"{name}{kind[0]}_proj", x))
        root = (q_BASE.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return q_BASE / root * self.tensors[f"{norm}.{kind}_norm.scale"]

    def turned(self, x_BASE: Tensor, length: int) -> Tensor:
        """Channel p of a head is turned against channel p + E/2."""
        angles = []
        axes = [torch.arange(size, dtype=torch.float32) for size in SHAPE.token_grid(GRID)]
        positions = torch.meshgrid(*axes, indexing="ij")
        for position, count in zip(positions, SHAPE.rotary_pairs, strict=True):
            rate_P = 1 / SHAPE.theta ** (torch.arange(0, 2 * count, 2) / (2 * count))
            angles.append(position.reshape(-1, 1) * rate_P)
        angle_NP = torch.cat(angles, dim=1)
        angle_SP = torch.cat((torch.zeros(length, angle_NP.shape[1]), angle_NP))
        low, high = x_BASE.chunk(2, dim=-1)
        cos, sin = angle_SP.cos(), angle_SP.sin()
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.turned(q, LENGTH), self.turned(k, LENGTH)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        return rearrange(weights @ v, "b a s e -> b s (a e)")

    def double(self, block: str, video: Tensor, text: Tensor, condition: Tensor) -> list[Tensor]:
        streams, parts = {"txt": text, "img": video}, {}
        projected: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for stream, x in streams.items():
            parts[stream] = self.modulation(f"{block}.{stream}_mod.lin", condition, 6)
            shift, scale = parts[stream][:2]
            inner = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
            attn = f"{block}.{stream}_attn."
            projected["q"].append(self.qk(attn, "query", f"{attn}norm", inner))
            projected["k"].append(self.qk(attn, "key", f"{attn}norm", inner))
            projected["v"].append(self.heads(self.linear(f"{attn}v_proj", inner)))
        joint = self.attend(*(torch.cat(each, dim=2) for each in projected.values()))
        attended = {"txt": joint[:, :LENGTH], "img": joint[:, LENGTH:]}
        done = []
        for stream, x in streams.items():
            _, _, gate, shift2, scale2, gate2 = parts[stream]
            x = x + gate * self.linear(f"{block}.{stream}_attn.proj", attended[stream])
            inner = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
            hidden = self.linear(f"{block}.{stream}_mlp.0", inner)
            hidden = functional.gelu(hidden, approximate="tanh")
            done.append(x + gate2 * self.linear(f"{block}.{stream}_mlp.2", hidden))
        return done

    def single(self, block: str, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(f"{block}.modulation.lin", condition, 3)
        inner = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        q = self.qk(f"{block}.", "query", f"{block}.norm", inner)
        k = self.qk(f"{block}.", "key", f"{block}.norm", inner)
        v_mlp = self.linear(f"{block}.v_mlp", inner)
        v, hidden = v_mlp[..., : SHAPE.width], v_mlp[..., SHAPE.width :]
        hidden = functional.gelu(hidden, approximate="tanh")
        joined = torch.cat((self.attend(q, k, self.heads(v)), hidden), dim=-1)
        return x + gate * self.linear(f"{block}.linear2", joined)

    def __call__(self) -> Tensor:
        x = inputs()
        video = self.linear("img_in", patches(x["z_BCTHW"], SHAPE.patch))
        text = self.linear("txt_in", x["text_BLD"])
        condition = self.embedder("time_in", sinusoid(x["t_B"]))
        condition = condition + self.embedder("vector_in", x["pooled_BD"])
        for i in range(SHAPE.depth):
            text, video = self.double(f"double_blocks.{i}", video, text, condition)
        joint = torch.cat((text, video), dim=1)
        for i in range(SHAPE.depth_single):
            joint = self.single(f"single_blocks.{i}", joint, condition)
        shift, scale = self.modulation("final_layer.adaLN_modulation.1", condition, 2)
        video = functional.layer_norm(joint[:, LENGTH:], (SHAPE.width,), eps=1e-6)
        return self.linear("final_layer.linear", video * (1 + scale) + shift)


def test_an_open_sora_file_computes_what_its_split_blocks_compute(tmp_path: Path) -> None:
    model = ours()
    path = exported(model, tmp_path, "open-sora", "half-split", torch.float32)
    tensors = load_file(path)
    assert tensors["single_blocks.0.v_mlp.weight"].shape == (64 + 256, 64)
    assert tensors["double_blocks.1.txt_attn.k_proj.bias"].shape == (64,)
    assert relative(SplitReference(tensors)(), run_ours(model)) < 1e-5
    assert relative(run_ours(filled(open_weights(path, None), SHAPE)), run_ours(model)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "rotary_name"), LAYOUTS)
@pytest.mark.parametrize("given_shape", [True, False])
def test_into_a_layout_and_back_every_bit_is_the_same(
    layout: LayoutName,
    rotary_name: RotaryName,
    dtype: torch.dtype,
    given_shape: bool,
    tmp_path: Path,
) -> None:
    condition = layout != "diffusers"
    shape = SHAPE.replace(
        guidance=True, image_condition=condition, qkv_bias=condition, mlp_ratio=3.0
    )
    model = ours(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    path = exported(model, tmp_path, layout, rotary_name, dtype)
    assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    source = open_weights(path, shape if given_shape else None, layout, rotary_name)
    assert list(source.leftover) == []
    state = model.state_dict()
    assert source.shapes == {name: tuple(value.shape) for name, value in state.items()}
    for name, value in filled(source, shape).state_dict().items():
        assert torch.equal(value, state[name]), name


def test_any_rows_of_any_parameter_are_those_of_the_whole(tmp_path: Path) -> None:
    model = ours()
    path = exported(model, tmp_path, "open-sora", "half-split", torch.bfloat16)
    source = open_weights(path, SHAPE)
    for name, shape in source.shapes.items():
        whole = source.rows(name, 0, shape[0])
        for first, last in ((0, 1), (shape[0] // 3, shape[0] // 2 + 7), (5, 5), (3, shape[0])):
            assert torch.equal(source.rows(name, first, last), whole[first:last]), name


def test_the_names_listed_are_those_of_the_module() -> None:
    shape = SHAPE.replace(guidance=True, image_condition=True)
    model = shape.build(CHANNELS, TEXT, POOLED, device="meta")
    names = [name for name, _ in model.named_parameters()]
    assert sorted(our_names(names)) == sorted(names)


def all_keys(layout: LayoutName) -> Iterator[str]:
    names = SHAPE.build(CHANNELS, TEXT, POOLED, device="meta").state_dict()
    for name in names:
        yield from (piece.key for piece in pieces(name, layout_of(layout), Widths.of(SHAPE)))


def test_diffusers_own_keys_are_all_named_and_no_others() -> None:
    assert set(all_keys("diffusers")) == set(theirs(guidance=False).state_dict())


@pytest.mark.parametrize("layout", ["bfl", "diffusers", "open-sora"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "model.diffusion_model."])
def test_a_layout_is_told_from_its_keys_behind_any_prefix(layout: LayoutName, prefix: str) -> None:
    keys = [prefix + key for key in all_keys(layout)]
    assert shared_prefix(keys) == prefix
    assert shared_prefix([*keys, "one.that.lacks.it"]) == ""
    assert detect_layout([key.removeprefix(prefix) for key in keys]) == layout


def test_keys_of_no_layout_and_of_two_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"none of its 2 keys .* for example: decoder.a, encoder.b"
    ):
        detect_layout(["encoder.b", "decoder.a"])
    mixed = ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.q_proj.weight"]
    with pytest.raises(ValueError, match=r"more than one layout: double_blocks\S+, single_blocks"):
        detect_layout(mixed)


def test_widths_that_the_keys_do_not_tell_are_asked_for() -> None:
    with pytest.raises(LookupError, match="query_norm"):
        implied_widths("bfl", {"double_blocks.0.img_attn.qkv.weight": (192, 64)})


@given(half=st.integers(1, 9), num_heads=st.integers(1, 4), columns=st.integers(1, 3))
def test_the_orders_of_rotary_rows_undo_each_other(half: int, num_heads: int, columns: int) -> None:
    head = 2 * half
    rows = torch.arange(num_heads * head * columns).reshape(-1, columns)
    ours_rows = interleaved(rows, head)
    assert torch.equal(half_split(ours_rows, head), rows)
    assert torch.equal(interleaved(half_split(rows, head), head), rows)
    for number in range(num_heads):
        for pair in range(half):
            start = number * head
            assert torch.equal(ours_rows[start + 2 * pair], rows[start + pair])
            assert torch.equal(ours_rows[start + 2 * pair + 1], rows[start + half + pair])


@given(layout=st.sampled_from(LAYOUTS), width=st.integers(1, 4), mlp=st.integers(1, 40))
def test_the_pieces_cover_every_tensor_of_a_file_once(
    layout: tuple[LayoutName, RotaryName], width: int, mlp: int
) -> None:
    widths = Widths(width * 8, 8, mlp)
    covered: dict[str, list[tuple[int, int]]] = {}
    for name in our_names(["double_blocks.0.", "single_blocks.3."]):
        if name.startswith("cond_in") and layout[0] == "diffusers":
            continue
        for piece in pieces(name, layout_of(*layout), widths):
            covered.setdefault(piece.key, []).append((piece.first, piece.rows or 1))
    for spans in covered.values():
        end = 0
        for first, rows in sorted(spans):
            assert first == end
            end += rows
