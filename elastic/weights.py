"""The finished weights of a stage: one safetensors file of averaged parameters, whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.distributed.tensor import DTensor

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
