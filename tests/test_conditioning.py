"""What a DiT is trained on beside its latent: text that may be dropped, addressed by sample."""

# B sample, C channel, T frame, H, W latent grid, L text token, D text width

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import CLIP, STAGE, STILL, DrawnLatents, objective, world_of_one
from torch import Tensor, nn

from elastic.data.load import Micro, Samples, Source, rounds_of
from elastic.data.order import BatchPlan, Indices
from elastic.objective import FlowMatching
from elastic.randomness import sample_generator
from models.text import TextEmbedding
from stages import Bucket, DiffusionStage

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


class Watching(nn.Module):
    """A model that keeps what it is given and answers zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.inputs: dict[str, Tensor] = {}

    def forward(
        self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor | None, pooled: Tensor
    ) -> Tensor:
        assert mask is not None
        self.inputs = {"z": z, "t": t, "text": text, "mask": mask, "pooled": pooled}
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
        for micro in rounds_of(plan, trained.source, rank, ranks):
            for number, seen, is_real in _rows(trained, model, micro):
                if is_real:
                    found[number] = seen
    return found


def _rows(trained: FlowMatching, model: Watching, micro: Micro) -> list[tuple[int, Seen, bool]]:
    loss_B = trained.loss_B(model, micro)
    x = model.inputs
    return [
        (
            int(number),
            Seen(x["z"][i], x["t"][i], x["text"][i, x["mask"][i]], x["pooled"][i], loss_B[i]),
            bool(micro.samples.weight_B[i]),
        )
        for i, number in enumerate(micro.samples.ids)
    ]


def _lost(seen: Seen) -> tuple[bool, bool]:
    """Whether the tokens and the pooled vector are those of the null text."""
    tokens = torch.equal(seen.text_LD, NULL.embedding_LD)
    return tokens, torch.equal(seen.pooled_D, NULL.pooled_D)


def _still(stage: DiffusionStage, micro: int = 500) -> Bucket:
    return next(b for b in stage.buckets if b.frames == 1).replace(micro=micro)


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
        whole = _seen(stage, bucket.replace(micro=50), 50)
        parts = _seen(stage, bucket.replace(micro=micro), 50, ranks)
        assert whole.keys() == parts.keys()
        for number in whole:
            for one, other in zip(whole[number], parts[number], strict=True):
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
    bucket = SAMPLED.buckets[0].replace(micro=6)
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
        for one, other in zip(plain[number], certain[number], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("micro", "ranks"), [(1, 2), (7, 3)])
def test_a_sample_of_the_posterior_is_the_same_on_any_world(micro: int, ranks: int) -> None:
    whole = _seen(SAMPLED, SAMPLED.buckets[0].replace(micro=20), 20)
    parts = _seen(SAMPLED, SAMPLED.buckets[0].replace(micro=micro), 20, ranks)
    again = _seen(SAMPLED, SAMPLED.buckets[0].replace(micro=20), 20, epoch=1)
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


@pytest.mark.parametrize("share", [1.0, -0.1, "0.1", (0.1,), (0.1, 0.2, 0.3), (0.1, 1.0), None])
def test_an_impossible_share_is_refused_in_one_sentence(share: object) -> None:
    with pytest.raises(ValidationError, match="write a share of 0 or more") as caught:
        STAGE.replace(text_dropout=share)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("share", [0.0, 0, 0.25, (0.0, 0.5), PUBLISHED, [0.1, 0.2]])
def test_shares_go_through_json(share: Any) -> None:
    stage = STAGE.replace(text_dropout=share)
    again = DiffusionStage.model_validate(stage.model_dump(mode="json"))
    assert again == stage
