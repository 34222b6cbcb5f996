"""Training an autoencoder against a discriminator: the same on any world, through any restart."""

# B sample, C channel, T frame, H, W rows and columns of pixels.

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import Attempt, Turn, attempt, files_of, in_turn, losses_of, world_of_one
from torch import Tensor
from worlds import run_world

from elastic.checkpoint import published
from elastic.checkpoint_place import Register
from elastic.critic import Critic
from elastic.data.load import Micro, Round, Samples, rounds_of
from elastic.data.order import Layout, batch_at, layout_of, updates_before
from elastic.data.permutation import Indices
from elastic.loop import Outcome
from elastic.meter import OF_THE_MACHINES, NonFiniteLoss
from elastic.objective import Reconstructing
from elastic.randomness import normals, sample_generator
from elastic.weights import WEIGHTS
from elastic.world import World
from models import DCAE, Pyramid
from models.discriminator import VideoDiscriminator, critic_loss_B, smallest_side
from stages import AdamW, Adversarial, AutoencoderStage, Bucket, Ema, Phase, Videos

TOLERANCE = 1e-5  # relative, on losses; the sums of a batch are taken in another order
START, START_UPDATES, NUM_UPDATES = 25, 5, 8
EARLY, LATE = 4, 7  # updates after which an attempt is killed: in the first phase, in the second
BROKEN = 103  # a clip that counts nothing

# Batches of 5 and 7 in micro-batches of 2 and 3: no world of 2 or 3 divides them.
STAGE = AutoencoderStage(
    name="tiny",
    data=Videos("none.csv"),
    vae=DCAE(
        channels=16,
        widths=(8, 8, 8, 16, 16, 16),
        encoder_depths=(0, 1, 1, 1, 1, 1),
        decoder_depths=(0, 1, 1, 1, 1, 1),
        head_width=8,
    ),
    kl_weight=0.0,
    perceptual=Pyramid(weight=0.3),
    adversarial=Adversarial(start=START, weight=0.1, lr=1e-3, width=8, layers=3),
    schedule=[
        Phase(until=START, buckets=[Bucket("32px", frames=4, batch=5, micro=2)]),
        Phase(until=46, buckets=[Bucket("32px", frames=4, batch=7, micro=3)]),
    ],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=20),
    save_every=15,
    log_every=1,
    evaluate_every=30,
)


class DrawnClips:
    """Clips that are a function of the sample's id: a bright square on a dark ground, and noise."""

    def __init__(self, count: int, first_id: int) -> None:
        self._count = count
        self._first_id = first_id

    def counts(self) -> dict[str, int]:
        return {bucket.name: self._count for bucket in STAGE.buckets}

    def layouts(self) -> dict[str, Layout]:
        return {name: layout_of([count]) for name, count in self.counts().items()}

    def sample_ids(self, bucket: Bucket, indices: Indices) -> Indices:
        return indices + self._first_id

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        return np.zeros(len(indices), np.int64)

    def fetch_all(self, rounds: Iterable[Round]) -> Iterator[Samples]:
        return (self._clips(*one) for one in rounds)

    def _clips(self, bucket: Bucket, indices: Indices) -> Samples:
        ids = self.sample_ids(bucket, indices)
        generators = [sample_generator(0, "drawn", "clip", "", 0, int(i)) for i in ids]
        noise_BCTHW = normals(generators, (3, bucket.frames, bucket.height, bucket.width))
        x_BCTHW = -0.6 + 0.1 * noise_BCTHW
        for x_CTHW, number in zip(x_BCTHW, ids, strict=True):
            corner = int(number) % 4 * 4
            x_CTHW[int(number) % 3, :, corner : corner + 16, corner : corner + 16] = 0.7
        weight_B = torch.from_numpy(ids != BROKEN).float()
        return Samples(x_BCTHW.clamp(-1, 1), None, ids, weight_B)


def objective() -> Reconstructing:
    return Reconstructing(STAGE, DrawnClips(23, 100), DrawnClips(5, 5000))


def _train(world: World, folder: Path, stop_after: int | None = None) -> Attempt:
    return attempt(world, folder, STAGE, objective(), stop_after)


def _killed(world: World, folder: Path, updates: int) -> int:
    """What a kill after so many updates leaves: not the checkpoint of an orderly stop."""
    _train(world, folder, updates)
    if world.is_first:
        newest, *_ = published(folder / "checkpoints")
        assert newest % STAGE.save_every, "a checkpoint was due here, and a kill would leave it"
        shutil.rmtree(folder / "checkpoints" / str(newest))
        Register(folder).remove([newest])
    world.barrier()
    return published(folder / "checkpoints")[0]


