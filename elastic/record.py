"""run.json: which plan a run folder belongs to, and its stages as they were when they started."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from elastic.data.places import is_url
from elastic.errors import InputError
from elastic.files import write_atomic
from elastic.folders import RunFolder
from elastic.weights import file_digest
from models.perceptual import Lpips
from stages.explain import explain
from stages.identity import description
from stages.plan import Plan
from stages.stage import AutoencoderStage, Stage

SCHEMA = 2
_VERSIONS = ("restage", "torch", "ray", "zarr", "av", "diffusers")


def write_record(folder: RunFolder, plan: Plan) -> None:
    """Write run.json for this start; the stages that have started stay as they were recorded."""
    record = {
        "schema": SCHEMA,
        "plan": plan.name,
        "definition": plan.model_dump(mode="json"),
        "started": _read(folder)["started"],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _VERSIONS},
        },
    }
    write_atomic(folder.record, json.dumps(record, indent=1).encode())


def start_stage(folder: RunFolder, stage: Stage) -> None:
    """Record a stage as it starts."""
    record = _read(folder)
    record["started"][stage.name] = described(stage)
    write_atomic(folder.record, json.dumps(record, indent=1).encode())


def has_started(folder: RunFolder, stage: Stage) -> bool:
    """Whether the stage has started in this run, and so may not change any more."""
    return stage.name in _read(folder)["started"]


def check_unchanged(folder: RunFolder, plan: Plan) -> None:
    """InputError with the difference if a stage that has started is not what it was."""
    started = _read(folder)["started"]
    for stage in plan.stages:
        if stage.name not in started:
            continue
        # Through JSON, so that both sides have lists where records have tuples.
        now = json.loads(json.dumps(described(stage)))
        perceptual = now.get("perceptual")
        if perceptual and perceptual.get("weights_sha256", "") is None:
            # The file is gone; a stage that is under way misses it elsewhere, a finished one never.
            perceptual["weights_sha256"] = started[stage.name]["perceptual"]["weights_sha256"]
        changes = difference(started[stage.name], now)
        if changes:
            raise InputError(
                f"stage {stage.name!r} of run {str(folder.root)!r} has already started and may "
                f"not change: {'; '.join(changes)}. Undo the change, or give the stage or the "
                "plan another name"
            )


def read_plan(folder: RunFolder) -> Plan:
    """The plan as it was at the last start; InputError if this is no run folder."""
    record = _read(folder)
    if "definition" not in record:
        raise InputError(f"{str(folder.root)!r} is no run folder: run.json is missing")
    try:
        return Plan.model_validate(record["definition"])
    except ValidationError as error:
        raise InputError(
            f"{folder.record}: its plan cannot be read ({explain(error)}); restore the file, or "
            "read the run with the version that wrote it"
        ) from None


def described(stage: Stage) -> dict[str, Any]:
    """What identifies the stage; where its table lies is said from the root, not from here.

    LPIPS weights are what the file holds, wherever it lies; a file that is gone holds None.
    """
    fields = description(stage)
    if isinstance(stage, AutoencoderStage) and isinstance(stage.perceptual, Lpips):
        path = Path(fields["perceptual"].pop("weights"))
        fields["perceptual"]["weights_sha256"] = file_digest(path) if path.is_file() else None
    return {**fields, "data": _placed(fields["data"])}


def _placed(data: dict[str, Any]) -> dict[str, Any]:  # Any: JSON of whatever the fields hold
    """Videos, or a mix of them, whose tables and folders are named from the root."""
    if "parts" in data:
        parts = [{**part, "videos": _placed(part["videos"])} for part in data["parts"]]
        return {**data, "parts": parts}
    places = {
        name: path if path is None or is_url(path) else os.path.abspath(path)
        for name, path in data.items()
        if name in ("table", "folder")
    }
    return {**data, **places}


def difference(before: Any, after: Any, where: str = "") -> list[str]:  # Any: JSON
    """Each leaf that differs, as `path: before -> after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted({*before, *after})
        return [
            line
            for name in names
            for line in difference(before.get(name), after.get(name), f"{where}.{name}".strip("."))
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for i, (b, a) in pairs for line in difference(b, a, f"{where}[{i}]")]
    return [] if before == after else [f"{where}: {before!r} -> {after!r}"]


def _read(folder: RunFolder) -> dict[str, Any]:
    if not folder.record.exists():
        return {"schema": SCHEMA, "started": {}}
    try:
        record = json.loads(folder.record.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder.record} cannot be read ({error}); restore it, or name another run folder"
        ) from None
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA or not isinstance(record.get("started"), dict):
        raise InputError(
            f"{folder.record}: schema {found!r}, this version reads {SCHEMA}; restore the file, or "
            "read the run with the version that wrote it"
        )
    return dict(record)
