"""Branches: a stage from the midst of another one, the checkpoint it needs, and what is left."""

import hashlib
import json
import shutil
import textwrap
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from s3_server import BUCKET, s3_server  # noqa: F401  # a fixture
from safetensors.torch import load_file, save_file
from small_state import begin as small_attempt
from small_state import expected, small, whole
from tiny import (
    CLIP,
    HALF,
    HALF_UPDATES,
    STAGE,
    STILL,
    DrawnLatents,
    Turn,
    attempt,
    blank_state,
    in_turn,
    objective,
    restored,
    train,
    whole_bytes,
    world_of_one,
)
from torch.distributed.tensor import DTensor
from worlds import run_world
from written_run import Machines

from elastic.align import Pairs
from elastic.branch import (
    check_branches,
    checkpoints_of,
    keep_for_branches,
    left_because,
    shown,
)
from elastic.checkpoint import load_subset
from elastic.checkpoint_place import Register, Wanted, open_storage, settle
from elastic.checkpoint_store import DAMAGED, Keep
from elastic.checkpoint_weights import weights_of
from elastic.cli import main
from elastic.course import Course, encode_plan, train_plan
from elastic.data.order import samples_carried, updates_carried
from elastic.errors import InputError
from elastic.files import write_atomic
from elastic.flags import position
from elastic.folders import LATENT_PINS, MEMBERS, RunFolder
from elastic.grow import grow_and_train
from elastic.journal import EVENTS, Journal, read_events
from elastic.meter import is_due
from elastic.ray_tracker import TrackerHandle
from elastic.ray_train import Limits
from elastic.record import described, write_record
from elastic.report import write_report
from elastic.start import INIT, Origin, begin
from elastic.summary import summarise, table_row
from elastic.weights import FINISHED, WEIGHTS
from elastic.world import World
from models import DCAE, HunyuanVAE
from models.fresh import named_generator
from stages import (
    AdamW,
    Align,
    AutoencoderStage,
    Bucket,
    Continue,
    DiffusionStage,
    Ema,
    KeepTrunk,
    Phase,
    Plan,
    Videos,
)
from stages.init import Init
from stages.lineage import is_left
from stages.stage import Stage

