"""How much noise a stage trains and samples with: one record, whose default changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_conditioning import Watching
from tiny import CLIP, STAGE, STILL, DrawnLatents
from torch import Tensor

from elastic.checkpoint_store import DEFAULT_KEEP
from elastic.cli import main
from elastic.data.load import rounds_of
from elastic.data.order import BatchPlan
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.forecast import forecast
from elastic.forecast_json import forecast_json
from elastic.objective import FlowMatching
from elastic.record import check_unchanged, start_stage, write_record
from elastic.sample import longest_bucket
from elastic.sampler import Guided, walk
from models.flow import time_shift
from models.text import pad
from stages import DiffusionStage, Noise, Plan
from stages.identity import description

CPU = torch.device("cpu")
COUNTS = {CLIP: 1000, STILL: 1000}
SPREAD = Noise(mean=-0.5, std=1.4, shift=2.5, uniform=0.3)


def _drawn(
    noise: Noise, micro: int = 200, ranks: int = 1, count: int = 200
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Time, noise and text of the first samples of the longer bucket, whoever draws them."""
    stage = STAGE.replace(noise=noise)
    source = DrawnLatents(stage, COUNTS, 100)
    goal = FlowMatching(stage, source, source, stage.text.null())
    bucket = stage.buckets[0].replace(batch=count, micro=micro)
    plan = BatchPlan(0, bucket, np.arange(count), np.zeros(count, dtype=int))
    found = {}
    for rank in range(ranks):
        for each in rounds_of([plan], source, rank, ranks):
            inputs = goal.inputs(each, CPU)
            assert inputs.t_B is not None
            assert inputs.noise_BCTHW is not None
            assert inputs.text is not None
            for row, number in enumerate(each.samples.ids):
                if inputs.weight_B[row]:
                    pooled_D = inputs.text.pooled_BD[row]
                    found[int(number)] = (inputs.t_B[row], inputs.noise_BCTHW[row], pooled_D)
    return found


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (7, 2), (4, 3)])
def test_times_do_not_depend_on_world_or_micro_batch(micro: int, ranks: int) -> None:
    whole, parts = _drawn(SPREAD), _drawn(SPREAD, micro, ranks)
    assert whole.keys() == parts.keys()
    for number, (t, *_) in whole.items():
        torch.testing.assert_close(parts[number][0], t, rtol=1e-6, atol=0)


def test_another_distribution_moves_no_other_draw() -> None:
    published, spread = _drawn(Noise()), _drawn(SPREAD)
    for number, (t, noise, pooled) in published.items():
        assert t != spread[number][0]
        assert torch.equal(noise, spread[number][1])
        assert torch.equal(pooled, spread[number][2])


def test_the_share_of_uniform_times_moves_nobody_elses_time() -> None:
    plain, some = _drawn(Noise(), count=1000), _drawn(Noise(uniform=0.3), count=1000)
    moved = [plain[number][0] != some[number][0] for number in plain]
    assert np.mean(moved) == pytest.approx(0.3, abs=0.06)  # four deviations


def test_the_shift_follows_the_size_of_each_bucket_or_is_the_same_in_all() -> None:
    grids = [STAGE.codec.grid(b.frames, b.height, b.width) for b in STAGE.buckets]
    by_size = [time_shift(h * w, t) for t, h, w in map(STAGE.model.token_grid, grids)]
    assert [STAGE.times(bucket).alpha for bucket in STAGE.buckets] == by_size
    fixed = STAGE.replace(noise=Noise(shift=3))
    assert {fixed.times(bucket).alpha for bucket in fixed.buckets} == {3}


def _walked(stage: DiffusionStage, guided: Guided) -> list[float]:
    """The times at which the model was asked."""
    asked: list[float] = []

    class Asked(Watching):
        def forward(self, *inputs: Any) -> Tensor:
            asked.append(float(inputs[1][0]))
            return super().forward(*inputs)

    bucket = longest_bucket(stage)
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    noise_BCTHW = torch.zeros(1, stage.codec.channels, *grid)
    text = pad(stage.text.encode(["a"]))
    walk(stage, Asked(), noise_BCTHW, text, stage.text.null(), guided)
    return asked


