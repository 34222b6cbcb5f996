"""Faults that come from inside a training process: an exception, a NaN, a wrong clock, a hang.

A bench plans one by a file in a folder; the first training process that computes at the planned
position or behind it takes the file away and does what it says, once.
"""

import json
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "RESTAGE_PLANNED_FAULTS"  # environment variable
_true_time = time.time


class PlannedFault(RuntimeError):
    """Raised because a bench asked for it."""


def plan(folder: Path, kind: str, stage: str, position: int, **more: Any) -> Path:
    """Plan a fault; the file is gone as soon as it has happened."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{stage}-{position}.json"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"kind": kind, "stage": stage, "position": position, **more}))
    aside.rename(path)
    return path


def take(stage: str, position: int) -> dict[str, Any] | None:
    """The fault that is due at this position; no other process gets the same one."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return None
    for path in Path(folder).glob("*.json"):
        try:
            planned: dict[str, Any] = json.loads(path.read_text())
            if planned["stage"] != stage or position < planned["position"]:
                continue
            path.rename(path.with_suffix(f".{os.getpid()}.done"))
        except FileNotFoundError:
            continue  # another process was faster
        return planned
    return None


def wrap(module: ModuleType) -> None:
    """Have both objectives look for a planned fault before each micro-batch."""
    for objective in (module.FlowMatching, module.Reconstructing):
        objective.losses = _with_faults(objective.losses)


def _with_faults(losses: Any) -> Any:
    def with_faults(self: Any, model: Any, inputs: Any) -> Any:
        found = losses(self, model, inputs)
        planned = take(self._stage.name, inputs.micro.position)
        return found if planned is None else _do(planned, found)

    return with_faults


def _do(planned: dict[str, Any], found: Any) -> Any:
    kind = planned["kind"]
    if kind == "exception":
        raise PlannedFault("planned: an error in the objective")
    if kind == "nan":
        return found._replace(model_B=found.model_B * float("nan"))
    if kind == "hang":
        time.sleep(3600)
    if kind == "exit":
        os._exit(planned["code"])
    if kind == "clock":
        # Only this process's view: whoever computes with time.time() sees the jump.
        offset_s = planned["seconds"]
        time.time = lambda: _true_time() + offset_s
    return found
