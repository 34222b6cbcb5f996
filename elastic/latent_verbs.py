"""The verb that looks after latent stores: `verify` names what is damaged."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from elastic.data.verify import Verdict, verdict_lines, verify
from elastic.errors import InputError
from elastic.settings import Settings

WHOLE, NOT_WHOLE = 0, 1


def verify_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Read all of a store, or of every store of a run, and say what is damaged."""
    verdicts = {root: verify(root, _show) for root in stores_of(Path(flags.store))}
    if flags.json:
        print(json.dumps([as_json(root, verdict) for root, verdict in verdicts.items()]))
    else:
        for root, verdict in verdicts.items():
            print("\n".join(verdict_lines(root, verdict)))
        if any(verdict.faults for verdict in verdicts.values()):
            print("mend it: python -m elastic repair FILE, with the stage file of the run")
    return WHOLE if all(verdict.is_whole for verdict in verdicts.values()) else NOT_WHOLE


def _show(done: int, total: int) -> None:
    """A live line where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} shards", end="\n" if done == total else "", file=sys.stderr)


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
