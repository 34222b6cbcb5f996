"""Which kernels a step runs: compiled blocks, the order of attention backends, padded text."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_adversarial import STAGE as AUTOENCODER
from test_dit import SMALL, inputs, shaken
from tiny import STAGE, attempt, objective, world_of_one
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from elastic.data.load import Step, by_text, rounds_of
from elastic.data.order import BatchPlan, batch_at
from elastic.kernels import (
    attention,
    attention_of,
    attention_order,
    compile_blocks,
    compiles,
    eager,
    text_room,
)
from elastic.world import World
from models.dit import MMDiT
from models.recompute import RECOMPUTE, Recompute
from models.text import TextBatch, padded, trimmed
from stages import Bucket

STARTS = (0, 11, 16, 22, 165, 172)  # of updates, two of each bucket
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def gradients(model: MMDiT, length: int) -> list[Tensor]:
    """Output of a forward pass and the gradients of all parameters."""
    z, t, text, mask, pooled = inputs(length)
    mask[0, -1] = False
    out = model(z, t, text, mask, pooled)
    out.square().mean().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [out.detach(), *found]


# Tracing looks at `.grad` of everything that goes in.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_compiled_blocks_are_whole_graphs_that_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, recompute: Recompute
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # what is traced; no compiler is needed
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled(f, backend=counter, **how))
    plain, model = shaken(SMALL), shaken(SMALL).recompute(recompute)
    compile_blocks(model)
    for length in (3, 3, 5):
        for one, other in zip(gradients(plain, length), gradients(model, length), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    kinds, lengths = 2, 2
    assert counter.frame_count == kinds * lengths, "a graph for each kind of block and size"


def test_inside_an_eager_block_nothing_is_compiled() -> None:
    counter = CompileCounterWithBackend("eager")
    twice = torch.compile(lambda x: 2 * x, backend=counter, fullgraph=True)
    one = torch.ones(3)
    with eager():
        assert torch.equal(twice(one), 2 * one)
        assert counter.frame_count == 0
    assert torch.equal(twice(one), 2 * one)
    assert counter.frame_count == 1


def test_blocks_are_compiled_on_a_gpu_unless_the_stage_says_otherwise() -> None:
    assert not compiles(STAGE, CPU)
    assert compiles(STAGE, GPU)
    assert compiles(STAGE.replace(compile=True), CPU)
    assert not compiles(STAGE.replace(compile=False), GPU)
    assert not compiles(STAGE.replace(exact=True), GPU)
    assert not compiles(AUTOENCODER, GPU)


def test_an_exact_stage_cannot_be_compiled() -> None:
    with pytest.raises(ValidationError, match="compile True with exact=True"):
        STAGE.replace(compile=True, exact=True)


def test_an_autoencoder_has_no_blocks_to_compile_or_to_keep_a_part_of() -> None:
    with pytest.raises(ValidationError, match="compile True: only the blocks of a DiT"):
        AUTOENCODER.replace(compile=True)
    with pytest.raises(ValidationError, match="recompute 'selective': that is for the blocks"):
        AUTOENCODER.replace(recompute="selective")


def test_attention_tries_the_backends_in_the_order_that_is_asked_for() -> None:
    before = torch._C._get_sdp_priority_order()
    assert attention_order(CPU)[0] == "flash"
    with attention(("efficient", "math", "flash", "cudnn")):
        efficient, math, flash, cudnn = torch._C._get_sdp_priority_order()[:4]
    with attention(("cudnn", "flash", "efficient", "math")):
        assert torch._C._get_sdp_priority_order()[:4] == [cudnn, flash, efficient, math]
    assert torch._C._get_sdp_priority_order() == before


@given(longest=st.integers(1, 512), tokens=st.integers(1, 100_000), most=st.integers(1, 512))
def test_compiled_text_has_one_of_few_lengths_and_holds_every_text(
    longest: int, tokens: int, most: int
) -> None:
    room = text_room(longest, tokens, most)
    assert room >= longest
    assert room <= max(most, longest)
    assert room - longest < max(16, tokens / 25)
    lengths = {text_room(n, tokens, 512) for n in range(1, 513)}
    assert len(lengths) <= 32


def test_of_a_mixed_stage_nearly_all_that_is_computed_is_used() -> None:
    """Images and clips of 256 px, as Open-Sora 2.0 trained them, with texts of 10 to 512 tokens."""
    draw = np.random.default_rng(0)
    useful = computed = in_order = 0
    for num_tokens, micro, batch in ((2304, 8, 2688), (256, 64, 10_080)):
        lengths = np.clip(draw.lognormal(4.9, 0.6, batch), 10, 512).astype(np.int64)
        plan = BatchPlan(0, STAGE.buckets[0], np.arange(batch), np.zeros(batch, np.int64))
        _, alike = by_text(plan, lengths)
        for first in range(0, batch, micro):
            longest = int(alike[first : first + micro].max())
            computed += micro * (num_tokens + text_room(longest, num_tokens, 512))
            in_order += micro * (num_tokens + int(lengths[first : first + micro].max()))
        useful += batch * num_tokens + int(lengths.sum())
    assert useful / computed > 0.97
    assert useful / in_order < 0.93, "what padding in the order of the batch would cost"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_update_of_a_bucket_has_rounds_of_one_or_two_sizes_and_names_them(size: int) -> None:
    """A size that came later on one rank alone would have the others wait without a word."""
    goal = objective()
    layouts = goal.source.layouts()
    found: dict[Bucket, set[frozenset[int]]] = {}
    for rank, position in itertools.product(range(size), STARTS):
        plan = batch_at(STAGE, position, layouts)
        micros = rounds_of([plan], goal.source, rank, size)
        step = Step(plan, plan.indices, [goal.inputs(micro, CPU) for micro in micros])
        named = frozenset(samples for _, samples, _ in goal.graphs(step))
        assert named == {len(one.x_BCTHW) for one in step.micros}
        found.setdefault(plan.bucket, set()).add(named)
    assert len(found) == 3
    for sizes in found.values():
        assert len(sizes) == 1, "of any update on any rank"
        assert all(len(named) <= 2 for named in sizes)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), tokens=st.integers(0, 20))
def test_padded_text_has_one_length_and_masks_what_is_not_real(
    lengths: list[int], tokens: int
) -> None:
    longest = max(lengths)
    mask_BL = torch.arange(longest) < torch.tensor(lengths)[:, None]
    text = TextBatch(torch.rand(len(lengths), longest, 3), mask_BL, torch.rand(len(lengths), 2))
    for given_BL in (mask_BL, None) if len(set(lengths)) == 1 else (mask_BL,):
        text_BLD, new_BL, pooled_BD = padded(text._replace(mask_BL=given_BL), tokens)
        assert text_BLD.shape[1] == -(-max(tokens, longest) // 8) * 8
        torch.testing.assert_close(text_BLD[:, :longest], text.text_BLD)
        assert not text_BLD[:, longest:].any()
        assert pooled_BD is text.pooled_BD
        assert new_BL is not None
        assert new_BL.sum(1).tolist() == lengths


def test_a_mask_is_left_out_where_every_token_is_real() -> None:
    text = TextBatch(torch.rand(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), torch.rand(2, 5))
    assert trimmed(text).mask_BL is None
    ragged_BL = torch.tensor([[True, True, True], [True, False, False]])
    assert trimmed(text._replace(mask_BL=ragged_BL)).mask_BL is ragged_BL
    assert trimmed(text._replace(mask_BL=None)).mask_BL is None


def test_a_run_says_what_attention_runs_on_and_how_many_graphs_it_has_compiled(
    tmp_path: Path,
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stage = STAGE.replace(log_every=1)

    def graphs(world: World, name: str) -> set[int | None]:
        lines = attempt(world, tmp_path / name, stage, objective(stage), 2).lines
        values = [line["values"] for line in lines]
        return {each.get("graphs") for each in values if "samples_per_s" in each}

    assert attention_of(STAGE, CPU) == "flash"
    assert attention_of(AUTOENCODER, CPU) is None
    with attention(("math",)):
        assert attention_of(STAGE, CPU) == "math"
    with world_of_one() as world:
        assert graphs(world, "eager") == {None}
        torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2))
        assert graphs(world, "compiled") == {1}


def test_the_first_update_of_each_bucket_may_compile_and_no_other_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks that wait for one that compiles must not pass for hung."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    told: list[tuple[str, int]] = []
    stage = STAGE.replace(compile=True)
    with world_of_one() as world:
        attempt(world, tmp_path, stage, objective(stage), beat=lambda *beat: told.append(beat))
    counts = {bucket.name: 100 for bucket in stage.buckets}
    first: dict[Bucket, int] = {}  # one has another batch, and so a new size, in the second phase
    for position in sorted({at for phase, at in told if phase in ("compile", "train")}):
        first.setdefault(batch_at(stage, position, counts).bucket, position)
    compiled = sorted({position for phase, position in told if phase == "compile"})
    assert compiled == sorted(first.values())
    assert len(compiled) == 3
