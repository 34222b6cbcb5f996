"""Samples while a stage trains: they change nothing that is trained, and are there whole or not."""

import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    CLIP,
    STAGE,
    Attempt,
    DrawnLatents,
    Turn,
    _caption,
    attempt,
    files_of,
    in_turn,
    objective,
    restored,
    world_of_one,
)
from torch import nn
from worlds import run_world

from elastic import preview
from elastic.data.clips import Clip
from elastic.data.latents import Scale
from elastic.ema import EmaWeights
from elastic.film import read_mp4, write_mp4
from elastic.loop import Outcome
from elastic.meter import OF_THE_MACHINES
from elastic.objective import FlowMatching
from elastic.preview import NUM_PREVIEWS, PreviewJob, Previews, Teller, positions_in, shown
from elastic.sample import SampleRequest, longest_bucket, make_samples
from elastic.sampler import Guided
from elastic.weights import WEIGHTS, file_digest
from elastic.world import World
from models import HunyuanVAE
from models.fresh import named_generator
from stages import AdamW, DiffusionStage, Phase

CODEC = HunyuanVAE(
    channels=4, widths=(4, 4, 8, 8), layers=1, norm_groups=2, weights="none.safetensors"
)
PLAIN = STAGE.replace(
    vae=CODEC,
    schedule=(
        Phase(until=33, buckets=STAGE.schedule[0].buckets),
        Phase(until=68, buckets=STAGE.schedule[1].buckets),
    ),
    optimizer=AdamW(lr=3e-3, warmup=10),
    save_every=30,
)
SAMPLED = PLAIN.replace(sample_every=20)
# Where updates of 5, 6 and 7 pass 20, 40 and 60; the end, at 68, is sampled elsewhere.
DUE = [22, 40, 61]
UPDATES = [4, 7, 10]  # before those
STEPS = 3
SCALE = Scale((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 1.0, 0.5))
# Held-out samples are 5000 to 5004; the second caption's clip could not be encoded.
CLIPS = [Clip(number, "", _caption(number), True) for number in (5002, 9, 5000, 5001, 5003, 5004)]


def _written(module: torch.nn.Module, path: Path) -> None:
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    drawn = {
        name: 0.2 * torch.randn(shape, generator=named_generator(0, name))
        for name, shape in shapes.items()
    }
    save_file(drawn, path)


def _job(folder: Path) -> PreviewJob:
    """What is decoded with, for a run in this folder; the codec lies beside it."""
    weights = folder.parent / "codec.safetensors"
    return PreviewJob(folder, weights, file_digest(weights), SCALE, Guided(STEPS))


def _previews(stage: DiffusionStage, job: PreviewJob, goal: FlowMatching) -> Previews:
    return Previews(stage, job, CLIPS, goal.held_out, goal.null)


class Sampled(NamedTuple):
    """An attempt, and each sign of life of this rank."""

    attempt: Attempt
    beats: list[tuple[str, int]]


def _train(
    world: World, folder: Path, stage: DiffusionStage = SAMPLED, stop_after: int | None = None
) -> Sampled:
    goal, beats = objective(stage), list[tuple[str, int]]()
    previews = None if stage.sample_every is None else _previews(stage, _job(folder), goal)
    own = folder / "stages" / stage.name
    done = attempt(
        world, own, stage, goal, stop_after, previews=previews,
        beat=lambda phase, position: beats.append((phase, position)),
    )  # fmt: skip
    return Sampled(done, beats)


