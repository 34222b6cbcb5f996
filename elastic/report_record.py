"""What the report says beside the journals: how stages started, fingerprints and versions."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from elastic.folders import LATENT_PINS, RunFolder
from elastic.init_table import Action
from elastic.page_parts import folded, soft, table
from elastic.start import INIT
from elastic.weights import FINISHED

_ACTIONS = get_args(Action)


def read_run(run_dir: Path) -> dict[str, Any]:  # Any: JSON that another version may have written
    """run.json, or what is wrong with it as its only entry; empty if it is missing."""
    return _read(RunFolder(run_dir).record)


def autoencoders(run: dict[str, Any]) -> frozenset[str]:
    """The stages whose samples are clips beside what the codec gives back of them."""
    return frozenset(name for name, one in _declared(run).items() if "model" not in one)


def starts(run_dir: Path, run: dict[str, Any], stages: Sequence[str]) -> str:
    """One row a stage: its policy, from where, and what became of how many parameters."""
    rows = []
    for stage in stages:
        found = _read(_folder(run_dir, stage) / INIT)
        if "totals" not in found:
            continue
        totals = found["totals"]
        rows.append(
            [stage, str(found.get("policy", "")), _origin(_declared(run).get(stage, {}))]
            + [_count(totals.get(action, {}).get("parameters", 0)) for action in _ACTIONS]
        )
    if not rows:
        return soft("No stage has been given its first parameters.")
    return table(("stage", "policy", "from", *_ACTIONS), rows, frozenset({1, 2})) + soft(
        "Parameters by what became of them. Dropped ones are in the origin, not in the model."
    )


def fingerprints(run_dir: Path, stages: Sequence[str]) -> str:
    """What pins latents and weights: one row a name."""
    rows = [
        [stage, what, value]
        for stage in stages
        for what, value in _fingerprints(_folder(run_dir, stage))
    ]
    return table(("stage", "what", "value"), rows, frozenset({1, 2})) if rows else ""


def versions(run: dict[str, Any]) -> str:
    """The versions that ran the last start."""
    found = run.get("versions")
    rows = [[str(k), str(v)] for k, v in found.items()] if isinstance(found, dict) else []
    if not run:
        return soft("run.json has not been written.")
    return table(("what", "version"), rows, frozenset({1})) if rows else ""


def whole_record(run: dict[str, Any]) -> str:
    """All of run.json, for whoever unfolds it."""
    rows = [[name, str(value)] for name, value in _flat("", run)]
    return folded("run.json", table(("what", "value"), rows, frozenset({1}))) if rows else ""


def _fingerprints(folder: Path) -> Iterator[tuple[str, str]]:
    latents = _read(folder / LATENT_PINS)
    for name, words in (
        ("fingerprint", "latents"),
        ("digest", "latents, all bytes"),
        ("weights_sha256", "weights of the codec that made them"),
    ):
        if name in latents:
            yield words, str(latents[name])
    digest = _read(folder / FINISHED).get("weights_sha256")
    if digest is not None:
        yield "finished weights", str(digest)


def _folder(run_dir: Path, stage: str) -> Path:
    """The stage's folder; a name of the journals that would lead elsewhere has none."""
    folder = RunFolder(run_dir).stage(stage)
    return folder if folder.parent == run_dir / "stages" else run_dir / "stages" / "-"


def _declared(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    definition = run.get("definition")
    stages = definition.get("stages", []) if isinstance(definition, dict) else []
    return {str(one.get("name")): one for one in stages}


def _origin(stage: dict[str, Any]) -> str:
    init = stage.get("init", {})
    if "stage" in init:
        at = init.get("at")
        return str(init["stage"].get("name")) + (f" at {at:,}" if isinstance(at, int) else "")
    return str(init["path"]) if "path" in init else f"seed {init.get('seed', 0)}"


def _count(parameters: int) -> str:
    return f"{parameters:,}" if parameters else "-"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return {path.name: f"cannot be read: {error}"}
    return found if isinstance(found, dict) else {path.name: found}


def _flat(prefix: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        pairs = list(enumerate(value))
    else:
        return [(prefix, value)]
    flat = []
    for key, item in pairs:
        flat += _flat(f"{prefix}.{key}" if prefix else str(key), item)
    return flat
