"""What `doctor` asks of the memory and the limits of this machine."""

import resource
import shutil
from pathlib import Path

import psutil

from elastic.finding import Finding

GIB = 1 << 30
_LEAST_MEMORY = 4 * GIB
_LEAST_SHARED = GIB
_LEAST_FILES = 8192  # what Ray recommends


def memory() -> Finding:
    """Free memory."""
    rule = f"{_LEAST_MEMORY // GIB} GiB free, as the demo needs"
    now = psutil.virtual_memory()
    value = f"{now.available / GIB:.1f} of {now.total / GIB:.1f} GiB free"
    if now.available < _LEAST_MEMORY:
        return Finding("warn", "memory", value, "close other programs, or give more memory", rule)
    return Finding("ok", "memory", value, rule=rule)


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Room in the memory that Ray, decoders and workers share."""
    rule = f"{_LEAST_SHARED // GIB} GiB free in {path}"
    if not path.exists():
        advice = "mount a tmpfs there: Ray uses slower files in /tmp, and decoders need it"
        return Finding("warn", "shared memory", f"no {path}", advice, rule)
    usage = shutil.disk_usage(path)
    value = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free in {path}"
    if usage.free < _LEAST_SHARED:
        advice = f"mount -o remount,size=4g {path}; for a container: --shm-size=4g"
        return Finding("warn", "shared memory", value, advice, rule)
    return Finding("ok", "shared memory", value, rule=rule)


def open_files() -> Finding:
    """How many files a process may hold; Ray raises the soft limit to the hard one by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    rule = f"{_LEAST_FILES:,} or more (hard limit)"
    if hard == resource.RLIM_INFINITY:
        return Finding("ok", "open files", "no limit", rule=rule)
    value = f"{hard:,} a process"
    if hard < _LEAST_FILES:
        advice = "ulimit -Hn 65536 as root, LimitNOFILE= of the service, or --ulimit nofile=65536"
        return Finding("warn", "open files", value, advice, rule)
    return Finding("ok", "open files", value, rule=rule)
