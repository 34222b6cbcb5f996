"""What every benchmark prints last and keeps: one JSON object with its figures and its goal."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device() -> str:
    """The accelerator, or the processor, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def record(name: str, *, figures: dict[str, Any], goal: str, holds: bool, keep: bool) -> None:
    """Print the result as one line of JSON, and keep it in `results/` if asked."""
    result = {
        "name": name,
        "device": device(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "figures": figures,
        "goal": goal,
        "holds": holds,
    }
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
