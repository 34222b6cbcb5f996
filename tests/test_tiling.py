"""Tiles of large clips: without a trace in a local codec, and within a bound in the others."""

import weakref
from itertools import pairwise
from typing import ClassVar, Literal

import pytest
import torch
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from models.codec import Codec, CodecModule
from models.dc_ae import DCAE
from models.fresh import fresh_parameters, named_generator
from models.hunyuan_vae import HunyuanVAE
from models.tiling import Tiling, decode_tiled, encode_tiled, tile_starts, tile_weights

SMALL_DCAE = DCAE(
    channels=16,
    widths=(4, 4, 8, 8, 16, 16),
    encoder_depths=(0, 1, 1, 1, 1, 1),
    decoder_depths=(0, 1, 1, 1, 1, 1),
    head_width=8,
)
SMALL_HUNYUAN = HunyuanVAE(widths=(8, 8, 16, 16), layers=1, norm_groups=4)
ATTENTION_BLOCKS = 3  # of the small decoder


class _Folding(Codec):
    """Every block of pixels to the channels of one latent element, and back: nothing is lost."""

    stride: ClassVar[tuple[int, int, int]] = (2, 4, 4)
    lead: ClassVar[int] = 0
    kind: Literal["folding"] = "folding"
    channels: int = 3 * 2 * 4 * 4

    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        return _FoldingModule(self)


class _CausalFolding(_Folding):
    lead: ClassVar[int] = 1


