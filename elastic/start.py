"""Giving a stage its first parameters, as its init policy says."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic.align import Pairs, solve_patch_embedding
from elastic.checkpoint import load_subset
from elastic.ema import local
from elastic.errors import InputError
from elastic.files import write_atomic
from elastic.init_table import SOLVED, Available, InitTable, init_table, shapes_of
from elastic.shard import generators, initialise, own_part
from elastic.state import TrainState
from elastic.weight_source import WeightSource, fill, open_weights, own_weights
from elastic.weights import WEIGHTS
from elastic.world import World
from models.fresh import fresh_parameters
from stages.init import Align, Continue, FromFile, KeepTrunk, parent_samples, seed_of
from stages.stage import DiffusionStage, Stage

INIT = "init.json"  # in a stage's folder: the table


@dataclass(frozen=True)
class Origin:
    """Where a stage finds what it starts from, besides itself."""

    parent: Path | None = None  # folder of the parent stage
    pairs: Callable[[], Pairs] | None = None  # opens both latent stores, for Align


NOWHERE = Origin()


def begin(state: TrainState, origin: Origin, world: World) -> InitTable:
    """Fill parameters, average and optimizer of a stage at position 0; every rank calls it.

    Each rank reads and draws its own rows. InputError where origin and model do not fit together,
    before any value is set.
    """
    stage, init = state.stage, state.stage.init
    source, table, fault = _prepared(stage, origin)
    # Together: a rank that raised alone would leave the others waiting.
    told = world.gather((os.uname().nodename, fault, source and source.identity()))
    faults = {fault: host for host, fault, _ in told if fault is not None}
    if faults:
        fault, host = next(iter(faults.items()))
        on = "" if all(other == fault for _, other, _ in told) else f" (on {host})"
        raise InputError(f"{fault}{on}")
    if len({identity for _, _, identity in told}) > 1:
        raise InputError(
            f"stage {stage.name!r}: init: {type(init).__name__}: the workers see different files "
            f"under {source.path if source else 'its path'}; give every machine the same"
        )
    assert table is not None, "without a fault there is a table"
    initialise(state.model, seed_of(init), stage.name, only=frozenset(table.names("new")))
    if isinstance(init, Continue):
        _continue(state, table, origin, world)
        return table
    parameters = dict(state.model.named_parameters())
    kept = table.names("loaded", "converted")
    if source is not None:
        for name in kept:
            fill(parameters[name], source, name)
    elif isinstance(init, KeepTrunk):
        _load_average(stage, origin, {name: parameters[name].detach() for name in kept}, world)
    if isinstance(init, Align):
        _align(state, source, origin, world)
    state.ema.reset()
    return table


def _prepared(
    stage: Stage, origin: Origin
) -> tuple[WeightSource | None, InitTable | None, str | None]:
    """What the stage starts from and its table, or what is wrong with them on this machine."""
    try:
        source = open_origin(stage, origin.parent)
        return source, init_table(stage, available(source, stage) if source else None), None
    except (InputError, OSError) as error:
        return None, None, str(error)


def open_origin(stage: Stage, parent: Path | None) -> WeightSource | None:
    """The file that a stage takes parameters from; None where there is none."""
    init = stage.init
    if isinstance(init, FromFile):
        if not isinstance(stage, DiffusionStage):
            return own_weights(Path(init.path))
        return open_weights(Path(init.path), stage.model, init.layout, init.rotary)
    if isinstance(init, KeepTrunk) and init.at is None:
        assert parent is not None, f"stage {stage.name!r} was started without its parent's folder"
        return own_weights(parent / WEIGHTS)
    return None


def available(source: WeightSource, stage: Stage) -> Available:
    """What a file holds, for the table."""
    parent = stage.init.stage.name if isinstance(stage.init, KeepTrunk) else ""
    return Available(
        shapes=source.shapes,
        converted=frozenset(name for name in source.shapes if source.is_converted(name)),
        leftover=source.leftover,
        where=f"stage {parent!r}" if parent else str(source.path),
    )


def publish_table(table: InitTable, folder: Path) -> None:
    """Keep the table beside the stage's checkpoints."""
    write_atomic(folder / INIT, json.dumps(table.as_json(), indent=1).encode())


def _continue(state: TrainState, table: InitTable, origin: Origin, world: World) -> None:
    """Load a checkpoint of the parent: parameters, average and, if asked, the optimizer."""
    init, ema = state.stage.init, state.ema
    assert isinstance(init, Continue), type(init)
    assert origin.parent is not None, f"{state.stage.name!r} was started without its parent"
    kept = set(table.names("loaded"))
    carried = init.optimizer == "carry"
    wanted = {
        key: tensor
        for key, tensor in state.tensors().items()
        if key.partition("/")[2] in kept and (carried or key.startswith(("model/", "ema/")))
    }
    load_subset(origin.parent, parent_samples(init), wanted, world)
    ema.reset(only=frozenset(table.names("new")))
    state.restored(state.progress)  # the optimizer's count of updates


def _load_average(
    stage: Stage, origin: Origin, tensors: dict[str, torch.Tensor], world: World
) -> None:
    """Fill tensors with the parent's average at the position that the stage branches from."""
    init = stage.init
    assert isinstance(init, KeepTrunk), type(init)
    assert origin.parent is not None, f"{stage.name!r} was started without its parent"
    wanted = {f"ema/{name}": tensor for name, tensor in tensors.items()}
    load_subset(origin.parent, parent_samples(init), wanted, world)


@torch.no_grad()
def _align(state: TrainState, source: WeightSource | None, origin: Origin, world: World) -> None:
    stage = state.stage
    assert isinstance(stage.init, Align), type(stage.init)
    assert isinstance(stage, DiffusionStage), type(stage)
    assert origin.pairs is not None, f"{stage.name!r} was started without the paired latents"
    shapes = shapes_of(stage.init.stage)
    old = {name: torch.empty(shapes[name]) for name in SOLVED}
    if source is None:
        _load_average(stage, origin, old, world)
    else:
        old = {name: source.rows(name, 0, shapes[name][0]) for name in SOLVED}
    weight, bias = (old[name] for name in SOLVED)
    (_, fresh), *_ = fresh_parameters(
        state.model, generators(seed_of(stage.init), stage.name), only=SOLVED[:1]
    )
    solved = solve_patch_embedding(stage, origin.pairs(), (weight, bias), fresh, world)
    for name, full in zip(SOLVED, solved, strict=True):
        parameter = state.model.get_parameter(name)
        local(parameter).copy_(own_part(full, parameter))


def check_origin(stage: Stage) -> InitTable:
    """The table of a stage's start; InputError for what it cannot start from, before it runs."""
    if not isinstance(stage.init, FromFile):
        return init_table(stage)
    source = open_origin(stage, None)
    assert source is not None, "a file was opened"
    return init_table(stage, available(source, stage))
