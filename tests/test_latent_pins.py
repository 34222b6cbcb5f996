"""What is pinned before a stage's turn: kept while it fits, forgotten when it does not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import STAGE

from elastic.data.latents import Scale
from elastic.folders import LATENT_PINS, MEMBERS, RunFolder
from elastic.latent_pins import AHEAD, forget_stale, note_ahead, scale_ahead
from elastic.ray_ahead import absolute, after
from elastic.record import start_stage
from elastic.weights import FINISHED, WEIGHTS
from models import WordHash
from stages import (
    AutoencoderStage,
    Bucket,
    Continue,
    DiffusionStage,
    Ema,
    Fresh,
    Phase,
    Plan,
    Stage,
    Videos,
)

SCALE = Scale((0.1, 1 / 3), (0.7, 2e-7))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run in which everything of the stage has been pinned ahead."""
    folder = RunFolder(tmp_path / "run")
    note_ahead(folder, STAGE, SCALE, "aa")
    for name in (MEMBERS, LATENT_PINS):
        (folder.stage(STAGE.name) / name).touch()
    return folder


def left(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.stage(STAGE.name).iterdir()}


@pytest.mark.parametrize(
    "changed",
    [
        STAGE,
        STAGE.replace(optimizer=STAGE.optimizer.replace(lr=1.0)),
        STAGE.replace(schedule=STAGE.schedule[:1]),
        STAGE.replace(ema=Ema(halflife=1), workers=(1, 2)),
    ],
)
def test_what_the_clips_and_latents_do_not_follow_from_may_change(
    folder: RunFolder, changed: DiffusionStage
) -> None:
    forget_stale(folder, changed)
    assert left(folder) == {MEMBERS, LATENT_PINS, AHEAD}
    assert scale_ahead(folder, changed, "bb") is None, "of other weights"
    assert scale_ahead(folder, changed, "aa") == SCALE, "bit for bit"


@pytest.mark.parametrize(
    "changed",
    [
        STAGE.replace(data=Videos("other.csv")),
        STAGE.replace(data=Videos("none.csv", held_out_every=3)),
        STAGE.replace(text=WordHash(width=4)),
        STAGE.replace(rate=8.0),
        STAGE.replace(schedule=(Phase(until=140, buckets=(Bucket("32px", frames=9, batch=7),)),)),
        STAGE.replace(init=Continue(STAGE.replace(name="before"))),
    ],
)
def test_what_they_follow_from_makes_them_be_chosen_again(
    folder: RunFolder, changed: DiffusionStage
) -> None:
    forget_stale(folder, changed)
    assert left(folder) == set()
    assert scale_ahead(folder, changed, "aa") is None


def test_pins_of_a_stage_that_has_started_are_never_forgotten(folder: RunFolder) -> None:
    start_stage(folder, STAGE)
    forget_stale(folder, STAGE.replace(rate=8.0))
    assert left(folder) == {MEMBERS, LATENT_PINS, AHEAD}


def test_pins_that_were_not_made_ahead_are_left_alone(folder: RunFolder) -> None:
    (folder.stage(STAGE.name) / AHEAD).unlink()
    forget_stale(folder, STAGE.replace(rate=8.0))
    assert left(folder) == {MEMBERS, LATENT_PINS}


def test_only_stages_whose_codec_and_scale_are_known_come_before_their_turn(
    tmp_path: Path,
) -> None:
    weights = tmp_path / "none.safetensors"
    codec = STAGE.vae.replace(weights=str(weights))
    first = STAGE.replace(name="first", vae=codec)
    published = STAGE.replace(name="published", vae=codec)
    goes_on = published.replace(name="goes-on", init=Continue(published))
    own = AutoencoderStage(
        name="codec",
        data=STAGE.data,
        vae=codec.replace(weights=None),
        init=Fresh(seed=0),
        schedule=(Phase(until=4, buckets=(Bucket("32px", frames=5, batch=4),)),),
        optimizer=STAGE.optimizer.replace(warmup=0, decay=0),
        ema=Ema(halflife=2),
        save_every=4,
        log_every=4,
        evaluate_every=4,
    )
    trained = published.replace(name="trained", vae=own)
    stages: list[Stage] = [own, first, published, goes_on, trained]
    course = SimpleNamespace(plan=Plan("plan", stages), folder=RunFolder(tmp_path / "run"))

    def names() -> list[str]:
        return [stage.name for stage in after(course, first)]  # type: ignore[arg-type]

    assert names() == []
    weights.touch()
    assert names() == ["published"]
    (course.folder.stage("codec")).mkdir(parents=True)
    for name in (WEIGHTS, FINISHED):
        (course.folder.stage("codec") / name).write_text("{}")
    assert names() == ["published", "trained"]
    (course.folder.stage("published")).mkdir(parents=True)
    (course.folder.stage("published") / LATENT_PINS).touch()
    assert names() == ["goes-on", "trained"]


def test_a_task_finds_the_videos_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(Videos("a/t.csv")) == Videos(str(tmp_path / "a/t.csv"))
    assert absolute(Videos("t.csv", folder="v", held_out_every=3)) == Videos(
        str(tmp_path / "t.csv"), folder=str(tmp_path / "v"), held_out_every=3
    )
    there = Videos("s3://bucket/t.csv", folder="s3://bucket/v")
    assert absolute(there) == there