def _resumed(world: World, source: Path, folder: Path) -> Attempt:
    if world.is_first:
        shutil.copytree(source, folder)
    world.barrier()
    return _train(world, folder)


def _poisoned(world: World, folder: Path) -> tuple[str, dict[str, bytes], dict[str, bytes]]:
    """A critic whose gradient alone is no number, and only on the last rank."""
    _train(world, folder, LATE)
    before = files_of(folder / "checkpoints")
    world.barrier()
    goal = objective()
    assert goal.critic is not None
    if world.rank == world.size - 1:
        parameter = next(iter(_parameters(goal.critic).values()))
        parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteLoss) as caught:
        attempt(world, folder, STAGE, goal)
    return str(caught.value), before, files_of(folder / "checkpoints")


def _parameters(critic: Critic) -> dict[str, torch.nn.Parameter]:
    return dict(critic._module.named_parameters())


class Course(NamedTuple):
    """Results of the first rank by the name of the turn, and the folder."""

    results: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Everything that needs several ranks, played by three processes that start once."""
    folder = tmp_path_factory.mktemp("course")
    early, late = folder / "early", folder / "late"
    turns = {
        **{f"whole-{size}": Turn(size, _train, (folder / f"whole-{size}",)) for size in (1, 2, 3)},
        "early": Turn(2, _killed, (early, EARLY)),
        "late": Turn(2, _killed, (late, LATE)),
        "early-3": Turn(3, _resumed, (early, folder / "early-3")),
        "late-1": Turn(1, _resumed, (late, folder / "late-1")),
        "early-2": Turn(2, _resumed, (early, folder / "early-2")),
        "late-2": Turn(2, _resumed, (late, folder / "late-2")),
        "poisoned": Turn(2, _poisoned, (folder / "poisoned",)),
    }
    ranks = run_world(in_turn, 3, folder, list(turns.values()))
    return Course(dict(zip(turns, ranks[0], strict=True)), folder)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def _values(attempt: Attempt, after: int = -1) -> list[tuple[int, dict[str, str], dict[str, Any]]]:
    """Position, context and values of each line, without times and speeds."""
    return [
        (
            line["position"],
            line["context"],
            {k: v for k, v in line["values"].items() if k not in OF_THE_MACHINES},
        )
        for line in attempt.lines
        if line["position"] > after
    ]


def _require_equal(attempt: Attempt, reference: Attempt, after: int = -1) -> None:
    mine, theirs = _values(attempt, after), _values(reference, after)
    assert [a[:2] for a in mine] == [b[:2] for b in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a[2].keys() == b[2].keys()
        for name, value in a[2].items():
            tolerance = TOLERANCE * (10 if name.endswith("norm") else 1)
            # The adversarial part is a mean of logits of both signs: its error is that of a logit.
            slack = 1e-6 if name == "loss_adversarial" else 0
            assert value == pytest.approx(b[2][name], rel=tolerance, abs=slack), (a[0], name)


@pytest.mark.parametrize("size", [2, 3])
def test_any_world_loses_the_same_with_and_without_the_critic(course: Course, size: int) -> None:
    assert updates_before(STAGE, START) == START_UPDATES
    assert updates_before(STAGE, STAGE.budget) == NUM_UPDATES
    whole = course.results[f"whole-{size}"]
    assert whole.outcome is Outcome.FINISHED
    _require_equal(whole, course.results["whole-1"])


@pytest.mark.parametrize(("killed", "size", "at"), [("early", 3, 15), ("late", 1, 32)])
def test_killed_in_either_phase_and_resumed_on_another_world_nothing_changes(
    course: Course, killed: str, size: int, at: int
) -> None:
    assert course.results[killed] == at
    rest = course.results[f"{killed}-{size}"]
    assert rest.events[0] == ("start", at, "resumed")
    _require_equal(rest, course.results["whole-1"], after=at)


@pytest.mark.parametrize("killed", ["early", "late"])
def test_resumed_on_an_equal_world_every_bit_is_the_same(course: Course, killed: str) -> None:
    at, rest = course.results[killed], course.results[f"{killed}-2"]
    assert _values(rest) == _values(course.results["whole-2"], after=at)
    last = [
        _tensors(course.folder / name / "checkpoints" / str(STAGE.budget))
        for name in (f"{killed}-2", "whole-2")
    ]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, or this file's part of it, by file and name."""
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {f"{path.name}/{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    return tensors


def _names(checkpoint: Path) -> list[str]:
    return sorted({name.partition("/")[2] for name in _tensors(checkpoint)})


def test_the_critic_is_in_every_checkpoint_and_in_no_finished_weights(course: Course) -> None:
    goal = objective()
    assert goal.critic is not None
    critic = sorted(goal.critic.tensors())
    assert {name.partition("/")[0] for name in critic} == {
        "critic", "critic_exp_avg", "critic_exp_avg_sq",
    }  # fmt: skip
    before = _names(course.folder / "early" / "checkpoints" / "15")
    after = _names(course.folder / "whole-3" / "checkpoints" / str(STAGE.budget))
    assert before == after
    assert [name for name in before if name.startswith("critic")] == critic
    codec = sorted(name for name, _ in goal.build().named_parameters())
    with safe_open(course.folder / "whole-3" / WEIGHTS, framework="pt") as file:
        assert sorted(file.keys()) == codec


def test_the_critic_stays_fresh_until_it_begins_and_then_moves(course: Course) -> None:
    goal = objective()
    assert goal.critic is not None
    fresh = goal.critic.tensors()
    before = _tensors(next((course.folder / "early" / "checkpoints").glob("15")))
    after = _tensors(course.folder / "whole-1" / "checkpoints" / str(STAGE.budget))
    held = [{k.partition("/")[2]: v for k, v in part.items()} for part in (before, after)]
    # Each tensor is whole in one file: it is not sharded.
    assert all(torch.equal(held[0][name], fresh[name]) for name in fresh)
    assert all(not torch.equal(held[1][name], fresh[name]) for name in fresh)


def test_a_critic_gradient_that_is_no_number_is_named_and_changes_nothing(course: Course) -> None:
    message, before, after = course.results["poisoned"]
    assert "stage 'tiny': gradient norm of the critic nan" in message
    assert "adversarial.lr" in message
    assert before
    assert after == before


def test_the_parts_of_the_loss_are_told_from_when_they_exist_and_add_up(course: Course) -> None:
    for position, context, values in _values(course.results["whole-1"]):
        if context:
            assert not [name for name in values if name.startswith("loss_")]
            continue
        parts = {name for name in values if name.startswith("loss_")}
        judged = {"loss_adversarial", "loss_critic"} if position > START else set()
        assert parts == {"loss_pixel", "loss_perceptual"} | judged
        assert ("critic_grad_norm" in values) == bool(judged)
        total = sum(values[name] for name in parts - {"loss_critic"})
        assert values["loss"] == pytest.approx(total, rel=1e-6)
    first = next(v for p, c, v in _values(course.results["whole-1"]) if p == START + 7 and not c)
    assert first["loss_critic"] == pytest.approx(1.0, abs=0.2), "it begins blind"


def test_held_out_clips_are_measured_by_psnr_ssim_and_the_loss_without_the_critic(
    course: Course,
) -> None:
    measured = [v for _, c, v in _values(course.results["whole-1"]) if c == {"subset": "held_out"}]
    assert [sorted(values) for values in measured] == [["loss", "psnr", "ssim"]] * len(measured)
    assert measured[-1]["loss"] < measured[0]["loss"]
    assert measured[-1]["ssim"] > measured[0]["ssim"]


def _micros(position: int) -> list[Micro]:
    source = DrawnClips(23, 100)
    return list(rounds_of([batch_at(STAGE, position, source.counts())], source, 0, 1))


def _codec(goal: Reconstructing) -> torch.nn.Module:
    model = goal.build().to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def test_one_backward_pass_gives_each_side_its_own_gradient_and_nothing_of_the_other() -> None:
    goal = objective()
    assert goal.critic is not None
    model = _codec(goal)
    sides = {"codec": dict(model.named_parameters()), "critic": _parameters(goal.critic)}

    def gradients(what: str) -> dict[str, dict[str, Tensor | None]]:
        losses = losses_of(goal, model, _micros(START)[0])
        getattr(losses, what).sum().backward()
        found = {side: {name: p.grad for name, p in named.items()} for side, named in sides.items()}
        for named in sides.values():
            for parameter in named.values():
                parameter.grad = None
        return found

    both, model_only = gradients("both_B"), gradients("model_B")
    critic_only = gradients("critic_B")
    assert set(model_only["critic"].values()) == set(critic_only["codec"].values()) == {None}
    for side, alone in (("codec", model_only), ("critic", critic_only)):
        for name, gradient in both[side].items():
            other = alone[side][name]
            assert gradient is not None
            assert other is not None
            torch.testing.assert_close(gradient, other)


def test_the_critics_gradient_is_that_of_the_mean_over_the_whole_batch(world: World) -> None:
    goal = objective()
    assert goal.critic is not None
    model = _codec(goal)
    position = next(p for p in (25, 32, 39) if any(BROKEN in m.samples.ids for m in _micros(p)))
    micros = _micros(position)
    for micro in micros:
        losses = losses_of(goal, model, micro)
        ((losses.both_B * micro.samples.weight_B).sum() / micro.batch).backward()
    norm = goal.critic.clip_gradients(position, world)["critic_grad_norm"]
    parameters = _parameters(goal.critic)
    found = {name: parameter.grad for name, parameter in parameters.items()}

    # One clip after another, the broken one left out, and no weights anywhere.
    total = torch.zeros(())
    for micro in micros:
        for x_CTHW, weight in zip(micro.samples.x_BCTHW, micro.samples.weight_B, strict=True):
            if weight:
                with torch.no_grad():
                    decoded_BCTHW = model(x_CTHW[None], None).x_BCTHW
                total = total + goal.critic.loss_B(x_CTHW[None], decoded_BCTHW).sum() / 7
    expected = torch.autograd.grad(total, list(parameters.values()))
    expected_norm = torch.stack([g.double().square().sum() for g in expected]).sum().sqrt()
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)
    scale = min(1.0, STAGE.optimizer.max_norm / float(expected_norm))
    for (name, gradient), reference in zip(found.items(), expected, strict=True):
        assert gradient is not None, name
        torch.testing.assert_close(gradient, reference * scale, rtol=1e-4, atol=1e-6)


