"""The verb that looks after latent stores: `verify` names what is damaged."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from elastic.data.places import check_url, is_url, join
from elastic.data.schema import PLAN
from elastic.data.store_folder import folder_at
from elastic.data.verify import Verdict, verdict_lines, verify
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.settings import Settings

WHOLE, NOT_WHOLE = 0, 1


def verify_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Read all of a store, or of every store of a run, and say what is damaged."""
    verdicts = {root: verify(root, _show) for root in stores_of(flags.store)}
    if flags.json:
        stores = [as_json(root, verdict) for root, verdict in verdicts.items()]
        print(json.dumps({"whole": all(one["whole"] for one in stores), "stores": stores}))
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


def stores_of(path: str) -> list[str]:
    """The store at a path or URL, or those of the run there; InputError where there is neither."""
    if is_url(path):
        check_url(path, "store")
    if folder_at(path).size(PLAN) is not None:
        return [path.rstrip("/")]
    latents = join(path, "latents") if is_url(path) else RunFolder(Path(path)).latents
    found = folder_at(latents).holding(PLAN)
    if not found:
        raise InputError(
            f"{path!r} is neither a latent store ({PLAN}) nor a run folder with latents; "
            "give runs/NAME, or runs/NAME/latents/FINGERPRINT"
        )
    return [join(latents, name) for name in found]


def as_json(root: str, verdict: Verdict) -> dict[str, Any]:  # Any: a JSON tree
    """What was found, for programs."""
    return {
        "store": root,
        "whole": verdict.is_whole,
        "sealed": verdict.is_sealed,
        "shards": verdict.num_shards,
        "missing": [list(shard) for shard in verdict.missing],
        "faults": [
            {"path": f"{root}/{fault.name}", "what": fault.what} for fault in verdict.faults
        ],
    }
