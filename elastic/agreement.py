"""A sum that processes agree on, as the workers of a run do; what `doctor` tries. Light."""

import subprocess
import sys
from typing import Literal

Backend = Literal["gloo", "nccl"]

_AGREE_S = 60  # for the group; a first import of torch on a cold disk comes before it
_LATEST_S = 120
_PROGRAM = f"""
import sys
from datetime import timedelta
import torch
import torch.distributed as dist

backend, place = sys.argv[1:3]
rank, size = int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group(backend, init_method=place, rank=rank, world_size=size,
                        timeout=timedelta(seconds={_AGREE_S}))
total = torch.tensor([rank + 1], device="cuda" if backend == "nccl" else "cpu")
dist.all_reduce(total)
assert total.item() == size * (size + 1) // 2, total
dist.barrier()  # who ends first would cut the other off
dist.destroy_process_group()
"""


def begin(backend: Backend, place: str, rank: int, size: int) -> "subprocess.Popen[str]":
    """Start the process of one rank; `place` is the address of the rendezvous, as torch has it."""
    command = [sys.executable, "-c", _PROGRAM, backend, place, str(rank), str(size)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def why_not(process: "subprocess.Popen[str]") -> str:
    """Wait for it; why it did not agree, or nothing. It has ended in any case."""
    try:
        said = process.communicate(timeout=_LATEST_S)[1]
    except subprocess.TimeoutExpired:
        return f"no agreement in {_LATEST_S} s"
    finally:
        process.kill()
        process.wait()
    if process.returncode == 0:
        return ""
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"it ended with {process.returncode}"