# One that diverged beyond HALF, and one that would have ended there; the rate of no update of the
# first ones depends on where a stage ends.
LONG = STAGE.replace(optimizer=AdamW(lr=3e-3, warmup=40, weight_decay=0.01))
FIRST = LONG.schedule[0]
SHORT = LONG.replace(schedule=(FIRST.replace(until=HALF),))
BRANCH = LONG.replace(
    name="branch",
    init=Continue(LONG, at=HALF),
    schedule=(FIRST.replace(until=55),),
    save_every=22,
    evaluate_every=55,
)
SWITCH = LONG.replace(
    name="switch",
    vae=DCAE(channels=16, weights="none.safetensors"),
    model=LONG.model.replace(patch=1, rope_unit="pixel"),
    schedule=[Phase(until=60, buckets=[Bucket("32px", frames=4, batch=6, micro=4)])],
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A folder with those of LONG, stopped after HALF, and of SHORT, which ended there."""
    folder: Path = tmp_path_factory.mktemp("parents")
    _parents(world, folder)
    return folder


# What it starts from


def _parents(world: World, folder: Path) -> None:
    """LONG as it is left when it is stopped after HALF; SHORT, which ends there."""
    train(world, folder / "long", stop_after=HALF_UPDATES + 3, stage=LONG)
    train(world, folder / "short", stage=SHORT)


def _digests(tensors: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()}


def _branched(world: World, folder: Path, name: str, stage: DiffusionStage) -> dict[str, str]:
    """Every tensor of a branch at its end, trained without a pause."""
    own = folder / f"from-{name}-{world.size}"
    train(world, own, stage=stage, origin=Origin(folder / name))
    return _digests(whole_bytes(restored(world, own, stage)))


class Lost(Exception):
    """A training process is."""


def _lose(phase: str, position: int) -> None:
    if position >= 11:
        raise Lost


def _broken_off(world: World, folder: Path) -> dict[str, str]:
    """As `_branched`, but lost before its first checkpoint, and ended in the middle.

    The parent is gone by then.
    """
    own, parent = folder / f"broken-off-{world.size}", folder / f"gone-{world.size}"
    if world.is_first:
        shutil.copytree(folder / "long", parent)
    world.barrier()
    with pytest.raises(Lost):
        attempt(world, own, BRANCH, objective(BRANCH), origin=Origin(parent), beat=_lose)
    train(world, own, stop_after=3, stage=BRANCH, origin=Origin(parent))
    world.barrier()
    if world.is_first:
        shutil.rmtree(parent)
    train(world, own, stage=BRANCH, origin=Origin(parent))
    return _digests(whole_bytes(restored(world, own, BRANCH)))


def _started(world: World, parent: Path, stage: DiffusionStage) -> dict[str, str]:
    """Every tensor of a stage that has just begun."""

    def pairs() -> Pairs:
        old = DrawnLatents(LONG, {CLIP: 23, STILL: 17}, 100)
        return Pairs(LONG, old, DrawnLatents(SWITCH, {"32px-4f": 19}, 104))

    state = blank_state(world, stage)
    for name, tensor in state.tensors().items():
        if name.startswith("exp_avg"):
            tensor.zero_()  # as optimizers make them
    begin(state, Origin(parent, pairs), world)
    return _digests(whole_bytes(state))


def test_a_branch_goes_on_as_from_a_parent_that_ended_there(tmp_path: Path) -> None:
    """In worlds of 1 and 2; without a pause, and with a loss and an end on the way."""
    turns = [Turn(1, _parents, (tmp_path,))]
    for size in (1, 2):
        turns += [
            Turn(size, _branched, (tmp_path, "short", BRANCH.replace(init=Continue(SHORT)))),
            Turn(size, _branched, (tmp_path, "long", BRANCH)),
            Turn(size, _broken_off, (tmp_path,)),
        ]
    _, *results = run_world(in_turn, 2, tmp_path, turns)[0]
    for ended, branched, broken_off in (results[:3], results[3:]):
        assert branched == ended
        assert broken_off == ended
    assert updates_carried(BRANCH) == HALF_UPDATES
    assert samples_carried(BRANCH) == HALF


@pytest.mark.parametrize("policy", [Continue, KeepTrunk, Align])
def test_every_policy_starts_a_branch_as_from_a_parent_that_ended_there(
    policy: Callable[..., Init], parents: Path, tmp_path: Path
) -> None:
    stage = BRANCH if policy is Continue else SWITCH
    ended, branch = (stage.replace(init=i) for i in (policy(SHORT), policy(LONG, at=HALF)))
    turns = [Turn(1, _started, (parents / "short", ended))]
    turns += [Turn(size, _started, (parents / "long", branch)) for size in (1, 2)]
    started, *branched = run_world(in_turn, 2, tmp_path, turns)[0]
    assert branched == [started, started]


# What a plan refuses, and what it leaves


OTHER = BRANCH.replace(name="other", init=Continue(LONG))
LATER = BRANCH.replace(name="later", init=KeepTrunk(LONG, at=220))
CODEC_STAGE = AutoencoderStage(
    name="ae",
    data=Videos("none.csv"),
    vae=DCAE(channels=16),
    schedule=[Phase(until=40, buckets=[Bucket("32px", frames=4, batch=2)])],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=4),
    save_every=20,
    log_every=2,
    evaluate_every=40,
)
FINER = CODEC_STAGE.replace(name="finer", init=Continue(CODEC_STAGE, at=20))
USES = SWITCH.replace(name="uses", vae=CODEC_STAGE)
PLANS = [
    ("alone", [LONG], "tiny", False),
    ("continued at its end", [LONG, OTHER], "tiny", False),
    ("branched from", [LONG, BRANCH], "tiny", True),
    ("branched from twice", [LONG, BRANCH, LATER], "tiny", True),
    ("both", [LONG, BRANCH, OTHER], "tiny", False),
    ("the branch itself", [LONG, BRANCH], "branch", False),
    ("a codec", [CODEC_STAGE, FINER], "ae", True),
    ("a codec in use", [CODEC_STAGE, FINER, USES], "ae", False),
]


@pytest.mark.parametrize(
    ("stages", "name", "left"), [p[1:] for p in PLANS], ids=[p[0] for p in PLANS]
)
def test_a_stage_is_left_where_others_branch_from_it_and_none_needs_its_end(
    stages: list[Stage], name: str, left: bool
) -> None:
    plan = Plan("p", stages)
    assert is_left(plan.stages, plan.stage(name)) is left


def test_a_branch_lies_before_the_end_of_its_parent() -> None:
    for init in (Continue(LONG, at=LONG.budget), Continue(LONG, at=LONG.budget + 1)):
        with pytest.raises(ValidationError, match=r"at 30\d: the parent 'tiny' ends at 305; give"):
            Plan("p", [LONG, BRANCH.replace(init=init)])


def test_a_stage_that_began_before_there_were_branches_is_the_same() -> None:
    for stage in (OTHER, SWITCH.replace(init=KeepTrunk(LONG))):
        assert "at" not in described(stage)["init"]
    assert described(BRANCH)["init"]["at"] == HALF
    assert described(BRANCH)["init"]["stage"] == "tiny"
    plan = Plan("p", [LONG, BRANCH])
    assert Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json")))) == plan


def test_the_branch_of_the_guide_fits_its_parent() -> None:
    guide = (Path(__file__).parent.parent / "stages" / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(guide.split("```python\n")[1].split("```")[0], names)
    block = "    calmer" + guide.split("\n    calmer")[1].split("\n\n")[0]
    exec(textwrap.dedent(block), names)
    learned, calmer = names["learned"], names["calmer"]
    assert is_left(Plan("p", [learned, calmer]).stages, learned)
    at = calmer.init.at
    assert at + calmer.budget == learned.budget
    (phase,) = calmer.schedule
    assert (at - learned.schedule[0].until) % phase.cycle == 0
    assert is_due(learned.save_every, at, at - phase.cycle)


# What has to be there


def _save(world: World, stage: Path, *positions: int, **settings: object) -> None:
    checkpoints = small_attempt(world, stage, **settings).checkpoints
    for at in positions:
        checkpoints.save(small(world, at), "stop")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Of a plan that has not begun."""
    return RunFolder(tmp_path / "runs" / "p")


PLAN = Plan("p", [LONG, BRANCH])


def test_a_position_without_a_checkpoint_is_refused_with_those_that_are_there(
    world: World, run: RunFolder
) -> None:
    parent = run.stage("tiny")
    with pytest.raises(InputError, match=r"'branch': init: Continue: at 110: .* train that stage"):
        check_branches(PLAN, run)
    _save(world, parent, 88, HALF, 132, keep=Keep(last=3))
    check_branches(PLAN, run)
    (parent / "checkpoints" / str(HALF) / DAMAGED).touch()
    with pytest.raises(InputError, match=r"no checkpoint there; it has those at 132, 88: give"):
        check_branches(PLAN, run)
    (parent / "checkpoints" / str(HALF) / DAMAGED).unlink()
    Register(parent).remove([HALF])  # as who is about to delete it says
    assert checkpoints_of(parent) == [132, 88]
    # A branch that has something of its own goes on from that.
    Register(run.stage("branch")).path.parent.mkdir(parents=True)
    Register(run.stage("branch")).add(22)
    check_branches(PLAN, run)


@pytest.mark.parametrize("place", ["a folder", "a bucket"])
def test_the_checkpoint_of_a_branch_outlives_those_around_it_until_the_branch_is_done(
    world: World, run: RunFolder, tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    parent = run.stage("tiny")
    if place == "a bucket":
        request.getfixturevalue("server")
    setting = None if place == "a folder" else f"s3://{BUCKET}{tmp_path}"
    parent.mkdir(parents=True)
    storage = open_storage(settle(parent, setting, "me"))
    more = {"storage": storage, "keep": Keep(last=1)}
    _save(world, parent, HALF, **more)
    keep_for_branches(PLAN, run)
    _save(world, parent, 132, 154, **more)
    assert storage.positions() == [154, HALF]
    assert checkpoints_of(parent) == [154, HALF]
    state = small(world, 1)
    load_subset(parent, HALF, state.tensors(), world)
    assert whole(state) == expected(HALF)
    write_atomic(run.stage("branch") / FINISHED, b"{}")
    keep_for_branches(PLAN, run)
    assert Wanted(parent).positions() == set()
    _save(world, parent, 176, **more)
    assert storage.positions() == [176]


def test_a_plan_without_the_branch_keeps_nothing_for_it_and_trains_its_parent_on(
    world: World, run: RunFolder
) -> None:
    _save(world, run.stage("tiny"), HALF)
    keep_for_branches(PLAN, run)
    assert Wanted(run.stage("tiny")).positions() == {HALF}
    assert left_because(PLAN, run, LONG)
    without = Plan("p", [LONG])
    keep_for_branches(without, run)
    assert Wanted(run.stage("tiny")).positions() == set()
    assert left_because(without, run, LONG) is None
    write_atomic(run.stage("tiny") / FINISHED, b"{}")
    assert left_because(PLAN, run, LONG) is None


def test_a_list_of_branches_that_cannot_be_read_has_nothing_deleted(
    world: World, run: RunFolder
) -> None:
    parent = run.stage("tiny")
    _save(world, parent, 88)
    Wanted(parent).path.write_text("[1")
    _save(world, parent, HALF, 132, keep=Keep(last=1))
    assert checkpoints_of(parent) == [132, HALF, 88]
    keep_for_branches(PLAN, run)  # the plan says anew which
    _save(world, parent, 154, keep=Keep(last=1))
    assert checkpoints_of(parent) == [154, HALF]


# What can be looked at


CODEC = HunyuanVAE(channels=4, widths=(4, 4, 8, 8), layers=1, norm_groups=2, weights="none")


@pytest.fixture
def under_way(parents: Path, run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run folder in which LONG was stopped after HALF, with a codec that can be used."""
    shutil.copytree(parents / "long", run.stage("tiny"))
    shapes = {name: p.shape for name, p in CODEC.build("meta").named_parameters()}
    drawn = {n: 0.2 * torch.randn(s, generator=named_generator(0, n)) for n, s in shapes.items()}
    save_file(drawn, tmp_path / "vae.safetensors")
    stage = LONG.replace(vae=CODEC.replace(weights=str(tmp_path / "vae.safetensors")))
    write_record(run, Plan("p", [stage]))
    pins = {"fingerprint": "f", "scale": {"mean": [0.0] * 4, "std": [1.0] * 4}}
    write_atomic(run.stage("tiny") / LATENT_PINS, json.dumps(pins).encode())
    return run


def test_the_average_in_a_checkpoint_is_what_the_end_would_have_been_there(
    parents: Path, tmp_path: Path
) -> None:
    ended = (parents / "short" / WEIGHTS).read_bytes()
    for name, stage in (("short", SHORT), ("long", LONG)):
        with weights_of(parents / name, stage, HALF, tmp_path / "scratch") as path:
            assert path.read_bytes() == ended
    assert not any((tmp_path / "scratch").iterdir())
    with weights_of(parents / "short", SHORT, None, tmp_path) as path:
        assert path == parents / "short" / WEIGHTS


def test_an_average_that_several_ranks_wrote_is_put_together(
    world: World, parents: Path, tmp_path: Path
) -> None:
    own = tmp_path / "spread"
    run_world(_start_over, 2, own, parents / "short")
    assert len(list(own.glob("checkpoints/22/*.safetensors"))) == 2
    average = restored(world, own, BRANCH).ema.tensors
    with weights_of(own, BRANCH, 22, tmp_path) as path:
        for name, tensor in load_file(path).items():
            assert tensor.numpy().tobytes() == full(average[name]), name


def full(tensor: torch.Tensor) -> bytes:
    assert isinstance(tensor, DTensor)
    return bytes(tensor.full_tensor().numpy().tobytes())


def _start_over(world: World, own: Path, parent: Path) -> None:
    stage = BRANCH.replace(init=Continue(SHORT))
    train(world, own, stop_after=4, stage=stage, origin=Origin(parent))


def test_a_damaged_checkpoint_is_named_and_nothing_is_left_of_it(
    parents: Path, tmp_path: Path
) -> None:
    own = tmp_path / "damaged"
    shutil.copytree(parents / "long", own)
    (file,) = (own / "checkpoints" / str(HALF)).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with (
        pytest.raises(InputError, match=r"checkpoint 110 of stage 'tiny' .* SHA-256; give another"),
        weights_of(own, LONG, HALF, tmp_path / "scratch"),
    ):
        pass
    assert not any((tmp_path / "scratch").iterdir())


def test_a_stage_that_is_under_way_is_sampled_at_one_of_its_checkpoints(
    under_way: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["sample", str(under_way.root), "--caption", "a red circle", "--steps", "1"]
    assert main(asked) == 2
    assert "--stage NAME --at POSITION" in capsys.readouterr().err
    asked += ["--stage", "tiny"]
    newest = checkpoints_of(under_way.stage("tiny"))[0]
    assert main(asked) == 2
    said = f"'tiny' is not finished; look at one of its checkpoints with --at: {newest}, {HALF}"
    assert said in capsys.readouterr().err
    assert main([*asked, "--at", "111"]) == 2
    assert f"has no checkpoint there; it has those at {newest}, {HALF}" in capsys.readouterr().err
    assert main([*asked, "--at", str(HALF)]) == 0
    film = under_way.samples("tiny") / f"asked-{HALF}" / "00.mp4"
    assert capsys.readouterr().out.split() == [str(film)]
    assert film.stat().st_size > 0
    assert {path.name for path in film.parent.iterdir()} == {"00.mp4", "contact-sheet.png"}


@given(number=st.integers(1, 10**12))
def test_a_position_is_taken_as_it_is_printed(number: int) -> None:
    assert position(shown([number])) == position(str(number)) == number
    for text in (f"{number},1", shown([number, number]), "0", "1,0000"):
        with pytest.raises(ArgumentTypeError, match="whole number"):
            position(text)


def test_an_export_at_a_checkpoint_is_that_of_a_stage_that_ended_there(
    parents: Path, under_way: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = RunFolder(under_way.root.with_name("ended"))
    shutil.copytree(parents / "short", ended.stage("tiny"))
    write_record(ended, Plan("p", [SHORT]))
    one, other = (under_way.root / f"{name}.safetensors" for name in ("at", "end"))
    asked = ["--stage", "tiny", "--dtype", "bf16", "--out"]
    assert main(["export", str(under_way.root), *asked, str(one)]) == 2
    assert "'tiny' is not finished" in capsys.readouterr().err
    assert main(["export", str(under_way.root), *asked, str(one), "--at", str(HALF)]) == 0
    assert main(["export", str(ended.root), *asked, str(other)]) == 0
    assert one.read_bytes() == other.read_bytes()


# What is said


def test_plan_and_status_say_what_is_left_and_what_is_not_there(
    under_way: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, asked = tmp_path / "branched.py", ["--storage", str(under_way.root.parent)]
    text = """from test_branch import BRANCH, LONG
from stages import Continue, Plan
plan = Plan("p", [LONG, BRANCH.replace(init=Continue(LONG, at={at}))])
"""
    file.write_text(text.format(at=121))
    assert main(["plan", str(file), *asked]) == 2
    assert "'branch': init: Continue: at 121: stage 'tiny' has no" in capsys.readouterr().err
    file.write_text(text.format(at=HALF))
    assert main(["plan", str(file), *asked]) == 0
    shown = capsys.readouterr().out
    assert "1. tiny (DiffusionStage, left)\n   left as it is: 'branch' starts at 110 of it" in shown
    assert "Continue(tiny), from its checkpoint at 110 samples" in shown
    assert main(["plan", str(file), "--json", *asked]) == 0
    assert [one["left"] for one in json.loads(capsys.readouterr().out)["stages"]] == [True, False]

    write_record(under_way, PLAN)
    assert main(["status", str(under_way.root)]) == 0
    newest = checkpoints_of(under_way.stage("tiny"))[0]
    said = f"not finished: tiny (305 samples; checkpoints at {newest}, {HALF}; left as it is: "
    assert said in capsys.readouterr().out
    write_atomic(under_way.stage("branch") / FINISHED, b"{}")
    assert main(["status", str(under_way.root), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["finished"] is True
    assert [one["left"] for one in shown["stages"]] == [True, False]
    assert shown["stages"][0]["checkpoints"] == [HALF, newest]
    write_atomic(under_way.stage("tiny") / FINISHED, b"{}")
    assert main(["status", str(under_way.root)]) == 0
    assert f"\ncheckpoints of tiny: {newest}, {HALF}\n" in capsys.readouterr().out


class Told:
    """A tracker that writes the events of a driver at once."""

    name = "told"

    def __init__(self, folder: RunFolder) -> None:
        self._journal = Journal(folder.root / EVENTS)

    def event(
        self, kind: str, stage: str, position: int | None = None, reason: str = "", **more: Any
    ) -> None:
        fields = {"attempt": None, "world": None, **more}
        self._journal.append(
            wall=0.0, kind=kind, stage=stage, position=position, reason=reason, **fields
        )


def test_a_plan_whose_branch_is_done_is_done_and_tells_once_what_it_left(
    world: World, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(world, run.stage("tiny"), HALF, 132)
    tracker = Told(run)
    write_atomic(run.stage("branch") / FINISHED, b"{}")
    write_atomic(run.samples("branch") / "contact-sheet.png", b"any")
    for kind in ("stage_end", "sample"):
        tracker.event(kind, "branch", 55)
    limits = Limits(min_stay=0, leave_before=0, hang_after=0)
    course = Course(PLAN, run, cast(TrackerHandle, tracker), False, limits)
    train_plan(course)
    (run.stage("tiny") / MEMBERS).touch()  # a clip of which could not be read
    grow_and_train(course)
    with pytest.raises(InputError, match=r"stage 'branch': vae\.weights"):  # and not the one before
        encode_plan(course)
    told = [(e["kind"], e["position"]) for e in read_events(run.root) if e["stage"] == "tiny"]
    assert told == [("stage_left", HALF)]
    assert capsys.readouterr().out.count("left as it is") == 1


def test_a_stage_that_is_left_is_no_unfinished_one_until_it_goes_on(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.event("run_start", 0.0)
    machines.event("stage_start", stage="tiny")
    machines.start("tiny", 0, 1)
    machines.steps("tiny", 0, 100, 1, 1.0, psnr=False)
    machines.event("run_end")
    machines.event("run_start")
    machines.event("stage_left", stage="tiny", position=80)
    (one,) = summarise(tmp_path)
    assert table_row(one)[:2] == ["tiny (left)", "100"]
    machines.event("stage_start", stage="branch")
    write_record(RunFolder(tmp_path), PLAN)
    table = json.dumps({"policy": "Continue", "totals": {}}).encode()
    write_atomic(RunFolder(tmp_path).stage("branch") / INIT, table)
    page = write_report(tmp_path).read_text()
    assert "tiny (left)" in page
    assert "0 of 2, 1 left" in page
    assert "tiny at 110" in page
    machines.event("stage_start", stage="tiny")
    assert table_row(summarise(tmp_path)[0])[0] == "tiny (unfinished)"
    machines.event("stage_end", stage="tiny", position=305)
    assert table_row(summarise(tmp_path)[0])[0] == "tiny"
