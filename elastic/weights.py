"""The finished weights of a stage: one safetensors file of averaged parameters, whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.errors import StageBlocked
from elastic.files import write_atomic
from elastic.state import Progress
from elastic.tensor_file import TensorWriter
from elastic.world import World

WEIGHTS = "weights.safetensors"
FINISHED = "finished.json"


def export(model: nn.Module, folder: Path, progress: Progress, world: World) -> None:
    """Gather the parameters and publish them; finished.json comes last and is the mark.

    Every rank calls it. One parameter at a time is whole, and the first rank writes it before the
    next is gathered. StageBlocked where the file does not fit; OSError, on every rank, where
    writing it failed: nothing is visible then.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    writer = TensorWriter(
        folder / WEIGHTS,
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        torch.float32,
        {"progress": json.dumps(progress.as_json())},
    )
    blocked = world.from_first(writer.missing_space() if world.is_first else None)
    if blocked is not None:
        raise StageBlocked(f"stage {progress.stage!r}: {blocked}")
    fault = _write(writer, parameters, progress, world)
    fault = world.from_first(fault)  # also the barrier behind which all see the mark
    if fault is not None:
        raise OSError(f"stage {progress.stage!r}: {folder / WEIGHTS} was not written: {fault}")


def _write(
    writer: TensorWriter, parameters: dict[str, torch.Tensor], progress: Progress, world: World
) -> str | None:
    """What went wrong on this rank; the others go on gathering all the same."""
    fault = _tried(writer.open) if world.is_first else None
    for name in writer.names:
        full = parameters[name]
        full = full.full_tensor() if isinstance(full, DTensor) else full
        if world.is_first and fault is None:
            fault = _tried(writer.append, full.float().cpu())
    if not world.is_first:
        return None
    if fault is not None:
        writer.discard()
        return fault
    return _tried(_publish, writer, progress)


def _publish(writer: TensorWriter, progress: Progress) -> None:
    mark = {"progress": progress.as_json(), "weights_sha256": writer.publish()}
    write_atomic(writer.path.with_name(FINISHED), json.dumps(mark, indent=1).encode())


def _tried(step: Callable[..., None], *arguments: Any) -> str | None:  # Any: what the step takes
    try:
        step(*arguments)
    except OSError as error:
        return str(error)
    return None


def finished(folder: Path) -> dict[str, Any] | None:
    """What finished.json says, or None while the stage is not finished."""
    path = folder / FINISHED
    return dict(json.loads(path.read_text())) if path.exists() else None


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill a whole model from a safetensors file; KeyError names what does not match."""
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        if names != set(parameters):
            missing, extra = sorted(set(parameters) - names), sorted(names - set(parameters))
            raise KeyError(f"{path}: missing {missing[:3]}, not in the model {extra[:3]}")
        for name in names:
            parameters[name].copy_(file.get_tensor(name))
    return model.eval().requires_grad_(False)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
