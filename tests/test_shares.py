"""What share of what a world computes is real: as it is dealt, and what `plan` says of it."""

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import STAGE

from elastic import ray_gain
from elastic.cli import main
from elastic.data.deal import deal
from elastic.forecast import forecast
from elastic.outlook import Faults, sample_flops, seconds_a_sample, speed_of, stage_outlook
from elastic.ray_gain import Gain, Position
from elastic.shares import ENOUGH, computed, real_share, share_lines, worlds
from stages import Bucket, DiffusionStage, Phase, Plan, load_plan
from stages.stage import Stage

RECIPES = Path(__file__).parent.parent / "stages" / "recipes"
counts = st.integers(1, 80)


def with_bucket(batch: int, micro: int, **fields: Any) -> DiffusionStage:
    bucket = Bucket("32px", frames=5, batch=batch, micro=min(micro, batch))
    return STAGE.replace(schedule=[Phase(until=100 * batch, buckets=[bucket])], **fields)


@given(batch=counts, micro=counts, readers=st.integers(1, 9), context=st.integers(1, 2))
def test_the_share_is_that_of_the_samples_that_are_dealt(
    batch: int, micro: int, readers: int, context: int
) -> None:
    workers = readers * context
    shared = {"context": context, "workers": (context, 9 * context)}
    for fields in (shared, {"exact": True, "workers": (1, 18)}):
        stage = with_bucket(batch, micro, **fields)
        dealt_to, bucket = workers // stage.context, stage.buckets[0]
        dealt = [deal(batch, bucket.micro, rank, dealt_to, stage.exact) for rank in range(dealt_to)]
        rows = [len(offsets) for rounds in dealt for offsets, _ in rounds]
        assert real_share(stage, bucket, workers) == pytest.approx(batch / sum(rows))
        assert computed(stage, bucket, workers) * dealt_to == sum(rows)


@pytest.mark.parametrize("name", ["first", "open_sora_2", "single_node_1b"])
def test_a_published_recipe_computes_little_for_nothing_on_its_most_workers(name: str) -> None:
    for stage in load_plan(RECIPES / f"{name}.py").stages:
        for bucket in (bucket for phase in stage.schedule for bucket in phase.buckets):
            assert real_share(stage, bucket, stage.workers[1]) >= ENOUGH, (stage.name, bucket)


def said_of(stage: Stage, gpus: int | None = None) -> list[str]:
    return [line for bucket in stage.buckets for line in share_lines(stage, bucket, gpus)]


def test_plan_says_where_too_little_is_real_and_every_remedy_mends_it() -> None:
    stage = with_bucket(96, 4, workers=(32, 192))
    (line,) = said_of(stage)
    assert line == (
        "real of what is computed: 0.5 on 192, 0.522 on 184, 1 on 32 workers; 96 of 192 never have "
        "a sample; 0.95 or more with batch=183, or workers=(32, 96)"
    )
    assert said_of(with_bucket(183, 4, workers=(32, 192))) == []
    mended = stage.replace(workers=(32, 96))
    assert real_share(mended, mended.buckets[0], 96) == 1.0
    shared = stage.replace(model=stage.model.replace(heads=4, width=32), context=4)
    assert real_share(shared, shared.buckets[0], 192) == 1.0
    assert said_of(stage, 32) == [], "as many GPUs as there are"
    assert said_of(with_bucket(96, 4, workers=(1, 1))) == []


def test_in_an_exact_stage_a_smaller_micro_batch_mends_it() -> None:
    stage = with_bucket(48, 5, workers=(4, 4), exact=True)
    (line,) = said_of(stage)
    assert "0.8 on 4 workers" in line
    found = re.search(r"micro=(\d+)", line)
    assert found is not None
    assert said_of(with_bucket(48, int(found[1]), workers=(4, 4), exact=True)) == []
    assert said_of(stage.replace(exact=False)) == []


