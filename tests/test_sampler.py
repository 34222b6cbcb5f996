"""From noise to latents: how many clips at once, in which precision, and with which kernels."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from elastic import sampler as module
from elastic.kernels import compiles_walks
from elastic.sample import decoded_at_once, longest_bucket
from elastic.sampler import Guided, Sampler, noise_of, walked_at_once
from models import DCAE, DiT, HunyuanVAE, Tiling, WordHash
from models.blocks import Block
from models.fresh import named_generator
from models.text import pad
from stages import AdamW, Bucket, DiffusionStage, Ema, Phase, Videos

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STAGE = DiffusionStage(
    name="tiny",
    data=Videos("none.csv"),
    vae=HunyuanVAE(channels=4, weights="none"),
    model=DiT(depth=1, depth_single=1, width=24, heads=2, patch=2),
    text=WordHash(width=8),
    schedule=(Phase(until=40, buckets=(Bucket("32px", frames=5, batch=2),)),),
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=10),
    save_every=8,
    log_every=8,
    evaluate_every=8,
)
CLIPS = longest_bucket(STAGE)
SHAPE = (4, 2, 4, 4)
CAPTIONS = ("a red circle", "blue", "a green square that moves to the left slowly", "one", "two")
EACH = (8 + 9) * (3 * 24 + 96) * 4  # bytes of a row: video tokens and the longest text, fp32
WIDE = STAGE.replace(
    vae=DCAE(weights="none"),
    model=DiT(depth=19, depth_single=38, width=3072, heads=24, patch=1),
    precision="bf16",
    schedule=(Phase(until=40, buckets=(Bucket("768px", frames=128, batch=2),)),),
)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    drawn = {
        name: 0.2 * torch.randn(parameter.shape, generator=named_generator(0, name))
        for name, parameter in STAGE.build().named_parameters()
    }
    save_file(drawn, tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


def _sampler(weights: Path, stage: DiffusionStage = STAGE, guidance: float = 3.0) -> Sampler:
    return Sampler.load(stage, CLIPS, Guided(3, guidance), stage.text.null(), CAPTIONS, weights)


def _latents(sampler: Sampler, captions: Sequence[str] = CAPTIONS) -> Tensor:
    """Of all captions, as many at once as the sampler says."""
    parts = []
    for first in range(0, len(captions), sampler.at_once):
        these = captions[first : first + sampler.at_once]
        noise = torch.stack([noise_of(SHAPE, first + i) for i in range(len(these))])
        parts.append(sampler.latents(noise, pad(STAGE.text.encode(these))))
    return torch.cat(parts)


def _largest(model: nn.Module) -> tuple[list[int], list[int]]:
    """Lists that fill, as the model computes, with its rows and the bytes of a block's tensors."""
    rows: list[int] = []
    sizes: list[int] = []

    def blocked(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = (x for x in (*inputs, output) if isinstance(x, Tensor))
        sizes.extend(x.numel() * x.itemsize for x in tensors)

    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for block in (one for one in model.modules() if isinstance(one, Block)):
        for layer in block.modules():
            if layer is not block:
                layer.register_forward_hook(blocked)
    return rows, sizes


@pytest.mark.parametrize(
    ("room", "guidance", "rows", "turns"),
    [
        (10 * EACH, 3.0, [10], 1),
        (9 * EACH, 3.0, [6, 4], 2),  # four fit, three and two are as quick and even
        (4 * EACH, 3.0, [4, 4, 2], 3),
        (EACH, 3.0, [2] * 5, 5),  # a clip has two rows, whatever they take
        (4 * EACH, 1.0, [3, 2], 2),
    ],
)
def test_so_many_clips_are_walked_at_once_that_no_tensor_of_a_block_is_large(
    room: int, guidance: float, rows: list[int], turns: int, weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_LARGEST_BYTES", room)
    sampler = _sampler(weights, guidance=guidance)
    seen, sizes = _largest(sampler.model)
    _latents(sampler)
    assert seen == [number for number in rows for _ in range(sampler.guided.steps)]
    assert len(rows) == turns
    assert max(sizes) <= max(room, 2 * EACH)
    # What the bound is about is what is the largest.
    assert max(sizes) == max(rows) * EACH


@given(
    frames=st.integers(1, 33), guidance=st.sampled_from([1.0, 3.0]), text=st.integers(1, 512),
    num_clips=st.integers(0, 300), width=st.integers(1, 512),
)  # fmt: skip
def test_the_turns_are_as_few_as_the_bound_allows_and_about_alike(
    frames: int, guidance: float, text: int, num_clips: int, width: int
) -> None:
    model = DiT(depth=0, depth_single=1, width=6 * width, heads=width, patch=1)
    stage = WIDE.replace(model=model)
    bucket = Bucket("256px", frames=4 * frames, batch=1)
    at_once = walked_at_once(stage, bucket, text, Guided(25, guidance), num_clips)
    each = (frames * 64 + text) * (2 if guidance != 1 else 1) * 2 * (3 * 6 * width + 4 * 6 * width)
    fits = max(1, 2**30 // each)
    assert 1 <= at_once <= max(fits, 1)
    assert math.ceil(num_clips / at_once) == math.ceil(num_clips / fits)


def test_long_clips_are_walked_one_by_one() -> None:
    bucket = longest_bucket(WIDE)
    assert walked_at_once(WIDE, bucket, 512, Guided(), 16) == 1
    assert walked_at_once(WIDE, Bucket("256px", frames=32, batch=1), 512, Guided(), 16) == 16 // 2


def test_what_a_caption_gives_does_not_hang_on_what_it_is_walked_with(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = _latents(_sampler(weights))
    for room in (EACH, 7 * EACH):
        monkeypatch.setattr(module, "_LARGEST_BYTES", room)
        torch.testing.assert_close(_latents(_sampler(weights)), together, rtol=1e-4, atol=1e-4)


def test_a_stage_that_trains_in_bf16_is_sampled_in_it_but_for_time_and_steps(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[Tensor] = []
    original = module.euler_sample

    def recorded(model: Any, noise_BCTHW: Tensor, *rest: Any, **more: Any) -> Tensor:
        def watched(z_BCTHW: Tensor, t_B: Tensor, *inputs: Any) -> Tensor:
            assert z_BCTHW.dtype == t_B.dtype == torch.float32
            times.append(t_B)
            found: Tensor = model(z_BCTHW, t_B, *inputs)
            assert found.dtype == torch.bfloat16
            return found

        return original(watched, noise_BCTHW, *rest, **more)

    loaded: list[set[torch.dtype]] = []
    load = module.load_weights

    def looked_at(model: nn.Module, path: Path) -> nn.Module:
        loaded.append({parameter.dtype for parameter in model.parameters()})
        return load(model, path)

    whole = _latents(_sampler(weights))
    monkeypatch.setattr(module, "euler_sample", recorded)
    monkeypatch.setattr(module, "load_weights", looked_at)
    half = _latents(_sampler(weights, STAGE.replace(precision="bf16")))
    assert loaded == [{torch.bfloat16}], "no copy in fp32 is ever made"
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    assert (half - whole).abs().mean() < 0.03 * whole.abs().mean()
    assert len({float(t_B[0]) for t_B in times}) == 3


def test_blocks_are_compiled_where_there_is_enough_to_compute() -> None:
    assert not compiles_walks(STAGE, 1e12, GPU)
    assert compiles_walks(STAGE, 1e18, GPU)
    assert not compiles_walks(STAGE, 1e18, CPU)
    assert compiles_walks(STAGE.replace(compile=True), 1e12, CPU)
    assert not compiles_walks(STAGE.replace(compile=False), 1e18, GPU)
    assert not compiles_walks(STAGE.replace(exact=True), 1e18, GPU)


def test_compiled_blocks_give_the_same_and_see_texts_of_one_length(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = _latents(_sampler(weights))
    compiled: list[object] = []

    def compile_(function: Any, **how: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(module, "_LARGEST_BYTES", 4 * EACH)
    sampler = _sampler(weights, STAGE.replace(compile=True))
    lengths: set[int] = set()
    sampler.model.register_forward_pre_hook(lambda _, inputs: lengths.add(inputs[2].shape[1]))
    torch.testing.assert_close(_latents(sampler), eager, rtol=1e-4, atol=1e-4)
    assert len(compiled) == 2, "both blocks"
    assert lengths == {16}


@given(
    frames=st.integers(1, 64), side=st.integers(1, 24),
    tiling=st.sampled_from([None, Tiling(frames=16, pixels=64, overlap=0.5)]),
)  # fmt: skip
def test_large_clips_are_decoded_one_by_one(frames: int, side: int, tiling: Tiling | None) -> None:
    codec = DCAE(weights="none", tiling=tiling)
    bucket = Bucket(f"{32 * side}x{32 * side}", frames=4 * frames, batch=1)
    at_once, pixels = decoded_at_once(codec, bucket), 4 * frames * (32 * side) ** 2
    assert at_once == 1 or (tiling is None and at_once * pixels <= 2**20)
    if tiling is None and 8 * pixels <= 2**20:
        assert at_once == 8
