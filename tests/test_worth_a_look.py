"""What is probably not meant is said, of what a stage has and of nothing else."""

from pathlib import Path
from typing import Any

import pytest
from tiny import STAGE

from elastic.cli import main
from elastic.forecast import forecast
from elastic.worth_a_look import LARGE, worth_a_look
from models import DiT, T5Clip
from stages import AdamW, Continue, DiffusionStage, Ema, Plan, load_plan

RECIPES = Path(__file__).parents[1] / "stages" / "recipes"
TEXT = T5Clip(t5="t5", clip="clip")
MODEL = DiT(depth=2, depth_single=4, width=1536, heads=12, patch=2)
WELL = STAGE.replace(model=MODEL, text=TEXT, precision="bf16")


def test_the_model_of_these_tests_is_a_large_one_and_the_tiny_one_is_not() -> None:
    large, tiny = (sum(p.numel() for p in s.build().parameters()) for s in (WELL, STAGE))
    assert tiny < LARGE < large
    assert list(worth_a_look(WELL)) == []
    assert list(worth_a_look(STAGE)) == [], "fp32 and hashes of words are for such as this one"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp32"}, ["precision 'fp32'", "write precision='bf16'"]),
        ({"text": STAGE.text}, ["text WordHash", "give T5Clip("]),
        ({"optimizer": AdamW(lr=0.2)}, ["optimizer.lr 0.2", "greater than 0.1"]),
        ({"optimizer": AdamW(lr=0.1, weight_decay=1.5)}, ["optimizer.weight_decay 1.5", "than 1,"]),
        ({"save_every": 306}, ["save_every 306", "(305 samples)", "a crash loses all of it"]),
        ({"log_every": 306}, ["log_every 306", "one line of metrics"]),
        ({"evaluate_every": 306}, ["evaluate_every 306", "at its end alone"]),
        ({"sample_every": 306}, ["sample_every 306", "no films"]),
        ({"ema": Ema(halflife=306)}, ["ema.halflife 306", "never reached"]),
    ],
)
def test_what_is_probably_not_meant_is_said_with_the_stage_the_field_and_the_value(
    changes: dict[str, Any], words: list[str]
) -> None:
    (said,) = worth_a_look(WELL.replace(**changes))
    for word in ("stage 'tiny': ", *words):
        assert word in said


def test_the_average_of_a_stage_that_goes_on_is_not_bound_by_its_length() -> None:
    longer = WELL.replace(name="longer", init=Continue(WELL), ema=Ema(halflife=306))
    assert list(worth_a_look(longer)) == []


def test_plan_says_it_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "first.py"
    text = (RECIPES / "first.py").read_text()
    assert text.count("log_every=200") == 2
    path.write_text(text.replace("log_every=200", "log_every=5_700"))
    assert main(["plan", str(path), "--storage", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("worth a look: stage 'vae': log_every 5,700: longer")
    assert "stage 'dit': log_every" not in out, "it is shorter than that stage"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_there_is_nothing_of_that_kind_in_a_recipe(recipe: Path) -> None:
    assert [said for stage in load_plan(recipe).stages for said in worth_a_look(stage)] == []


def test_of_two_stages_the_one_that_is_meant_is_named(tmp_path: Path) -> None:
    other = WELL.replace(name="other", precision="fp32")
    assert isinstance(other, DiffusionStage)
    text = forecast(Plan("two", [WELL, other]), tmp_path)
    (said,) = (line for line in text.splitlines() if "worth a look" in line)
    assert "stage 'other'" in said
