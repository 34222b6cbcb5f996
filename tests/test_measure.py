"""`plan --measure`: sizes of micro-batches on the device at hand, found once and only said."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fit import AUTOENCODER
from tiny import STAGE
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic import measure, shard
from elastic.data.deal import deal, num_rounds, round_sizes
from elastic.fit import needed
from elastic.measure import (
    Found,
    Machine,
    Trainer,
    Tried,
    digest_of,
    fastest,
    measure_stage,
    measured,
    seconds_of,
    sizes,
)
from elastic.memory import HEADROOM
from elastic.objective import FlowMatching
from elastic.plan_text import measured_lines
from models import DCAE
from models.dit import MMDiT
from stages import Adversarial, Bucket, Given, Phase

SMALL = STAGE.replace(
    schedule=[Phase(until=120, buckets=[Bucket("32px", frames=5, batch=12, micro=3)])]
)
ROOMY = 1e12


@given(
    batch=st.integers(1, 60),
    micro=st.integers(1, 60),
    workers=st.integers(1, 9),
    exact=st.booleans(),
)
def test_rounds_are_those_that_the_loop_deals(
    batch: int, micro: int, workers: int, exact: bool
) -> None:
    dealt = [len(offsets) for offsets, _ in deal(batch, micro, 0, workers, exact)]
    assert num_rounds(batch, micro, workers) == len(dealt)
    assert round_sizes(batch, micro, workers, exact) == dealt


@given(st.data(), st.integers(1, 500), st.integers(1, 9), st.booleans())
def test_no_size_is_tried_that_leaves_workers_idle_or_that_no_round_has(
    data: st.DataObject, batch: int, workers: int, exact: bool
) -> None:
    micro = data.draw(st.integers(1, batch))
    tried = sizes(Bucket("32px", frames=5, batch=batch, micro=micro), workers, exact)
    assert tried == sorted(set(tried))
    assert tried[0] == 1
    assert tried[-1] == math.ceil(batch / workers)
    assert max(round_sizes(batch, min(micro, tried[-1]), workers, exact)) in tried
    for one in tried:
        assert max(round_sizes(batch, one, workers, exact)) == one


@given(
    rounds=st.lists(st.one_of(st.none(), st.floats(0.01, 10)), min_size=1, max_size=6),
    batch=st.integers(1, 64),
    workers=st.integers(1, 4),
)
def test_the_fastest_size_has_the_shortest_update(
    rounds: list[float | None], batch: int, workers: int
) -> None:
    tried = tuple(Tried(2**n, seconds, None, 1.0) for n, seconds in enumerate(rounds))
    found = Found("b", workers, 0.5, tried)
    best = fastest(found, batch)
    if best is None:
        assert not any(rounds)
        return
    shortest = seconds_of(found, best, batch)
    assert shortest is not None
    for one in tried:
        seconds = seconds_of(found, one, batch)
        assert seconds is None or shortest <= seconds


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> list[int]:
    """Rounds take what is said of their size, and are not computed; the sizes that were tried."""
    tried: list[int] = []

    def round_of(self: Any, inputs: Any) -> None:
        tried.append(len(inputs.micro.samples.ids))

    def seconds_of_call(self: Any, act: Callable[[], None]) -> float:
        act()
        return seconds(tried[-1])

    monkeypatch.setattr(Trainer, "round", round_of)
    monkeypatch.setattr(Trainer, "update", lambda self: None)
    monkeypatch.setattr(Trainer, "seconds", seconds_of_call)
    return tried


LARGE = STAGE.replace(
    schedule=[Phase(until=4096, buckets=[Bucket("32px", frames=5, batch=4096, micro=1)])]
)


def test_sizes_grow_until_throughput_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda micro: 1.0 if micro <= 8 else micro / 8)
    (found,) = measure_stage(LARGE, 1, ROOMY)
    assert [one.micro for one in found.tried] == [1, 2, 4, 8, 16, 32]
    best = fastest(found, 4096)
    assert best is not None
    assert best.micro == 8


def test_sizes_grow_until_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda micro: 1.0)
    module, bucket = LARGE.build(), LARGE.buckets[0]
    room = needed(LARGE, module, bucket.replace(micro=5), 1, LARGE.recompute).total / HEADROOM
    (found,) = measure_stage(LARGE, 1, room)
    assert [(one.micro, one.problem) for one in found.tried] == [
        (1, None), (2, None), (4, None), (8, "more than the device has"),
    ]  # fmt: skip


def test_a_size_that_the_device_refuses_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(micro: int) -> float:
        if micro > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    timed(monkeypatch, seconds)
    (found,) = measure_stage(LARGE, 1, ROOMY)
    assert [(one.micro, one.problem) for one in found.tried] == [
        (1, None), (2, None), (4, "out of memory"),
    ]  # fmt: skip


def _runs_out_of_memory(model: nn.Module, above: int) -> nn.Module:
    """The model, whose way back ends within its blocks for micro-batches larger than that."""

    def refuse(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def watch(block: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        if len(outputs[0]) > above:
            outputs[0].register_hook(refuse)

    cast(MMDiT, model).double_blocks[0].register_forward_hook(watch)
    return model


def test_what_ran_out_of_memory_halfway_is_not_in_what_is_measured_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buckets = [Bucket("32px", frames=frames, batch=4, micro=1) for frames in (5, 1)]
    stage = STAGE.replace(schedule=[Phase(until=120, buckets=buckets)])
    build, update, moved = FlowMatching.build, Trainer.update, list[bool]()

    def watched(self: Any) -> None:
        moved.append(all(isinstance(p.grad, DTensor) for p in self._model.parameters()))
        update(self)

    monkeypatch.setattr(shard, "SMALLEST_GROUP", 0)  # groups within the model, as of a large one
    monkeypatch.setattr(FlowMatching, "build", lambda self: _runs_out_of_memory(build(self), 1))
    monkeypatch.setattr(Trainer, "update", watched)
    for found in measure_stage(stage, 1, ROOMY):
        assert [(one.micro, one.problem) for one in found.tried] == [
            (1, None),
            (2, "out of memory"),
        ]
    assert moved == [True] * 4, "an update had no gradients of its shards"


def test_a_finding_is_kept_for_this_machine_and_this_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, path, was_there = measured(SMALL, 2, tmp_path)
    assert not was_there
    assert [one.micro for one in first[0].tried] == [1, 2, 3, 6][: len(first[0].tried)]
    assert all(one.round_s for one in first[0].tried)
    monkeypatch.setattr(measure, "measure_stage", lambda *a: pytest.fail("measured twice"))
    assert measured(SMALL, 2, tmp_path) == (first, path, True)
    machine = Machine.here()
    others = {
        digest_of(SMALL, 3, machine),
        digest_of(SMALL, 2, machine._replace(device="another")),
        digest_of(SMALL, 2, machine._replace(torch="9.9")),
        digest_of(SMALL.replace(model=SMALL.model.replace(depth=2)), 2, machine),
        digest_of(SMALL.replace(recompute="full"), 2, machine),
    }
    assert len(others) == 5
    assert digest_of(SMALL, 2, machine) not in others
    assert digest_of(SMALL.replace(name="other", seed=3), 2, machine) in path.name


def test_what_is_found_is_said_and_the_stage_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, lambda micro: 1.0)
    stage = SMALL.replace(exact=True)
    said = list(measured_lines(stage, 2, tmp_path))
    assert any("     6       1" in line and line.endswith("fastest") for line in said)
    assert said[-1].strip() == (
        "write micro=6 into the stage file, which has micro=3, before the stage begins: it is exact"
    )
    assert stage.buckets[0].micro == 3
    again = list(measured_lines(stage, 2, tmp_path))
    assert "measured before; delete" in again[1]
    assert again[2:] == said[2:]


def test_a_stage_whose_workers_share_tokens_is_left_out(tmp_path: Path) -> None:
    (said,) = measured_lines(SMALL.replace(context=2, workers=(2, 2)), 2, tmp_path)
    assert said == "\ntiny: not measured: 2 workers share the tokens of a sample"


def test_an_autoencoder_with_its_critic_is_measured_too() -> None:
    stage = AUTOENCODER.replace(
        vae=DCAE(
            channels=8,
            widths=(8, 8, 8, 16, 16, 16),
            encoder_depths=(1, 1, 1, 1, 1, 1),
            decoder_depths=(1, 1, 1, 1, 1, 1),
            head_width=8,
        ),
        adversarial=Adversarial(start=0, width=8),
        schedule=[Phase(until=8, buckets=[Bucket("32px", frames=4, batch=2, micro=1)])],
    )
    (found,) = measure_stage(stage, 1, ROOMY)
    assert [one.micro for one in found.tried] == [1, 2]
    assert found.update_s > 0


def test_frames_that_are_given_are_made_up_as_well() -> None:
    stage = SMALL.replace(
        model=SMALL.model.replace(image_condition=True), given=Given(none=1, head=1)
    )
    assert measure.made_up(SMALL, SMALL.buckets[0], 2).samples.given_BCTHW is None
    given_BCTHW = measure.made_up(stage, stage.buckets[0], 2).samples.given_BCTHW
    assert given_BCTHW is not None
    assert given_BCTHW.shape == (2, 4, 2, 4, 4)
    (found,) = measure_stage(stage, 12, ROOMY)
    assert found.tried[0].round_s