def test_logits_of_a_clip_do_not_depend_on_how_the_batch_is_cut() -> None:
    critic = VideoDiscriminator(16, 3)
    x_BCTHW = torch.rand(4, 3, 5, 16, 24) * 2 - 1
    one_by_one = torch.cat([critic(x_BCTHW[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(critic(x_BCTHW), one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_discriminator_takes_single_frames_and_the_smallest_sides(
    layers: int, frames: int
) -> None:
    side = smallest_side(layers)
    logits = VideoDiscriminator(8, layers)(torch.rand(2, 3, frames, side, 2 * side))
    assert logits.shape[:2] == (2, 1)
    assert logits.shape[-2:] == (1, 2)
    assert logits.isfinite().all()


def test_the_hinge_counts_what_is_on_the_wrong_side_of_its_margin() -> None:
    real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 2, 1, 1)
    decoded = torch.tensor([[-2.0, 0.5], [-1.0, 0.0]]).view(2, 1, 2, 1, 1)
    expected_B = torch.tensor([(0.25 + 0.75) / 2, (1.0 + 0.5) / 2])
    torch.testing.assert_close(critic_loss_B(real, decoded), expected_B)


def test_critics_of_other_stages_and_seeds_start_differently() -> None:
    def first(stage: AutoencoderStage) -> Tensor:
        assert stage.adversarial is not None
        critic = Critic(stage, stage.adversarial, torch.device("cpu"))
        return critic.tensors()["critic/first.weight"]

    assert torch.equal(first(STAGE), first(STAGE))
    for other in (STAGE.replace(seed=1), STAGE.replace(name="other")):
        assert not torch.equal(first(STAGE), first(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 30}, r"adversarial.start 30: .*; nearest is 0 or 25"),
        ({"start": 46}, r"adversarial.start 46: .* that another one follows"),
        ({"layers": 6}, r"adversarial.layers 6: .* the smallest is 32 px; at most 5"),
    ],
)
def test_a_start_or_depth_that_does_not_fit_the_schedule_is_refused(
    changes: dict[str, int], message: str
) -> None:
    assert STAGE.adversarial is not None
    with pytest.raises(ValueError, match=message):
        STAGE.replace(adversarial=STAGE.adversarial.replace(**changes))


def test_a_field_of_the_critic_that_makes_no_sense_is_refused() -> None:
    for fields in ({"width": 12}, {"betas": (0.5, 1.0)}, {"weight": 0.0}):
        with pytest.raises(ValueError, match=r"width|betas|weight"):
            Adversarial(start=0, **fields)  # type: ignore[arg-type]  # wrong on purpose