class _FoldingModule(CodecModule):
    """A leading frame fills a latent frame by itself, with its sign turned: never that of others.

    So a tile's lead that is kept where it should be dropped shows.
    """

    def encode_whole(self, x_BCTHW: Tensor) -> Tensor:
        lead = self.codec.lead
        first = -repeat(x_BCTHW[:, :, :lead], "b c t h w -> b c (t r) h w", r=2)
        return rearrange(
            torch.cat([first, x_BCTHW[:, :, lead:]], dim=2),
            "b c (t r) (h p) (w q) -> b (c r p q) t h w", r=2, p=4, q=4,
        )  # fmt: skip

    def decode_whole(self, z_BCTHW: Tensor) -> Tensor:
        x_BCTHW = rearrange(z_BCTHW, "b (c r p q) t h w -> b c (t r) (h p) (w q)", r=2, p=4, q=4)
        lead = self.codec.lead
        return torch.cat([-x_BCTHW[:, :, :lead], x_BCTHW[:, :, 2 * lead :]], dim=2)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _filled(codec: DCAE, gain: float) -> CodecModule:
    """Fresh weights, with the gain at the end of each attention branch (fresh: 0) set."""
    module = codec.build()
    with torch.no_grad():
        for name, value in fresh_parameters(module, named_generator):
            is_gain = name.endswith("context_module.main.proj.norm.weight")
            module.get_parameter(name).copy_(torch.full_like(value, gain) if is_gain else value)
    return module


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    tile = draw(st.integers(2, 12))
    return draw(st.integers(1, 60)), tile, draw(st.integers(1, tile // 2)), draw(st.integers(1, 5))


@settings(deadline=None)
@given(axes())
def test_weights_sum_to_one_everywhere(axis: tuple[int, int, int, int]) -> None:
    length, tile, overlap, scale = axis
    starts = tile_starts(length, tile, overlap)
    if length <= tile:
        assert starts == [0]
        return
    assert starts[0] == 0
    assert starts[-1] + tile == length
    steps = [b - a for a, b in pairwise(starts)]
    assert all(0 < step <= tile - overlap for step in steps)
    total = torch.zeros(length * scale)
    for start, weight in zip(starts, tile_weights(starts, tile, overlap, scale), strict=True):
        assert weight.min() >= 0
        total[start * scale : (start + tile) * scale] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_a_seam_is_a_straight_ramp_over_the_overlap() -> None:
    first, second = tile_weights([0, 3], tile=5, overlap=2, scale=2)
    expected = torch.tensor([0.125, 0.375, 0.625, 0.875])
    torch.testing.assert_close(second, torch.cat([expected, torch.ones(6)]))
    torch.testing.assert_close(first, torch.cat([torch.ones(6), 1 - expected]))


@settings(deadline=None, max_examples=40)
@given(
    codec=st.sampled_from([_Folding(), _CausalFolding()]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    frames=st.sampled_from([None, 4, 8]),
    units=st.sampled_from([2, 4]),
    overlap=st.sampled_from([0.25, 0.5]),
)
def test_a_codec_that_looks_no_further_than_its_block_is_tiled_without_a_trace(
    codec: Codec, grid: tuple[int, int, int], frames: int | None, units: int, overlap: float
) -> None:
    if overlap * units < 1 or (frames is not None and overlap * frames < 2):
        overlap = 0.5
    tiled = codec.replace(tiling=Tiling(frames=frames, pixels=4 * units, overlap=overlap))
    t, h, w = grid
    x_BCTHW = _noise(2, 3, 2 * t + codec.lead, 4 * h, 4 * w)
    z_BCTHW = codec.build().encode(x_BCTHW)
    torch.testing.assert_close(tiled.build().encode(x_BCTHW), z_BCTHW, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiled.build().decode(z_BCTHW), x_BCTHW, rtol=0, atol=1e-5)


def test_a_convolution_differs_only_within_its_reach_of_a_tiles_edge() -> None:
    conv = nn.Conv3d(2, 3, 3, padding=1)
    reach, tiling, stride = 1, Tiling(frames=8, pixels=16, overlap=0.5), (2, 4, 4)

    def decode(z_BCTHW: Tensor) -> Tensor:
        factors = (2.0, 4.0, 4.0)
        x_BCTHW: Tensor = conv(functional.interpolate(z_BCTHW, scale_factor=factors))
        return x_BCTHW

    z_BCTHW = _noise(1, 2, 7, 9, 4)
    with torch.no_grad():
        whole = decode(z_BCTHW)
        tiled = decode_tiled(decode, z_BCTHW, tiling, stride, lead=0)
    near = torch.zeros(whole.shape[2:], dtype=torch.bool)
    for axis, (length, down) in enumerate(zip(z_BCTHW.shape[2:], stride, strict=True)):
        for start in tile_starts(length, 4, 2):
            for edge in {start, start + 4} - {0, length}:
                near.narrow(axis, edge * down - reach, 2 * reach).fill_(True)
    difference = (tiled - whole).abs().amax((0, 1))
    assert difference[~near].max() < 1e-5
    assert difference[near].max() > 1e-3
    assert 0.1 < near.float().mean() < 0.9


def test_a_causal_tile_reads_the_frame_before_it_and_drops_what_it_gives() -> None:
    torch.manual_seed(0)
    whole = SMALL_HUNYUAN.build()
    tiled = SMALL_HUNYUAN.replace(tiling=Tiling(frames=8, pixels=64, overlap=0.5)).build()
    tiled.load_state_dict(whole.state_dict())
    x_BCTHW = _noise(1, 3, 13, 8, 8)
    with torch.no_grad():
        a, b = whole.encode(x_BCTHW[:, :, :9]), whole.encode(x_BCTHW[:, :, 4:])[:, :, 1:]
        middle = (a[:, :, 2:] + b[:, :, :1]) / 2
        z_BCTHW = tiled.encode(x_BCTHW)
        expected = torch.cat([a[:, :, :2], middle, b[:, :, 1:]], dim=2)
        torch.testing.assert_close(z_BCTHW, expected)
        a, b = whole.decode(z_BCTHW[:, :, :3]), whole.decode(z_BCTHW[:, :, 1:])[:, :, 1:]
        rise = torch.tensor([0.125, 0.375, 0.625, 0.875]).view(4, 1, 1)
        middle = a[:, :, 5:] * (1 - rise) + b[:, :, :4] * rise
        expected = torch.cat([a[:, :, :5], middle, b[:, :, 4:]], dim=2)
        torch.testing.assert_close(tiled.decode(z_BCTHW), expected)


@pytest.mark.parametrize(("codec", "frames"), [(SMALL_HUNYUAN, 9), (SMALL_DCAE, 8)])
def test_a_clip_of_one_tile_goes_through_whole_and_training_always_does(
    codec: Codec, frames: int
) -> None:
    torch.manual_seed(0)
    whole = codec.build()
    # HunyuanVAE's 8+1 frames are one tile of 8.
    tiled = codec.replace(tiling=Tiling(frames=8, pixels=64, overlap=0.5)).build()
    cut = codec.replace(tiling=Tiling(frames=None, pixels=64, overlap=0.5)).build()
    tiled.load_state_dict(whole.state_dict())
    cut.load_state_dict(whole.state_dict())
    x_BCTHW = _noise(2, 3, frames, 64, 64)
    wide_BCTHW = _noise(1, 3, frames, 64, 128)
    with torch.no_grad():
        z_BCTHW = whole.encode(x_BCTHW)
        assert torch.equal(tiled.encode(x_BCTHW), z_BCTHW)
        assert torch.equal(tiled.decode(z_BCTHW), whole.decode(z_BCTHW))
        assert torch.equal(cut(wide_BCTHW).x_BCTHW, whole(wide_BCTHW).x_BCTHW)
        assert not torch.equal(cut.encode(wide_BCTHW), whole.encode(wide_BCTHW))


def test_every_call_is_one_tile_of_one_sample_and_none_is_kept() -> None:
    tiling, shapes, results = Tiling(frames=4, pixels=8, overlap=0.5), set(), []

    def encode(x_BCTHW: Tensor) -> Tensor:
        assert not [r for r in results if r() is not None], "an earlier tile is still held"
        shapes.add(tuple(x_BCTHW.shape))
        z_BCTHW = x_BCTHW[:, :, ::2, ::4, ::4].clone()
        results.append(weakref.ref(z_BCTHW))
        return z_BCTHW

    with torch.no_grad():
        encode_tiled(encode, _noise(3, 3, 14, 20, 36), tiling, (2, 4, 4), lead=0)
    assert shapes == {(1, 3, 4, 8, 8)}
    assert len(results) == 3 * 6 * 4 * 8


# Rows and columns of the first tile that no seam is near: 16 of its 128 px.
CORNER = (..., slice(0, 16), slice(0, 16))


def _away_from_seams(gain: float) -> tuple[Tensor, Tensor]:
    whole = _filled(SMALL_DCAE, gain)
    tiling = Tiling(frames=None, pixels=128, overlap=0.5)
    tiled = _filled(SMALL_DCAE.replace(tiling=tiling), gain)
    z_BCTHW = _noise(1, 16, 1, 8, 8)
    with torch.no_grad():
        expected, x_BCTHW = whole.decode(z_BCTHW), tiled.decode(z_BCTHW)
    assert (x_BCTHW - expected).abs().max() > 0.01, "a seam must show somewhere"
    return x_BCTHW[CORNER], expected[CORNER]


def test_dc_ae_without_attention_is_the_same_away_from_seams() -> None:
    """Fresh weights: the attention branches start at 0, and convolutions reach only so far."""
    torch.testing.assert_close(*_away_from_seams(0.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gain", [0.003, 0.03])
def test_dc_ae_differs_away_from_seams_by_no_more_than_its_attention_can(gain: float) -> None:
    """A tile attends to itself instead of to the clip, so it differs everywhere.

    Each attention branch ends in an RMS norm: what it adds has an RMS of `gain` in every place,
    whatever it attends to, and two such differ by 2 x gain at most. At a gain of 1, with random
    weights, that bound is larger than the clip: nothing is promised then.
    """
    x_BCTHW, expected_BCTHW = _away_from_seams(gain)
    rms = (x_BCTHW - expected_BCTHW).square().mean().sqrt()
    assert 0.01 * gain < rms < 2 * gain * ATTENTION_BLOCKS


@pytest.mark.parametrize(
    ("codec", "tiling", "message"),
    [
        (DCAE(), (32, 250, 0.25), r"tiling\.pixels 250 .* stride of 32 px, .* nearest is 256"),
        (DCAE(), (30, 256, 0.25), r"tiling\.frames 30 .* stride of 4 frames, .* nearest is 32"),
        (DCAE(), (32, 256, 0.3), r"overlap 0\.3 .* 256 px it is 2\.4 strides .* nearest is 0\.25"),
        (DCAE(), (16, 256, 0.125), r"tile of 16 frames it is 0\.5 strides .* nearest is 0\.25"),
        (DCAE(), (4, 256, 0.25), r"a tile of one stride cannot overlap"),
        (HunyuanVAE(), (17, 256, 0.25), r"HunyuanVAE: tiling\.frames 17 .* nearest is 16"),
    ],
)
def test_a_tile_that_is_no_whole_number_of_strides_is_refused(
    codec: Codec, tiling: tuple[int, int, float], message: str
) -> None:
    frames, pixels, overlap = tiling
    with pytest.raises(ValueError, match=message):
        codec.replace(tiling=Tiling(frames=frames, pixels=pixels, overlap=overlap))


def test_the_tiling_is_in_the_fingerprint() -> None:
    tilings = [
        None,
        Tiling(frames=32, pixels=256),
        Tiling(frames=None, pixels=256),
        Tiling(frames=32, pixels=512),
        Tiling(frames=32, pixels=256, overlap=0.5),
    ]
    prints = [str(DCAE(tiling=tiling).fingerprint_fields()) for tiling in tilings]
    assert len(set(prints)) == len(prints)
