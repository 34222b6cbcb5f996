"""The finished weights of a stage: one safetensors file of averaged parameters, whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic.errors import InputError, StageBlocked
from elastic.files import write_atomic
from elastic.state import Progress
from elastic.tensor_file import DTYPES, TensorWriter, read_header, read_rows
from elastic.world import World
from models.codec import CodecModule

WEIGHTS = "weights.safetensors"
FINISHED = "finished.json"


def export(model: nn.Module, folder: Path, progress: Progress, world: World) -> None:
    """Gather the parameters and publish them; finished.json comes last and is the mark.

    Every rank calls it. One parameter at a time is whole, and the first rank writes it before the
    next is gathered. StageBlocked where the file does not fit; OSError, on every rank, where
    writing it failed: nothing is visible then.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kept = model.state_dict().keys()  # some buffers are tables that a model makes for itself
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
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
    """Fill the parameters and kept buffers of a whole model from a safetensors file.

    InputError, with nothing loaded, where the file cannot be read or its keys or shapes are not
    the model's.
    """
    wanted, entries = model.state_dict(), read_header(path)
    optional = model.optional_keys if isinstance(model, CodecModule) else frozenset()
    wanted = {k: value for k, value in wanted.items() if k in entries or k not in optional}
    shapes = {name: entry.shape for name, entry in entries.items()}
    _check_same(path, type(model).__name__, shapes, wanted)
    for entry in entries.values():
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{path}: {entry.key} is {entry.dtype}; read are {', '.join(DTYPES)}: take a file "
                "in one of those"
            )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(read_rows(entries[name], 0, value.shape[0]))
    return model.eval().requires_grad_(False)


def _check_same(
    path: Path, model: str, shapes: dict[str, tuple[int, ...]], wanted: dict[str, Tensor]
) -> None:
    advice = "the file must be that of this model, and its record's fields those of the file"
    missing, extra = sorted(wanted.keys() - shapes), sorted(shapes.keys() - wanted)
    if missing or extra:
        raise InputError(
            f"{path}: not the keys of {model}: missing {_first(missing)}, not in the model "
            f"{_first(extra)}; {advice}"
        )
    other = [name for name in wanted if shapes[name] != tuple(wanted[name].shape)]
    if other:
        name = other[0]
        raise InputError(
            f"{path}: not the shapes of {model}: {name!r} is {shapes[name]} in the file and "
            f"{tuple(wanted[name].shape)} in the model, {len(other)} of {len(wanted)} differ; "
            f"{advice}"
        )


def _first(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
