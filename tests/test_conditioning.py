"""What a DiT is trained on beside its latent: text that may be dropped, addressed by sample."""

# B sample, C channel, T frame, H, W latent grid, L text token, D text width

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import CLIP, STAGE, STILL, DrawnLatents, losses_of, objective, world_of_one
from torch import Tensor, nn

from elastic.data.load import Micro, Samples, Source, rounds_of
from elastic.data.order import BatchPlan
from elastic.data.permutation import Indices
from elastic.objective import FlowMatching
from elastic.randomness import sample_generator
from models.given import given_frames
from models.text import TextEmbedding
from stages import Bucket, DiffusionStage, Given

PUBLISHED = (0.31622777, 0.31622777)
NULL = TextEmbedding(torch.full((2, 8), 7.0), torch.full((8,), 9.0))
COUNTS = {CLIP: 4000, STILL: 4000}


class Seen(NamedTuple):
    """What the model was given for one sample."""

    z_CTHW: Tensor
    t: Tensor
    text_LD: Tensor  # at its true length
    pooled_D: Tensor
    loss: Tensor
    given_CTHW: Tensor | None
    guidance: Tensor | None


class Watching(nn.Module):
    """A model that keeps what it is given and answers zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.inputs: dict[str, Tensor] = {}
        self.given: Tensor | None = None
        self.guidance: Tensor | None = None

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        text: Tensor,
        mask: Tensor | None,
        pooled: Tensor,
        guidance: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        if mask is None:  # all of it is real
            mask = torch.ones(text.shape[:2], dtype=torch.bool)
        self.inputs = {"z": z, "t": t, "text": text, "mask": mask, "pooled": pooled}
        self.given, self.guidance = given, guidance
        return 0 * z + self.weight


def _objective(stage: DiffusionStage, source: Source | None) -> FlowMatching:
    source = source or DrawnLatents(stage, COUNTS, 100)
    return FlowMatching(stage, source, source, NULL)


def _seen(
    stage: DiffusionStage,
    bucket: Bucket,
    count: int,
    ranks: int = 1,
    epoch: int = 0,
    source: Source | None = None,
) -> dict[int, Seen]:
    """What is seen of the first samples of a bucket, by sample id, whoever computes it."""
    trained, model, found = _objective(stage, source), Watching(), {}
    plan = BatchPlan(0, bucket, np.arange(count), np.full(count, epoch))
    for rank in range(ranks):
        for micro in rounds_of([plan], trained.source, rank, ranks):
            for number, seen, is_real in _rows(trained, model, micro):
                if is_real:
                    found[number] = seen
    return found


def _rows(trained: FlowMatching, model: Watching, micro: Micro) -> list[tuple[int, Seen, bool]]:
    loss_B = losses_of(trained, model, micro).model_B
    x = model.inputs
    return [
        (
            int(number),
            Seen(
                x["z"][i],
                x["t"][i],
                x["text"][i, x["mask"][i]],
                x["pooled"][i],
                loss_B[i],
                None if model.given is None else model.given[i],
                None if model.guidance is None else model.guidance[i],
            ),
            bool(micro.samples.weight_B[i]),
        )
        for i, number in enumerate(micro.samples.ids)
    ]


def _lost(seen: Seen) -> tuple[bool, bool]:
    """Whether the tokens and the pooled vector are those of the null text."""
    tokens = torch.equal(seen.text_LD, NULL.embedding_LD)
    return tokens, torch.equal(seen.pooled_D, NULL.pooled_D)


def _still(stage: DiffusionStage, micro: int = 500) -> Bucket:
    return next(b for b in stage.buckets if b.frames == 1).replace(batch=500, micro=micro)


def test_one_share_drops_tokens_and_pooled_vector_together() -> None:
    stage = STAGE.replace(text_dropout=0.3)
    lost = [_lost(seen) for seen in _seen(stage, _still(stage), 4000).values()]
    assert {tokens == pooled for tokens, pooled in lost} == {True}
    assert np.mean(lost) == pytest.approx(0.3, abs=0.03)  # four deviations


def test_a_pair_of_shares_drops_each_independently_and_both_in_a_tenth() -> None:
    stage = STAGE.replace(text_dropout=PUBLISHED)
    lost = np.array([_lost(seen) for seen in _seen(stage, _still(stage), 4000).values()])
    assert lost.mean(0) == pytest.approx(np.array(PUBLISHED), abs=0.03)
    assert lost.all(1).mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(("pair", "half"), [((0.5, 0.0), 0), ((0.0, 0.5), 1)])
def test_either_half_can_be_dropped_alone(pair: tuple[float, float], half: int) -> None:
    stage = STAGE.replace(text_dropout=pair)
    lost = np.array([_lost(seen) for seen in _seen(stage, _still(stage), 400).values()])
    assert 0.3 < lost[:, half].mean() < 0.7
    assert not lost[:, 1 - half].any()


def test_a_pair_moves_neither_time_nor_noise_nor_whose_tokens_are_dropped() -> None:
    one, pair = (
        _seen(STAGE.replace(text_dropout=dropout), _still(STAGE), 400)
        for dropout in (0.3, (0.3, 0.3))
    )
    for number in one:
        assert torch.equal(one[number].t, pair[number].t)
        assert torch.equal(one[number].z_CTHW, pair[number].z_CTHW)
        assert _lost(one[number])[0] == _lost(pair[number])[0]


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (7, 2), (4, 3), (60, 5)])
def test_what_is_drawn_does_not_depend_on_world_or_micro_batch(micro: int, ranks: int) -> None:
    stage = STAGE.replace(text_dropout=PUBLISHED)
    for bucket in stage.buckets:
        whole = _seen(stage, bucket.replace(batch=500, micro=50), 50)
        parts = _seen(stage, bucket.replace(batch=500, micro=micro), 50, ranks)
        assert whole.keys() == parts.keys()
        for number in whole:
            for one, other in zip(whole[number][:5], parts[number][:5], strict=True):
                # Vectors of another length round otherwise in their last bit.
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_another_epoch_draws_anew() -> None:
    stage = STAGE.replace(text_dropout=PUBLISHED)
    first, second = (_seen(stage, _still(stage), 400, epoch=epoch) for epoch in (0, 1))
    differing = [_lost(first[number]) != _lost(second[number]) for number in first]
    assert 0.4 < np.mean(differing) < 0.8


SAMPLED = STAGE.replace(vae=STAGE.codec.replace(posterior="sample"))


def test_a_sampled_posterior_gives_mean_plus_deviation_times_its_own_noise() -> None:
    """Against the definition, sample by sample."""
    bucket = SAMPLED.buckets[0].replace(batch=500, micro=6)
    stored = DrawnLatents(SAMPLED, COUNTS, 100).fetch(bucket, np.arange(6))
    mean_BCTHW, deviation_BCTHW = stored.x_BCTHW.chunk(2, dim=1)
    seen = _seen(SAMPLED, bucket, 6, epoch=3)
    for row, number in enumerate(stored.ids):
        draws = [
            sample_generator(SAMPLED.seed, SAMPLED.name, use, bucket.name, 3, int(number))
            for use in ("posterior", "train")
        ]
        shape = mean_BCTHW[row].shape
        z_CTHW = mean_BCTHW[row] + deviation_BCTHW[row] * torch.randn(shape, generator=draws[0])
        torch.randn((), generator=draws[1])  # the time
        torch.rand((), generator=draws[1])  # the dropping
        noise_CTHW, t = torch.randn(shape, generator=draws[1]), seen[int(number)].t
        torch.testing.assert_close(seen[int(number)].z_CTHW, (1 - t) * z_CTHW + t * noise_CTHW)
        error = (noise_CTHW - z_CTHW).square().mean()
        torch.testing.assert_close(seen[int(number)].loss, error)


class Widened(DrawnLatents):
    """The latents of STAGE as means, and one deviation for all."""

    deviation = 0.0

    def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
        mean = DrawnLatents(STAGE, COUNTS, 100).fetch(bucket, indices)
        deviation_BCTHW = torch.full_like(mean.x_BCTHW, self.deviation)
        return replace(mean, x_BCTHW=torch.cat([mean.x_BCTHW, deviation_BCTHW], dim=1))


def test_a_posterior_without_deviation_is_its_mean_bit_for_bit() -> None:
    plain = _seen(STAGE, STAGE.buckets[0], 20)
    certain = _seen(SAMPLED, STAGE.buckets[0], 20, source=Widened(SAMPLED, COUNTS, 100))
    for number in plain:
        for one, other in zip(plain[number][:5], certain[number][:5], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("micro", "ranks"), [(1, 2), (7, 3)])
def test_a_sample_of_the_posterior_is_the_same_on_any_world(micro: int, ranks: int) -> None:
    whole = _seen(SAMPLED, SAMPLED.buckets[0].replace(batch=500, micro=20), 20)
    parts = _seen(SAMPLED, SAMPLED.buckets[0].replace(batch=500, micro=micro), 20, ranks)
    again = _seen(SAMPLED, SAMPLED.buckets[0].replace(batch=500, micro=20), 20, epoch=1)
    for number in whole:
        torch.testing.assert_close(whole[number].z_CTHW, parts[number].z_CTHW)
        assert not torch.allclose(whole[number].z_CTHW, again[number].z_CTHW)


def test_held_out_clips_are_measured_at_the_mean() -> None:
    counts = {CLIP: 5, STILL: 5}
    wide = Widened(SAMPLED, counts, 100)
    wide.deviation = 50.0
    with world_of_one() as world:
        losses = [
            FlowMatching(stage, source, source, NULL).evaluate(Watching(), world)["loss"]
            for stage, source in ((STAGE, DrawnLatents(STAGE, counts, 100)), (SAMPLED, wide))
        ]
    assert losses[0] == losses[1]


def test_nothing_is_dropped_when_held_out_clips_are_measured() -> None:
    stage = STAGE.replace(text_dropout=(0.9, 0.9))
    plain = objective(stage)
    sources = (plain.source, DrawnLatents(stage, {CLIP: 5, STILL: 5}, 5000))
    texts: list[dict[str, Tensor]] = []

    class Collecting(Watching):
        def forward(self, *inputs: Any) -> Tensor:
            out = super().forward(*inputs)
            texts.append(self.inputs)
            return out

    with world_of_one() as world:
        FlowMatching(stage, *sources, NULL).evaluate(Collecting(), world)
    assert texts
    assert not any((each["pooled"] == 9).any() or (each["text"] == 7).any() for each in texts)


@pytest.mark.parametrize(
    "share", [1.0, -0.1, "0.1", False, (0.1, True), (0.1,), (0.1, 0.2, 0.3), (0.1, 1.0), None]
)
def test_an_impossible_share_is_refused_in_one_sentence(share: object) -> None:
    with pytest.raises(ValidationError, match="write a share of 0 or more") as caught:
        STAGE.replace(text_dropout=share)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("share", [0.0, 0, 0.25, (0.0, 0.5), PUBLISHED, [0.1, 0.2]])
def test_shares_go_through_json(share: Any) -> None:
    stage = STAGE.replace(text_dropout=share)
    again = DiffusionStage.model_validate(stage.model_dump(mode="json"))
    assert again == stage


GIVING = STAGE.replace(model=STAGE.model.replace(image_condition=True), given=Given())
VIDEO = GIVING.buckets[0].replace(batch=500, micro=500)


def _choice(seen: Seen) -> str:
    """What was given, as the mask says it."""
    assert seen.given_CTHW is not None
    mask_THW = seen.given_CTHW[0]
    head, tail = (bool(mask_THW[at].all()) for at in (0, -1))
    assert mask_THW.sum() == (head + tail) * mask_THW[0].numel()
    return {(0, 0): "none", (1, 0): "head", (1, 1): "loop", (0, 1): "tail"}[head, tail]


def test_an_eighth_of_the_samples_is_trained_as_text_to_video() -> None:
    seen = _seen(GIVING, VIDEO, 4000).values()
    shares = {
        choice: count / 4000 for choice, count in Counter(_choice(each) for each in seen).items()
    }
    published = {"none": 1 / 8, "head": 5 / 8, "loop": 1 / 8, "tail": 1 / 8}
    assert shares == pytest.approx(published, abs=0.031)  # four deviations of a half


def test_the_mask_comes_first_and_the_stills_stand_at_their_ends() -> None:
    source = DrawnLatents(GIVING, COUNTS, 100)
    ends_BCTHW = source.fetch(VIDEO, np.arange(60)).given_BCTHW
    assert ends_BCTHW is not None
    found = Counter()
    for row, (_, seen) in enumerate(sorted(_seen(GIVING, VIDEO, 60).items())):
        choice = _choice(seen)
        found[choice] += 1
        assert seen.given_CTHW is not None
        assert seen.given_CTHW.shape == (1 + 4, *seen.z_CTHW.shape[1:])
        for place, still, choices in ((0, 0, ("head", "loop")), (-1, 1, ("tail", "loop"))):
            wanted_CHW = ends_BCTHW[row, :, still] * (choice in choices)
            assert torch.equal(seen.given_CTHW[1:, place], wanted_CHW)
    assert len(found) == 4


def test_frames_between_the_ends_are_never_given() -> None:
    ends_BCTHW, both_B = torch.ones(2, 3, 2, 4, 4), torch.tensor([True, True])
    given_BCTHW = given_frames(ends_BCTHW, both_B, both_B, 5)
    assert given_BCTHW.sum((0, 1, 3, 4)).tolist() == [128, 0, 0, 0, 128]


@pytest.mark.parametrize(("micro", "ranks"), [(1, 2), (7, 3)])
def test_what_is_given_does_not_depend_on_world_or_micro_batch(micro: int, ranks: int) -> None:
    whole = _seen(GIVING, VIDEO, 50)
    parts = _seen(GIVING, VIDEO.replace(batch=500, micro=micro), 50, ranks)
    again = _seen(GIVING, VIDEO, 50, epoch=1)
    seeded = _seen(GIVING.replace(seed=1), VIDEO, 50)
    choices = [
        [_choice(seen[number]) for number in whole] for seen in (whole, parts, again, seeded)
    ]
    assert choices[0] == choices[1]
    assert choices[0] != choices[2]
    assert choices[0] != choices[3]


def test_giving_frames_moves_no_other_draw_and_every_token_counts_in_the_loss() -> None:
    """The model answers zero, so a loss that left frames out would differ."""
    plain, giving = _seen(STAGE, VIDEO, 50), _seen(GIVING, VIDEO, 50)
    for number in plain:
        for one, other in zip(plain[number][:5], giving[number][:5], strict=True):
            assert torch.equal(one, other)


def test_stills_are_given_nothing_and_change_nothing_in_the_stage() -> None:
    before = GIVING.model_dump_json()
    still = _seen(GIVING, _still(GIVING), 20)
    assert all(seen.given_CTHW is None for seen in still.values())
    # The published code forgets its settings at the first clip that is too short for them.
    after = _seen(GIVING, VIDEO, 50)
    assert {_choice(seen) for seen in after.values()} == {"none", "head", "loop", "tail"}
    assert GIVING.model_dump_json() == before


@pytest.mark.parametrize("choice", ["head", "loop", "tail"])
def test_a_weight_alone_is_always_chosen(choice: str) -> None:
    weights = {"none": 0.0, "head": 0.0, "loop": 0.0, "tail": 0.0, choice: 0.3}
    assert {Given(**weights).choose(draw) for draw in (0.0, 0.5, 1 - 2**-24)} == {choice}


def test_held_out_clips_are_measured_without_frames_and_with_the_first() -> None:
    masks: list[Tensor | None] = []

    class Collecting(Watching):
        def forward(self, *inputs: Any) -> Tensor:
            out = super().forward(*inputs)
            masks.append(None if self.given is None else self.given[:, 0].amax((0, 2, 3)))
            # Worse where something is given, so that the two losses can be told apart.
            return out if self.given is None else out + 10 * self.given[:, :1].amax()

    with world_of_one() as world:
        found = objective(GIVING).evaluate(Collecting(), world)
        plain = objective(STAGE).evaluate(Watching(), world)
    levels = {f"loss_t{level}" for level in range(8)}
    assert set(found) == {"loss", "loss_head", *levels}
    assert set(plain) == {"loss", *levels}
    assert found["loss"] == plain["loss"]
    assert found["loss_head"] > 50
    assert all(found[name] == plain[name] for name in levels), "as text to video"
    shown = [None if mask is None else mask.tolist() for mask in masks]
    # Five clips and five stills in text to video, then the clips again, and eight by level.
    assert [each for each in shown if each] == [[0, 0]] * 2 + [[1, 0]] * 2 + [[0, 0]] * 3


def test_a_model_that_takes_guidance_is_trained_at_strength_one() -> None:
    stage = STAGE.replace(model=STAGE.model.replace(guidance=True))
    seen = _seen(stage, VIDEO, 20)
    assert {None if each.guidance is None else each.guidance.item() for each in seen.values()} == {
        1
    }
    assert all(each.guidance is None for each in _seen(STAGE, VIDEO, 20).values())


def test_the_transformer_learns_from_given_frames() -> None:
    """Through the real model: without frames the layer that takes them gets no gradient."""
    for given, learns in ((Given(none=0), True), (Given(head=1e-9, loop=0, tail=0), False)):
        stage = GIVING.replace(given=given)
        model = stage.build("cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        trained = _objective(stage, None)
        plan = BatchPlan(0, VIDEO.replace(micro=4), np.arange(4), np.zeros(4))
        (micro,) = rounds_of([plan], trained.source, 0, 1)
        losses_of(trained, model, micro).model_B.sum().backward()
        gradient = model.cond_in.weight.grad
        assert gradient is not None
        assert bool(gradient.any()) is learns