def test_samples_walk_with_the_shift_of_the_stage_unless_they_are_asked_for_another() -> None:
    half = [1.0, pytest.approx(2.5 * 0.5 / (1 + 1.5 * 0.5))]
    stage = STAGE.replace(noise=Noise(shift=2.5))
    assert _walked(stage, Guided(steps=2)) == half
    assert _walked(STAGE, Guided(steps=2, shift=2.5)) == half
    assert _walked(stage, Guided(steps=2, shift=1.0)) == [1.0, 0.5]
    by_size = STAGE.times(longest_bucket(STAGE)).alpha
    assert _walked(STAGE, Guided(steps=2)) == [1.0, pytest.approx(by_size / (1 + by_size))]


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "tokens"])
def test_a_shift_that_is_none_is_refused_by_the_command_line(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "run", "--caption", "a circle", f"--shift={value}"])
    assert "must be a number greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shift": "token"}, "'token': write 'tokens', or the factor .* did you mean 'tokens'"),
        ({"shift": 0.0}, "0.0: write 'tokens', or the factor .* more than 0"),
        ({"shift": float("inf")}, "inf: write 'tokens'"),
        ({"shift": True}, "True: write 'tokens'"),
        ({"shift": None}, "None: write 'tokens'"),
        ({"std": 0.0}, "std 0.0: must be more than 0"),
        ({"mean": float("nan")}, "mean nan: must be a number"),
        ({"uniform": 1.5}, "uniform 1.5: a share is 0 to 1; nearest is 1.0"),
        ({"uniform": -0.1}, "uniform -0.1: a share is 0 to 1; nearest is 0.0"),
        ({"uniform": 1.0, "mean": 0.5}, "by which no time would be drawn"),
    ],
)
def test_an_impossible_distribution_is_refused_in_one_sentence(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        Noise(**fields)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("noise", [Noise(), SPREAD, Noise(shift=3), Noise(uniform=1.0)])
def test_a_distribution_goes_through_json(noise: Noise) -> None:
    stage = STAGE.replace(noise=noise)
    again = DiffusionStage.model_validate(json.loads(json.dumps(stage.model_dump(mode="json"))))
    assert again == stage


def test_a_stage_that_began_before_there_was_a_choice_is_still_the_same(tmp_path: Path) -> None:
    assert "noise" not in description(STAGE)
    assert description(STAGE.replace(noise=SPREAD))["noise"]["shift"] == 2.5
    folder = RunFolder.of(tmp_path, Plan("noisy", [STAGE]))
    folder.root.mkdir(parents=True)
    write_record(folder, Plan("noisy", [STAGE]))
    start_stage(folder, STAGE)
    check_unchanged(folder, Plan("noisy", [STAGE.replace(noise=Noise(shift="tokens"))]))
    with pytest.raises(InputError, match=r"noise: None -> .*'shift': 2\.5"):
        check_unchanged(folder, Plan("noisy", [STAGE.replace(noise=SPREAD)]))


def test_the_plan_says_the_shift_of_each_bucket_and_a_distribution_that_is_not_the_default(
    tmp_path: Path,
) -> None:
    told = forecast(Plan("noisy", [STAGE.replace(noise=SPREAD)]), tmp_path)
    assert told.count("time shift 2.50") == 3  # clips and stills, then clips
    assert "0.7 logit-normal, mean -0.5, std 1.4; 0.3 uniform; shifted by 2.5" in told
    plain = Plan("noisy", [STAGE])
    assert "logit-normal" not in forecast(plain, tmp_path)
    (stage,) = forecast_json(plain, tmp_path, None, None, DEFAULT_KEEP)["stages"]
    shifts = {one["bucket"]: one["time_shift"] for one in stage["phases"][0]["buckets"]}
    assert shifts == {bucket.name: STAGE.times(bucket).alpha for bucket in STAGE.buckets}