def _stopped_and_resumed(world: World, folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """When each film was written, at a stop beyond the first position and at the end."""
    _train(world, folder, stop_after=UPDATES[0] + 1)
    world.barrier()
    before = _written_at(folder)
    world.barrier()
    _train(world, folder)
    return before, _written_at(folder)


def _killed(folder: Path) -> None:
    """Die by SIGKILL while the second film of the first position is written."""
    written: list[Path] = []

    def dying(path: Path, *film: Any) -> None:
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        write_mp4(path, *film)

    preview.write_mp4 = dying  # type: ignore[assignment]  # as it is called there
    with world_of_one() as world:
        _train(world, folder)


class Interrupted(Previews):
    """The last rank is asked to stop in the second round of the first position."""

    def make(
        self, model: nn.Module, ema: EmaWeights, world: World, position: int, tell: Teller
    ) -> None:
        calls = itertools.count()

        def asked() -> bool:
            return next(calls) > STEPS and world.rank == world.size - 1

        super().make(model, ema, world, position, tell._replace(stop_wanted=asked))


def _interrupted_and_resumed(world: World, folder: Path) -> tuple[Attempt, list[str], Attempt]:
    goal, own = objective(SAMPLED), folder / "stages" / SAMPLED.name
    previews = Interrupted(SAMPLED, _job(folder), CLIPS, goal.held_out, goal.null)
    first = attempt(world, own, SAMPLED, goal, UPDATES[0] + 1, previews=previews)
    left = sorted(files_of(folder / "samples"))
    world.barrier()
    return first, left, _train(world, folder).attempt


def _written_at(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.mp4")}


class Course(NamedTuple):
    """What was played, by name: of the first rank, and of all."""

    first: dict[str, Any]
    ranks: dict[str, list[Any]]
    folder: Path


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    folder = tmp_path_factory.mktemp("course")
    _written(CODEC.build(), folder / "codec.safetensors")
    shared = SAMPLED.replace(context=2, workers=(2, 2))
    turns = {
        "plain": Turn(2, _train, (folder / "plain", PLAIN)),
        **{f"on-{n}": Turn(n, _train, (folder / f"on-{n}",)) for n in (1, 2, 3)},
        "shared": Turn(2, _train, (folder / "shared", shared)),
        "resumed": Turn(2, _stopped_and_resumed, (folder / "resumed",)),
        "asked": Turn(2, _interrupted_and_resumed, (folder / "asked",)),
    }
    results = run_world(in_turn, 3, folder, list(turns.values()))
    ranks = {name: [rank[number] for rank in results] for number, name in enumerate(turns)}
    return Course({name: found[0] for name, found in ranks.items()}, ranks, folder)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def _films(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    root = folder / "samples" / STAGE.name
    return {
        str(p.relative_to(root)): read_mp4(p).frames_THWC.astype(int) for p in root.rglob("*.mp4")
    }


def test_a_run_that_is_sampled_trains_to_the_same_bits(course: Course) -> None:
    sampled, plain = course.first["on-2"].attempt, course.first["plain"].attempt
    assert [event[0] for event in sampled.events].count("preview") == len(DUE)
    kept = [
        [
            (
                line["position"],
                line["context"],
                line["order_digest"],
                {k: v for k, v in line["values"].items() if k not in OF_THE_MACHINES},
            )
            for line in one.lines
        ]
        for one in (sampled, plain)
    ]
    assert kept[0] == kept[1]
    stages = [course.folder / name / "stages" / STAGE.name for name in ("on-2", "plain")]
    assert (stages[0] / WEIGHTS).read_bytes() == (stages[1] / WEIGHTS).read_bytes()
    last = [
        {
            f"{file.name}/{name}": tensor
            for file in sorted((stage / "checkpoints" / str(PLAIN.budget)).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for stage in stages
    ]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


@pytest.mark.parametrize("name", ["on-1", "on-2", "on-3", "shared"])
def test_the_films_are_the_same_on_any_world_and_its_layout(course: Course, name: str) -> None:
    own, ones = _films(course.folder / name), _films(course.folder / "on-1")
    places = ("00", "02", "03", "04")  # those of the stage's end, where the second has a film too
    assert own.keys() == {f"{p}/{n}.mp4" for p in DUE for n in places}
    for path, film in own.items():
        assert np.abs(film - ones[path]).mean() < 0.3, path
    first, last = (own[f"{position}/00.mp4"] for position in (DUE[0], DUE[-1]))
    assert np.abs(first - last).mean() > 1, "nothing was learnt, so equal films would say little"


def test_every_rank_gives_signs_of_life_at_each_step(course: Course) -> None:
    for name, size, rounds in (("on-1", 1, 4), ("on-2", 2, 2), ("on-3", 3, 2), ("shared", 2, 4)):
        for rank in course.ranks[name][:size]:
            for position in DUE:
                # Those of a round; the codec, four films, and the publication.
                assert rank.beats.count(("sample", position)) == STEPS * rounds + 6, name


def test_what_was_sampled_before_a_stop_is_not_sampled_again(course: Course) -> None:
    before, after = course.first["resumed"]
    assert len(before) == NUM_PREVIEWS
    assert len(after) == len(DUE) * NUM_PREVIEWS
    assert before.items() <= after.items()


def test_updates_that_are_done_again_after_a_crash_make_no_film_again(
    course: Course, world: World, tmp_path: Path
) -> None:
    """It is told of once more: the attempt that made them may not have lived to tell."""
    folder = tmp_path / "run"
    (tmp_path / "codec.safetensors").symlink_to(course.folder / "codec.safetensors")
    _train(world, folder, stop_after=UPDATES[0] + 1)
    before = _written_at(folder)
    shutil.rmtree(folder / "stages")  # as if it had crashed before its first save
    again = _train(world, folder, stop_after=UPDATES[0] + 1).attempt
    assert ("preview", DUE[0], "made before") in again.events
    assert _written_at(folder) == before
    assert len(before) == NUM_PREVIEWS


def test_a_kill_in_the_middle_leaves_nothing_half_written(
    course: Course, world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "codec.safetensors").symlink_to(course.folder / "codec.safetensors")
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    samples = folder / "samples" / "tiny"
    left = [f".{DUE[0]}/00.mp4", f".tries-{DUE[0]}"]
    assert sorted(files_of(samples)) == left, "nothing under the position's own name"
    assert positions_in(samples) == []
    assert _train(world, folder).attempt.outcome is Outcome.FINISHED
    assert files_of(samples).keys() == files_of(course.folder / "on-1/samples/tiny").keys()


def test_a_position_that_was_stopped_at_is_sampled_by_who_goes_on(
    course: Course, world: World, tmp_path: Path
) -> None:
    """Who has been told to stop saves and goes; nobody may wait for films then."""
    folder = tmp_path / "run"
    (tmp_path / "codec.safetensors").symlink_to(course.folder / "codec.safetensors")
    first = _train(world, folder, stop_after=UPDATES[0])
    samples = folder / "samples" / "tiny"
    assert first.attempt.events[-1] == ("publish", DUE[0], "stop")
    assert positions_in(samples) == []
    second = _train(world, folder, stop_after=2)
    assert [event[:2] for event in second.attempt.events][:2] == [
        ("start", DUE[0]),
        ("preview", DUE[0]),
    ]
    assert positions_in(samples) == DUE[:1]


def test_asked_to_stop_meanwhile_the_ranks_give_up_together_and_lose_nothing(
    course: Course,
) -> None:
    first, left, rest = course.first["asked"]
    assert left == []
    stopped_at = first.events[-1][1]
    assert first.events[-1] == ("publish", stopped_at, "stop")
    assert "preview" not in [event[0] for event in first.events]
    assert rest.events[:2] == [
        ("start", stopped_at, "resumed"),
        ("preview", stopped_at, "averaged weights"),
    ]
    weights = [course.folder / name / "stages/tiny" / WEIGHTS for name in ("asked", "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_film_is_what_the_stages_end_would_show(
    course: Course, world: World, tmp_path: Path
) -> None:
    run = course.folder / "on-1"
    own = run / "stages" / "tiny"
    goal = objective(SAMPLED)
    job = replace(_job(run), root=tmp_path)
    state = restored(world, own, SAMPLED, goal)
    told: list[tuple[Any, ...]] = []

    def tell(*event: Any, **more: Any) -> None:
        told.append((*event, more))

    _previews(SAMPLED, job, goal).make(
        state.model, state.ema, world, PLAIN.budget, Teller(lambda *a: None, tell, lambda: False)
    )
    captions = tuple(dict.fromkeys(clip.text for clip in CLIPS))
    request = SampleRequest(
        PLAIN,
        longest_bucket(PLAIN),
        own / WEIGHTS,
        job.codec_weights,
        SCALE,
        goal.null,
        captions,
        tmp_path / "end",
        STEPS,
    )
    ends = make_samples(request)
    ((kind, position, _, more),) = told
    assert (kind, position) == ("preview", PLAIN.budget)
    assert more["captions"] == [captions[place] for place in (0, 2, 3, 4)]
    for path in more["paths"]:
        mine = read_mp4(tmp_path / path).frames_THWC.astype(int)
        end = read_mp4(ends[int(Path(path).stem)]).frames_THWC.astype(int)
        assert np.abs(mine - end).mean() < 0.3, path


WORDS = {
    "codec": "not the weights",
    "weights": "no such layer",
    "latents": "not finite",
    "film": "the encoder is broken",
    "text": "the disk is gone",
}


def _break(fault: str, patch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **more: Any) -> Any:
        raise RuntimeError(WORDS[fault])

    if fault == "codec":
        patch.setattr(preview, "file_digest", lambda path: "another")
    elif fault == "latents":
        patch.setattr(preview, "walk", lambda stage, model, z, *rest: z * torch.inf)
    elif fault == "text":
        patch.setattr(Previews, "_text", fail)
    else:
        patch.setattr(preview, {"weights": "load_weights", "film": "write_mp4"}[fault], fail)


def _second_cannot_read(world: World, folder: Path) -> Attempt:
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            _break("text", patch)
        return _train(world, folder).attempt


def test_where_one_rank_cannot_read_a_caption_no_rank_waits_for_it(
    course: Course, tmp_path: Path
) -> None:
    codec = (course.folder / "codec.safetensors").read_bytes()
    (tmp_path / "codec.safetensors").write_bytes(codec)
    ranks = run_world(_second_cannot_read, 2, tmp_path / "run")
    assert [done.outcome for done in ranks] == [Outcome.FINISHED] * 2
    told = [event for event in ranks[0].events if event[0].startswith("preview")]
    assert [(kind, at) for kind, at, _ in told] == [("preview_failed", at) for at in DUE]
    assert all(WORDS["text"] in reason for _, _, reason in told)


def test_what_ends_an_attempt_is_not_tried_for_ever(
    course: Course, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = (course.folder / "codec.safetensors").read_bytes()
    (tmp_path / "codec.safetensors").write_bytes(codec)

    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("the card is full")

    monkeypatch.setattr(preview, "walk", full)
    ended = 0
    while True:
        try:
            done = _train(world, tmp_path / "run").attempt
            break
        except torch.OutOfMemoryError:
            ended += 1
            assert ended <= 4 * len(DUE), "each place where it is due may end two attempts"
    assert ended >= 2
    assert done.outcome is Outcome.FINISHED
    said = [reason for kind, _, reason in done.events if kind == "preview_failed"]
    assert said
    assert set(said) == {"2 attempts ended while they made them"}


@pytest.mark.parametrize("fault", WORDS)
def test_films_that_cannot_be_made_are_told_and_training_goes_on(
    fault: str, course: Course, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    codec = tmp_path / "codec.safetensors"
    codec.write_bytes((course.folder / "codec.safetensors").read_bytes())
    _break(fault, monkeypatch)
    done = _train(world, folder).attempt
    assert done.outcome is Outcome.FINISHED
    failed = [event for event in done.events if event[0].startswith("preview")]
    assert [(kind, at) for kind, at, _ in failed] == [("preview_failed", p) for p in DUE]
    assert all(WORDS[fault] in reason for _, _, reason in failed)
    samples = folder / "samples" / "tiny"
    assert not samples.exists() or not list(samples.iterdir())


def test_captions_keep_their_places_where_a_clip_could_not_be_encoded() -> None:
    held_out = DrawnLatents(SAMPLED, {CLIP: 3}, 5000)
    found = [(one.place, one.caption, one.row) for one in shown(SAMPLED, CLIPS, held_out)]
    assert found == [
        (0, _caption(5002), 2),
        (2, _caption(5000), 0),
        (3, _caption(5001), 1),
    ]
