"""What a device can do at best, by its name, and the most memory that this process has taken."""

import re
import resource
import sys
from pathlib import Path

import torch

_TERA = 1e12
# Name as torch gives it, dense bf16 tensor-core FLOP/s with fp32 sums, where NVIDIA says so. A
# slice of a GPU (MIG) has a longer name and so no peak here.
_DENSE_BF16: tuple[tuple[str, float, str], ...] = (
    (r"H100 (80GB HBM3|SXM5 \d+GB)|H800", 989.4 * _TERA, "H100 data sheet: 1,979 sparse"),
    (r"H100 PCIe", 756.5 * _TERA, "H100 data sheet of 2022: 1,513 sparse"),
    (r"H100 NVL|H200 NVL", 835.5 * _TERA, "H100 NVL and H200 NVL data sheets: 1,671 sparse"),
    (r"H200", 989.4 * _TERA, "H200 data sheet: 1,979 sparse"),
    (r"GH200 \d+GB?( HBM3e)?", 989.4 * _TERA, "GH200 data sheet: 1,979 sparse"),
    (r"H20", 148.0 * _TERA, "H20 data sheet"),
    (r"A[18]00[- ](SXM4-|PCIE-)?\d+GB( PCIe)?", 312.0 * _TERA, "A100 data sheet"),
    (r"A40", 149.7 * _TERA, "A40 data sheet"),
    (r"A30", 165.0 * _TERA, "A30 data sheet"),
    (r"A10", 125.0 * _TERA, "A10 data sheet"),
    (r"L40S", 362.05 * _TERA, "L40S data sheet"),
    (r"L40", 181.05 * _TERA, "L40 data sheet"),
    (r"L4", 121.0 * _TERA, "L4 data sheet: 242 sparse"),
    (r"GB200", 2_500.0 * _TERA, "GB200 NVL72 data sheet: 360 PFLOPS sparse on 72"),
    (r"B200", 2_250.0 * _TERA, "HGX B200 data sheet: 36 PFLOPS sparse on 8"),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device; None where no data sheet of it is known here."""
    return None if device.type != "cuda" else peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The same by the name that torch gives to a device."""
    short = name.removeprefix("NVIDIA ")
    return next((flops for known, flops, _ in _DENSE_BF16 if re.fullmatch(known, short)), None)


def memory_peak(device: torch.device) -> int:
    """The most bytes so far: of this process's tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # Not `ru_maxrss`, which a process takes over from the one that started it.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
