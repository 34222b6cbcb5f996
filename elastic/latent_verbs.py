"""The verbs that look after latent stores: `verify` names what is damaged, `repair` mends it."""

import argparse
import json
from pathlib import Path
from typing import Any

from elastic.course import pin_of
from elastic.data.verify import Verdict, discard, verify
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.settings import Settings
from stages.plan import Plan

WHOLE, NOT_WHOLE = 0, 1


def verify_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Read all of a store, or of every store of a run, and say what is damaged."""
    verdicts = {root: verify(root) for root in stores_of(Path(flags.store))}
    if flags.json:
        print(json.dumps([as_json(root, verdict) for root, verdict in verdicts.items()]))
    else:
        for root, verdict in verdicts.items():
            print("\n".join(lines(root, verdict)))
        if any(verdict.shards or verdict.seal for verdict in verdicts.values()):
            print("mend it: python -m elastic repair FILE, with the stage file of the run")
    return WHOLE if all(verdict.is_whole for verdict in verdicts.values()) else NOT_WHOLE


def stores_of(path: Path) -> list[Path]:
    """The store at a path, or those of the run there; InputError where there is neither."""
    if (path / "plan.json").exists():
        return [path]
    found = sorted(plan.parent for plan in (path / "latents").glob("*/plan.json"))
    if not found:
        raise InputError(
            f"{str(path)!r} is neither a latent store (plan.json) nor a run folder with latents; "
            "give runs/NAME, or runs/NAME/latents/FINGERPRINT"
        )
    return found


def lines(root: Path, verdict: Verdict) -> list[str]:
    """What was found, for people; one line a fault."""
    state = "sealed" if verdict.is_sealed else "not sealed"
    head = f"{root}: {verdict.num_shards} shards, {state}"
    if verdict.missing:
        head += f", {len(verdict.missing)} not encoded yet"
    if verdict.faults:
        head += f", {len(verdict.shards)} damaged"
    return [
        f"{head}{': whole' if verdict.is_whole else ''}",
        *(f"  {fault.path.relative_to(root)} {fault.what}" for fault in verdict.faults),
    ]


def as_json(root: Path, verdict: Verdict) -> dict[str, Any]:  # Any: a JSON tree
    """What was found, for programs."""
    return {
        "store": str(root),
        "whole": verdict.is_whole,
        "sealed": verdict.is_sealed,
        "shards": verdict.num_shards,
        "missing": [list(shard) for shard in verdict.missing],
        "faults": [{"path": str(fault.path), "what": fault.what} for fault in verdict.faults],
    }


def discard_damage(plan: Plan, folder: RunFolder) -> int:
    """Delete the damaged shards of what a plan's stages use, naming them; how many there were.

    InputError where no stage has latents yet: there is nothing to repair.
    """
    pins = [pin_of(folder, stage) for stage in plan.stages]
    roots = {
        folder.latents / json.loads(pin.read_text())["fingerprint"] for pin in pins if pin.exists()
    }
    if not roots:
        raise InputError(f"no stage of {plan.name!r} has latents yet; encode or train it first")
    num_shards = 0
    for root in sorted(roots):
        verdict = verify(root)
        print("\n".join(lines(root, verdict)), flush=True)
        num_shards += discard(root, verdict)
    print(f"shards of {plan.name} to be encoded again: {num_shards}", flush=True)
    return num_shards