@pytest.mark.parametrize(
    ("workers", "gpus", "expected"),
    [
        ((32, 224), None, [224, 216, 32]),
        ((32, 224), 100, [100, 92, 32]),
        ((32, 224), 36, [36, 32, 32]),
        ((1, 8), None, [8, 7, 1]),
        ((3, 3), None, [3, 3, 3]),
    ],
)
def test_the_worlds_are_the_most_those_without_a_machine_and_the_fewest(
    workers: tuple[int, int], gpus: int | None, expected: list[int]
) -> None:
    assert list(worlds(STAGE.replace(workers=workers), gpus).values()) == expected


def test_flops_of_an_update_and_seconds_count_what_is_copied(tmp_path: Path) -> None:
    stage = with_bucket(9, 4, workers=(8, 8))
    flops = sample_flops(stage, stage.buckets[0])
    each, whole = seconds_a_sample(stage, 8), seconds_a_sample(stage, 9)
    assert each is not None
    assert each == pytest.approx(2 * whole), "two samples on each of 8, one on each of 9"
    said = forecast(Plan("p", [stage]), tmp_path)
    assert f"{2 * flops / 1e6:.3g} MFLOP an update on each of 8 workers" in said


def test_plan_prints_the_shares_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, flags = RECIPES / "single_node_1b.py", ["--storage", str(tmp_path), "--json"]
    assert main(["plan", str(recipe), *flags]) == 0
    (_, second, _) = json.loads(capsys.readouterr().out)["stages"]
    (bucket,) = second["phases"][0]["buckets"]
    assert bucket["real_share"] == {
        "most": 1.0,
        "node_less": pytest.approx(128 / (7 * 19)),
        "fewest": 1.0,
    }


def test_a_world_that_computes_as_much_on_each_worker_is_no_faster() -> None:
    """Of a batch of 128 each of 128 workers computes 1 sample, and 2 on any world down to 64."""
    speed = speed_of(with_bucket(128, 4, workers=(64, 128)))
    assert [speed(gpus) / speed(128) for gpus in (120, 72, 64, 63)] == [0.5, 0.5, 0.5, 1 / 3]
    even, odd = (with_bucket(batch, 4, workers=(64, 128)) for batch in (128 * 64, 128))
    works = [
        stage_outlook(stage, 128, Faults(0.5), 1e9).expected.shares.work for stage in (even, odd)
    ]
    assert works[1] < 0.95 * works[0]


def gain(position: int | None, exact: bool = False, context: int = 1) -> Gain:
    phases = [(100, [(16, 4), (8, 8)]), (200, [(8, 2)])]
    return Gain(phases, context, exact, lambda: position)


def test_a_group_gains_by_workers_if_each_computes_less_of_a_bucket_of_this_phase() -> None:
    assert gain(0)(2, 3)
    assert not gain(0)(6, 7), "3 of 16 and 2 of 8, before and after"
    assert gain(0)(7, 8)
    assert not gain(150)(4, 7), "2 of 8"
    assert gain(150)(3, 4)
    assert gain(None)(6, 7), "nobody knows the phase"
    assert not gain(200)(1, 8), "it is at its end"


def test_a_position_is_that_of_the_stage_as_it_was_told_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[dict[str, Any] | Exception] = [
        ValueError("no such actor"),
        {"stage": "other", "position": 7},
        {"stage": "mine", "position": 40},
        {"stage": "mine", "text": "drain: 1 nodes of the group have notice"},
        {},
        ValueError("no such actor"),
    ]

    def latest() -> dict[str, Any]:
        one = told.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    monkeypatch.setattr(ray_gain, "TrackerHandle", lambda name: SimpleNamespace(latest=latest))
    position = Position("mine", "tracker")
    assert [position() for _ in range(6)] == [None, None, 40, 40, 40, 40]
    told.append({"stage": "mine", "position": 50})
    copy = pickle.loads(pickle.dumps(Gain([(100, [(16, 4)])], 1, False, position)))
    assert copy(1, 2), "the controller gets one"


def test_rounds_and_contexts_are_those_of_the_stage() -> None:
    assert not gain(150, exact=True)(2, 3), "two rounds of 2 samples"
    assert gain(150, exact=True)(2, 4)
    assert not gain(0, context=2)(12, 14)
    assert gain(0, context=2)(14, 16)
