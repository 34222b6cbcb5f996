"""The finished weights of a stage: one safetensors file of averaged parameters, whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic.errors import InputError
from elastic.files import write_atomic
from elastic.state import Progress
from elastic.world import World

WEIGHTS = "weights.safetensors"
FINISHED = "finished.json"


def export(model: nn.Module, folder: Path, progress: Progress, world: World) -> None:
    """Gather the parameters and publish them; finished.json comes last and is the mark.

    Every rank calls it. One parameter at a time is whole on every rank, all of them on the first.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        full = parameter.detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        if world.is_first:
            whole[name] = full.cpu().clone()
    if world.is_first:
        # One entry: safetensors writes several in random order, and equal weights need equal bytes.
        data = save(whole, metadata={"progress": json.dumps(progress.as_json())})
        write_atomic(folder / WEIGHTS, data)
        digest = hashlib.sha256(data).hexdigest()
        mark = {"progress": progress.as_json(), "weights_sha256": digest}
        write_atomic(folder / FINISHED, json.dumps(mark, indent=1).encode())
    world.barrier()


def finished(folder: Path) -> dict[str, Any] | None:
    """What finished.json says, or None while the stage is not finished."""
    path = folder / FINISHED
    return dict(json.loads(path.read_text())) if path.exists() else None


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill the parameters and kept buffers of a whole model from a safetensors file.

    InputError, with nothing loaded, where the file cannot be read or its keys or shapes are not
    the model's.
    """
    wanted = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in set(file.keys())}
            _check_same(path, type(model).__name__, shapes, wanted)
            for name, value in wanted.items():
                value.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise InputError(_unreadable(path, error)) from error
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


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and not path.is_file():
        return f"{path}: no such file of weights; correct the path"
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return f"{path}: a safetensors file that is cut off or damaged ({error}); copy it again"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return (
            f"{path}: a pickle, which can run code when it is read, and no safetensors "
            "file; convert it once, where that can do no harm: safetensors.torch.save_file("
            "torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    return f"{path}: no safetensors file ({error}); give the weights as .safetensors"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
