"""What `doctor` asks of GPUs: whether torch sees them, and their health as the driver tells it."""

import os
import shutil
import subprocess
from collections.abc import Iterator

from elastic.finding import Finding

_SMI = "nvidia-smi"
_ANSWER_S = 30
_HEALTH = "index,uuid,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.active"
_APPS = "gpu_uuid,pid,used_memory"
# Reasons, as bits, for which a GPU is slower than it should be; a power cap and idling are none.
_SLOWED = {
    0x08: "slowed by the hardware",
    0x20: "too hot for the driver",
    0x40: "too hot for the hardware",
    0x80: "braked by its power supply",
}


def torch_threads() -> Finding:
    """Whether torch takes more threads than there are cores."""
    import torch

    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    value, rule = f"{threads} threads on {cores} cores", "no more threads than cores"
    if threads > cores:
        advice = f"set OMP_NUM_THREADS to {cores} or less"
        return Finding("warn", "torch threads", value, advice, rule)
    return Finding("ok", "torch threads", value, rule=rule)


def gpus() -> list[Finding]:
    """The GPUs and their health."""
    # Before torch is on a GPU, and would be found there as another process.
    health = _health() if shutil.which(_SMI) else []
    return [_seen_by_torch(), *health]


def _seen_by_torch() -> Finding:
    import torch

    rule = f"torch sees the GPUs that {_SMI} sees"
    if not torch.cuda.is_available():
        if shutil.which(_SMI):
            advice = f"torch {torch.__version__} does not see the GPUs: install a CUDA build"
            return Finding("warn", "GPUs", f"{_SMI} is there, torch sees none", advice, rule)
        return Finding("ok", "GPUs", "none; training runs on the CPU with gloo")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("ok", "GPUs", f"{len(names)}: {', '.join(sorted(set(names)))}", rule=rule)


def _health() -> list[Finding]:
    try:
        health = _ask("--query-gpu=" + _HEALTH)
        apps = _ask("--query-compute-apps=" + _APPS)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stdout", None) or str(error)
        advice = "the driver does not answer: look at dmesg, reload it or restart the machine"
        return [Finding("error", "GPU health", said.strip(), advice, f"{_SMI} answers")]
    return list(gpu_health(health, apps))


def _ask(query: str) -> str:
    command = [_SMI, query, "--format=csv,noheader,nounits"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=_ANSWER_S, check=True
    ).stdout


def gpu_health(health: str, apps: str) -> Iterator[Finding]:
    """A finding for each GPU, from what nvidia-smi prints; what it does not know is left out."""
    rule = "no uncorrected memory errors, full clocks, nobody else on it"
    users: dict[str, list[str]] = {}
    for uuid, pid, mib in _rows(apps):
        users.setdefault(uuid, []).append(f"process {pid} ({mib} MiB)")
    for index, uuid, errors, slowed in _rows(health):
        what = f"GPU {index}"
        if errors.isdecimal() and int(errors):
            advice = f"drain the node and reset it ({_SMI} --gpu-reset -i {index}); if they return,"
            advice += " have it replaced"
            yield Finding("error", what, f"{errors} uncorrected memory errors", advice, rule)
        elif reasons := _slowed_by(slowed):
            advice = "look at its cooling and power: it sets the pace of all workers"
            yield Finding("warn", what, reasons, advice, rule)
        elif uuid in users:
            advice = "end them, or leave this GPU out with CUDA_VISIBLE_DEVICES"
            yield Finding("warn", what, f"used by {', '.join(users[uuid])}", advice, rule)
        else:
            yield Finding("ok", what, "no memory errors, not slowed, free", rule=rule)


def _rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.strip():
            yield [cell.strip() for cell in line.split(",")]


def _slowed_by(mask: str) -> str:
    try:
        bits = int(mask, 16)
    except ValueError:
        return ""  # not supported by this GPU
    return ", ".join(words for bit, words in _SLOWED.items() if bits & bit)
