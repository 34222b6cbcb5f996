"""The diffusion transformer: its size, its positions, its masks, its cost, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.dit import DiT, MMDiT, codec_shaped
from models.fresh import fresh_parameters
from models.rotary import Rotation, rotation

SMALL = DiT(depth=1, depth_single=1, width=32, heads=2)
CHANNELS, TEXT_WIDTH, POOLED_WIDTH = 4, 12, 10


def shaken(shape: DiT) -> MMDiT:
    """A model whose output depends on everything: the zero layers get values too."""
    model = shape.build(CHANNELS, TEXT_WIDTH, POOLED_WIDTH)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    return model


def inputs(length: int, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    return (
        torch.randn(2, CHANNELS, *grid, generator=generator),
        torch.rand(2, generator=generator),
        torch.randn(2, length, TEXT_WIDTH, generator=generator),
        torch.ones(2, length, dtype=torch.bool),
        torch.randn(2, POOLED_WIDTH, generator=generator),
    )


def reference_turn(x: Tensor, position: tuple[float, ...], pairs: tuple[int, ...]) -> Tensor:
    """One head vector turned as complex numbers, pair by pair."""
    turned = torch.view_as_complex(x.double().reshape(-1, 2)).clone()
    at = 0
    for place, count in zip(position, pairs, strict=True):
        for i in range(count):
            angle = torch.tensor(place * 10_000.0 ** (-i / count), dtype=torch.float64)
            turned[at] *= torch.polar(torch.ones((), dtype=torch.float64), angle)
            at += 1
    return torch.view_as_real(turned).flatten()


def test_the_published_size_is_met_to_the_parameter_count() -> None:
    model = DiT(depth=19, depth_single=38, width=3072, heads=24).build(device="meta")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(11_891.18, abs=0.01)
    shaped = sum(p.numel() for name, p in model.named_parameters() if codec_shaped(name))
    assert shaped / 1e6 == pytest.approx(0.200 + 0.197, abs=0.001)


def test_the_published_i2v_model_on_dc_ae_is_met_to_the_parameter_count() -> None:
    shape = DiT(depth=19, depth_single=38, width=3072, heads=24, patch=1, image_condition=True)
    model = shape.build(channels=128, stride=(4, 32, 32), device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(11_891.97, abs=0.01)
    shaped = sum(p.numel() for name, p in model.named_parameters() if codec_shaped(name))
    assert shaped / count == pytest.approx(0.00010, abs=0.000005)


def test_names_and_shapes_are_those_of_the_published_files() -> None:
    model = DiT(depth=1, depth_single=1, width=96, heads=4).build(16, 40, 24, device="meta")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    published = {
        "img_in.weight": (96, 64),
        "txt_in.weight": (96, 40),
        "time_in.in_layer.weight": (96, 256),
        "vector_in.out_layer.bias": (96,),
        "double_blocks.0.img_mod.lin.weight": (576, 96),
        "double_blocks.0.txt_attn.qkv.weight": (288, 96),
        "double_blocks.0.txt_attn.norm.query_norm.scale": (24,),
        "double_blocks.0.img_attn.proj.weight": (96, 96),
        "double_blocks.0.img_mlp.2.weight": (96, 384),
        "single_blocks.0.linear1.weight": (672, 96),
        "single_blocks.0.linear2.weight": (96, 480),
        "single_blocks.0.modulation.lin.bias": (288,),
        "single_blocks.0.norm.key_norm.scale": (24,),
        "final_layer.linear.weight": (64, 96),
        "final_layer.adaLN_modulation.1.weight": (192, 96),
    }
    assert {name: shapes.get(name) for name in published} == published


def test_only_codec_shaped_parameters_change_shape_with_the_codec() -> None:
    def shapes(channels: int, patch: int) -> dict[str, torch.Size]:
        model = SMALL.replace(patch=patch).build(channels, TEXT_WIDTH, POOLED_WIDTH, "meta")
        return {name: value.shape for name, value in model.named_parameters()}

    before, after = shapes(16, 2), shapes(128, 1)
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {"img_in.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert all(codec_shaped(name) for name in changed)
    assert not codec_shaped("final_layer.adaLN_modulation.1.weight")


def test_a_fresh_model_is_the_zero_function_and_its_blocks_identities() -> None:
    model = SMALL.build(CHANNELS, TEXT_WIDTH, POOLED_WIDTH)
    z, t, text, mask, pooled = inputs(3)
    assert torch.equal(model(z, t, text, mask, pooled), torch.zeros_like(z))
    x_BSD = torch.randn(2, 9, 32)
    turn = rotation(SMALL.rotary_pairs, SMALL.theta, (1, 2, 3), 3, torch.device("cpu"))
    assert torch.equal(model.single_blocks[0](x_BSD, torch.randn(2, 32), turn, None), x_BSD)


def test_a_fresh_image_condition_changes_nothing_and_a_trained_one_does() -> None:
    shape = SMALL.replace(image_condition=True)
    model, batch = shaken(shape), inputs(3)
    given_BCTHW = torch.randn(2, 1 + CHANNELS, 3, 4, 6)
    with torch.no_grad():
        none_given = model(*batch)
        zeros = model(*batch, given_BCTHW=torch.zeros_like(given_BCTHW))
        given_something = model(*batch, given_BCTHW=given_BCTHW)
        torch.testing.assert_close(none_given, zeros)
        assert (given_something - none_given).abs().max() > 1e-3
        for name, fresh in fresh_parameters(model, lambda name: torch.Generator()):
            if name.startswith("cond_in."):
                model.get_parameter(name).copy_(fresh)
        torch.testing.assert_close(model(*batch, given_BCTHW=given_BCTHW), model(*batch))


def test_the_strength_of_guidance_reaches_the_output_and_is_asked_for() -> None:
    model, batch = shaken(SMALL.replace(guidance=True)), inputs(3)
    with torch.no_grad():
        weak, strong = (model(*batch, guidance_B=torch.full((2,), g)) for g in (1.0, 4.0))
    assert (weak - strong).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance=True"):
        model(*batch)


def test_pixel_positions_keep_distances_when_the_autoencoder_changes() -> None:
    hunyuan = SMALL.replace(rope_unit="pixel", patch=2)
    dc_ae = SMALL.replace(rope_unit="pixel", patch=1)
    assert hunyuan.spacing((4, 8, 8)) == (1.0, 1.0, 1.0)
    assert dc_ae.spacing((4, 32, 32)) == (1.0, 2.0, 2.0)
    assert SMALL.replace(patch=1).spacing((4, 32, 32)) == (1.0, 1.0, 1.0)

    # The coarse token of row 1, column 2 lies amid rows 2 and 3, columns 4 and 5 of the fine grid.
    pairs, cpu = SMALL.rotary_pairs, torch.device("cpu")
    turn = rotation(pairs, SMALL.theta, (1, 2, 4), 0, cpu, dc_ae.spacing((4, 32, 32)))
    x_BASE = torch.randn(1, 1, 1, 16).expand(1, 1, 8, 16)
    expected_E = reference_turn(x_BASE[0, 0, 6], (0.0, 2.5, 4.5), pairs)
    torch.testing.assert_close(turn(x_BASE)[0, 0, 6].double(), expected_E, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(padding=st.integers(1, 9), length=st.integers(1, 5))
def test_padded_text_changes_nothing_whatever_stands_in_it(padding: int, length: int) -> None:
    model = shaken(SMALL)
    z, t, text, mask, pooled = inputs(length)
    longer = torch.cat([text, torch.full((2, padding, TEXT_WIDTH), 50.0)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(2, padding, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        expected = model(z, t, text, None, pooled)
        torch.testing.assert_close(model(z, t, text, mask, pooled), expected)
        torch.testing.assert_close(model(z, t, longer, longer_mask, pooled), expected)
        unmasked = model(z, t, longer, None, pooled)
    assert (unmasked - expected).abs().max() > 1e-3


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model = shaken(SMALL)
    batch = inputs(4)
    batch[3][0, 2:] = False
    with torch.no_grad():
        together = model(*batch)
        alone = torch.cat([model(*(value[i : i + 1] for value in batch)) for i in range(2)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("changed", range(5))
def test_every_input_reaches_the_output(changed: int) -> None:
    model = shaken(SMALL)
    batch = list(inputs(4))
    with torch.no_grad():
        before = model(*batch)
        if changed == 3:
            batch[3][:, 1:] = False
        else:
            batch[changed] = batch[changed] * 0.5 + 0.1
        assert (model(*batch) - before).abs().max() > 1e-3


def test_every_parameter_gets_a_gradient() -> None:
    model = shaken(SMALL)
    model(*inputs(4)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_moving_the_video_moves_the_output_only_through_relative_positions() -> None:
    turn = rotation(SMALL.rotary_pairs, SMALL.theta, (5, 4, 6), 2, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    size = (1, 1, turn.cos_SP.shape[0], 16)
    scores = (turn(q.expand(size)) @ turn(k.expand(size)).mT)[0, 0, 2:, 2:]
    scores = scores.reshape(5, 4, 6, 5, 4, 6)
    torch.testing.assert_close(scores[:-1, :-1, :-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:, 1:, 1:])
    assert (scores[0, 0, 0, 0, 0, 0] - scores[0, 0, 0, 0, 0, 1]).abs() > 1e-3


@settings(deadline=None, max_examples=40)
@given(
    half=st.integers(3, 64),
    position=st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 5)),
    text=st.integers(1, 4),
)
def test_rotation_is_that_of_complex_numbers(
    half: int, position: tuple[int, int, int], text: int
) -> None:
    shape = DiT(depth=1, depth_single=0, width=2 * half, heads=1)
    turn = rotation(shape.rotary_pairs, shape.theta, (5, 4, 6), text, torch.device("cpu"))
    x = torch.randn(2 * half, generator=torch.Generator().manual_seed(half))
    turned = turn(x.expand(1, 1, turn.cos_SP.shape[0], -1))[0, 0]
    t, h, w = position
    expected = reference_turn(x, position, shape.rotary_pairs).float()
    torch.testing.assert_close(turned[text + (t * 4 + h) * 6 + w], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(turned[:text], x.expand(text, -1))


def test_rotation_keeps_bf16_and_turns_in_fp32() -> None:
    turn = Rotation(torch.full((1, 1), 0.6), torch.full((1, 1), 0.8))
    out = turn(torch.tensor([1.0, 2.0], dtype=torch.bfloat16).reshape(1, 1, 1, 2))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.0, 2.0]).bfloat16())


@given(half=st.integers(3, 200))
def test_head_channels_split_16_56_56_for_any_even_width(half: int) -> None:
    shape = DiT(depth=1, depth_single=0, width=2 * half, heads=1)
    t, h, w = shape.rotary_pairs
    assert t + h + w == half
    assert h == w >= 1
    assert t >= 1
    assert abs(t - half / 8) < 2
    assert DiT(depth=1, depth_single=0, width=128, heads=1).rotary_pairs == (8, 28, 28)


@settings(deadline=None, max_examples=12)
@given(
    depth=st.integers(0, 2),
    depth_single=st.integers(0, 2),
    grid=st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 8]), st.sampled_from([2, 6])),
    text=st.integers(1, 20),
    patch=st.sampled_from([1, 2]),
    mlp_ratio=st.sampled_from([1.5, 4.0]),
)
def test_flops_agree_with_pytorchs_counter(
    depth: int,
    depth_single: int,
    grid: tuple[int, int, int],
    text: int,
    patch: int,
    mlp_ratio: float,
) -> None:
    if depth + depth_single == 0:
        depth = 1
    shape = DiT(
        depth=depth,
        depth_single=depth_single,
        width=48,
        heads=2,
        patch=patch,
        mlp_ratio=mlp_ratio,
    )
    model = shape.build(CHANNELS, TEXT_WIDTH, POOLED_WIDTH)
    batch = [value[:1] for value in inputs(text, grid)]
    # The counter does not know the CPU's fused attention; the plain one is made of products.
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*batch)
    ours = shape.forward_flops(shape.tokens(grid), text, CHANNELS, TEXT_WIDTH, POOLED_WIDTH)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


@given(
    frames=st.integers(1, 40),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    patch=st.integers(1, 4),
)
def test_tokens_count_patches_or_the_grid_is_refused_with_one_that_fits(
    frames: int, height: int, width: int, patch: int
) -> None:
    shape = SMALL.replace(patch=patch)
    if height % patch == 0 and width % patch == 0:
        assert shape.tokens((frames, height, width)) * patch**2 == frames * height * width
        return
    with pytest.raises(ValueError, match=f"{frames}x{height}x{width}.*patch={patch}") as refusal:
        shape.tokens((frames, height, width))
    offered = str(refusal.value).rpartition("nearest: ")[2].split("x")
    shape.tokens((int(offered[0]), int(offered[1]), int(offered[2])))


def test_published_token_counts() -> None:
    hunyuan = DiT(depth=19, depth_single=38, width=3072, heads=24)
    assert hunyuan.tokens((33, 32, 32)) == 8_448
    assert hunyuan.tokens((33, 96, 96)) == 76_032
    assert hunyuan.replace(patch=1).tokens((32, 24, 24)) == 18_432


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "width=32, heads=5.*nearest: heads=4"),
        ({"heads": 16}, "width=32, heads=16.*even number of channels, 6 or more.*heads=4"),
        ({"width": 33, "heads": 3}, "width=33: no number of heads fits"),
        ({"patch": 0}, "patch"),
        ({"depth": 0, "depth_single": 0}, "at least one block"),
        ({"depht": 2}, "depht"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
    ],
)
def test_an_impossible_shape_is_refused_with_the_reason(
    changes: dict[str, int | float], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        DiT.model_validate({**SMALL.model_dump(), **changes})


def test_a_latent_that_the_patch_does_not_divide_is_refused() -> None:
    z, t, text, mask, pooled = inputs(2, (1, 3, 4))
    with pytest.raises(ValueError, match=r"1x3x4.*multiples of patch=2; nearest: 1x4x4"):
        shaken(SMALL)(z, t, text, mask, pooled)


def test_bf16_weights_take_fp32_inputs_and_stay_close() -> None:
    model = shaken(SMALL)
    batch = inputs(4)
    with torch.no_grad():
        exact = model(*batch)
        rough = model.bfloat16()(*batch)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
