"""Finished weights: written tensor by tensor, whole or not there; and the verb export."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from worlds import run_world

from elastic import shard as sharding
from elastic import tensor_file, weights
from elastic.cli import main
from elastic.errors import StageBlocked
from elastic.folders import RunFolder
from elastic.record import write_record
from elastic.shard import initialise, shard
from elastic.state import Progress
from elastic.tensor_file import TensorWriter
from elastic.weight_source import open_weights
from elastic.weights import FINISHED, WEIGHTS, export, finished, load_weights
from elastic.world import World
from models.dit import DiT
from stages.plan import load_plan
from stages.stage import DiffusionStage

SHAPE = DiT(depth=1, depth_single=1, width=24, heads=3)
PROGRESS = Progress(stage="written", samples=12)
PLAN = Path(__file__).with_name("tiny_plan.py")


def _sharded(world: World) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALLEST_GROUP", 1)
        model = shard(SHAPE.build(4, 12, 10, device="meta"), world)
    initialise(model, 0, "written")
    return model


def _exported(world: World, folder: str) -> None:
    export(_sharded(world), Path(folder), PROGRESS, world)


@pytest.mark.parametrize("size", [1, 3])
def test_the_file_is_the_one_that_safetensors_writes_whatever_the_world(
    size: int, tmp_path: Path
) -> None:
    run_world(_exported, size, str(tmp_path))
    data = (tmp_path / WEIGHTS).read_bytes()
    tensors = load_file(tmp_path / WEIGHTS)
    names = SHAPE.build(4, 12, 10, device="meta").state_dict()
    assert tensors.keys() == names.keys()
    assert save(tensors, metadata={"progress": json.dumps(PROGRESS.as_json())}) == data
    mark = finished(tmp_path)
    assert mark is not None
    assert mark["weights_sha256"] == hashlib.sha256(data).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [FINISHED, WEIGHTS]


def _raised_without_room(world: World, folder: str) -> list[str]:
    """What this rank raises where the disk is full, and where it fills up on the way."""
    model, append, counted, raised = _sharded(world), TensorWriter.append, [], []

    def fills_up(self: TensorWriter, rows: Tensor) -> None:
        counted.append(rows)
        if len(counted) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows)

    faults = {"missing_space": lambda self: "needs more", "append": fills_up}
    for name, fault in faults.items():
        with pytest.MonkeyPatch.context() as patch:
            if world.is_first:
                patch.setattr(TensorWriter, name, fault)
            try:
                export(model, Path(folder), PROGRESS, world)
            except (StageBlocked, OSError) as error:
                raised.append(f"{type(error).__name__}: {error}")
    return raised


def test_a_disk_without_room_stops_every_rank_and_leaves_nothing(tmp_path: Path) -> None:
    for full, fills_up in run_world(_raised_without_room, 2, str(tmp_path)):
        assert full == "StageBlocked: stage 'written': needs more"
        assert fills_up.startswith("OSError: stage 'written': ")
        assert "weights.safetensors was not written" in fills_up
        assert "No space left" in fills_up
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_where_the_file_will_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> tuple[int, int, int]:
        asked.append(folder)
        return (10, 5, 5)

    writer = TensorWriter(tmp_path / "not/there/w.safetensors", {"a": (2, 3)}, torch.float32, {})
    assert writer.missing_space() is None
    monkeypatch.setattr(tensor_file.shutil, "disk_usage", lambda p: _Usage(*usage(p)))
    message = writer.missing_space()
    assert message is not None
    assert "make room" in message
    assert asked == [tmp_path]


class _Usage:
    def __init__(self, total: int, used: int, free: int) -> None:
        self.total, self.used, self.free = total, used, free


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose first two stages, an autoencoder and a DiT, are finished."""
    plan = load_plan(PLAN)
    folder = RunFolder(tmp_path / "run")
    write_record(folder, plan)
    for stage in plan.stages[:2]:
        own = folder.stage(stage.name)
        own.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        shapes = {name: p.shape for name, p in stage.build().named_parameters()}
        writer = TensorWriter(own / WEIGHTS, dict(shapes), torch.float32, {})
        writer.open()
        for name in writer.names:
            writer.append(torch.randn(shapes[name], generator=generator))
        mark = {"progress": {"samples": 1}, "weights_sha256": writer.publish()}
        (own / FINISHED).write_text(json.dumps(mark))
    return folder


def exported(run: RunFolder, stage: str, out: Path, *more: str) -> int:
    return main(["export", str(run.root), "--stage", stage, "--out", str(out), *more])


@pytest.mark.parametrize("layout", ["bfl", "diffusers", "open-sora"])
def test_export_writes_a_transformer_in_the_layout_asked_for(
    layout: str, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dit.safetensors"
    assert exported(run, "hunyuan-dit", out, "--layout", layout) == 0
    said = capsys.readouterr().out
    assert hashlib.sha256(out.read_bytes()).hexdigest() in said
    stage = load_plan(PLAN).stage("hunyuan-dit")
    assert isinstance(stage, DiffusionStage)
    source = open_weights(out, stage.model, layout)  # type: ignore[arg-type]  # a word of the list
    own = load_file(run.stage("hunyuan-dit") / WEIGHTS)
    assert source.shapes.keys() == own.keys()
    for name, value in own.items():
        assert torch.equal(source.rows(name, 0, len(value)), value), name


def test_export_in_bf16_rounds_every_value_once(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "dit.safetensors"
    assert exported(run, "hunyuan-dit", out, "--dtype", "bf16") == 0
    own = load_file(run.stage("hunyuan-dit") / WEIGHTS)
    written = load_file(out)
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name].to(torch.bfloat16)) for name in own)


def test_export_writes_an_autoencoder_under_its_own_names(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "vae.safetensors"
    assert exported(run, "hunyuan-vae", out) == 0
    stage = load_plan(PLAN).stage("hunyuan-vae")
    own = load_file(run.stage("hunyuan-vae") / WEIGHTS)
    module = load_weights(stage.codec.build(), out)
    assert all(torch.equal(value, own[name]) for name, value in module.named_parameters())


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("dc-ae", (), "stage 'dc-ae' is not finished"),
        ("dc", (), "has no stage 'dc'"),
        ("hunyuan-vae", ("--layout", "bfl"), "leave --layout out"),
    ],
)
def test_export_refuses_what_cannot_be_written(
    stage: str,
    flags: tuple[str, ...],
    words: str,
    run: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exported(run, stage, tmp_path / "out.safetensors", *flags) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_never_writes_over_a_file(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    assert exported(run, "hunyuan-dit", out) == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert exported(run, "hunyuan-dit", tmp_path / "gone" / "out.safetensors") == 2
    assert "its folder is not there" in capsys.readouterr().err


def test_a_failed_export_leaves_no_file(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(TensorWriter, "append", fail)
    assert exported(run, "hunyuan-dit", tmp_path / "out.safetensors") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_conditioned_transformer_has_no_place_in_diffusers_layout(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.stage("hunyuan-dit") / WEIGHTS
    path.write_bytes(save(load_file(path) | {"cond_in.bias": torch.zeros(2)}))
    assert exported(run, "hunyuan-dit", tmp_path / "o.safetensors", "--layout", "diffusers") == 2
    assert "cond_in.bias: the layout diffusers has no place for it" in capsys.readouterr().err
    assert weights.finished(run.stage("hunyuan-dit"))
