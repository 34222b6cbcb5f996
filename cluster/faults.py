"""Real faults, for tests and benchmarks: processes that die or hang, disks that fill or refuse.

Nothing here is simulated: signals go to living processes, and the disks are mounts of their own
(which takes root), so what is tested meets the errors that it would meet in a machine room.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.local import processes_of

_LOOK_EVERY_S = 0.002  # between two looks at a folder or a process: a save may take 20 ms
_REFUSE_S = 10.0
_FILL = "fill"  # the file that takes what is free of a small disk
# What Ray calls its processes, in the order in which a name is looked for.
_ROLES = {
    "controller": "ray::TrainController",
    "tracker": "ray::TrackerService",
    "coordinator": "ray::_AutoscalingCoordinatorActor",
    "head": "gcs_server",
    "raylet": "raylet/raylet",
    "supervisor": "RayTrainWorker",
    "keeper": "ray::HostKeeper",
}
_HOST = "elastic.fork_host"  # in the command line of a fork host and of what it has forked


def kill(pid: int) -> None:
    """End a process at once, as the kernel does when memory runs out."""
    os.kill(pid, signal.SIGKILL)


def freeze(pid: int) -> None:
    """Stop a process where it stands: alive for everyone who looks, and silent."""
    os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    """Let a frozen process go on; one that was ended meanwhile is left alone."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def kill_tree(pid: int) -> int:
    """End a process and all that descends from it, as a machine that loses power; how many.

    The root is frozen first, so that it cannot start another while the others are counted.
    """
    try:
        root = psutil.Process(pid)
        root.suspend()
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return len(family)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs, or could if it were not frozen; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_cluster(temp_dir: Path) -> int:
    """End what is left of a LocalCluster whose driver was killed; how many processes."""
    left = [process.pid for process in processes_of(temp_dir)]
    end_all(left)
    return len(left)


def end_all(pids: Iterable[int]) -> None:
    """End these processes, whichever of them still live."""
    for pid in pids:
        with suppress(ProcessLookupError):
            kill(pid)


def by_role(temp_dir: Path) -> dict[str, list[int]]:
    """Process ids of a LocalCluster by what they do, in the order in which they were started.

    Ray's: controller, tracker, coordinator, head, raylet, supervisor. Ours: keeper, host, trainer.
    """
    found: dict[str, list[int]] = {role: [] for role in (*_ROLES, "host", "trainer")}
    for process in sorted(processes_of(temp_dir), key=lambda process: process.pid):
        try:
            role = _role_of(process)
        except psutil.Error:
            continue  # ended while we looked
        if role is not None:
            found[role].append(process.pid)
    return found


def _role_of(process: psutil.Process) -> str | None:
    command = process.cmdline()
    if _HOST in command:
        parent = process.parent()
        return "trainer" if parent is not None and _HOST in parent.cmdline() else "host"
    named = command[0] if command else ""
    return next((role for role, mark in _ROLES.items() if mark in named), None)


def when(true: Callable[[], bool], within_s: float) -> bool:
    """Wait for the moment at which something becomes true; False if it does not come in time."""
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def is_saving(stage: Path) -> bool:
    """Whether a checkpoint of this stage's folder is being written now."""
    names = [folder.name.split(".") for folder in (stage / "checkpoints").glob("*.partial")]
    # POSITION.ATTEMPT.partial; what is being deleted has a time of 19 digits in the middle.
    return any(len(name) == 3 and len(name[1]) < 12 for name in names)


@dataclass(frozen=True)
class SmallDisk:
    """A disk of a few megabytes in memory, mounted at `path`."""

    path: Path

    def fill(self, leave_bytes: int = 0) -> None:
        """Take what is free but for `leave_bytes`; what is written then meets ENOSPC."""
        stats = os.statvfs(self.path)
        take = stats.f_bavail * stats.f_frsize - leave_bytes
        with (self.path / _FILL).open("ab") as file:
            os.posix_fallocate(file.fileno(), file.tell(), max(1, take))

    def free(self) -> None:
        """Give back what `fill` took."""
        (self.path / _FILL).unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, num_bytes: int) -> Iterator[SmallDisk]:
    """A disk of its own at `path` while the block runs; its content is gone afterwards."""
    path.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "restage-small-disk", str(path))
    try:
        yield SmallDisk(path)
    finally:
        # Lazily: whoever still has a file open there keeps it until it is closed.
        _run("umount", "--lazy", str(path))


@contextmanager
def refusing_writes(path: Path) -> Iterator[None]:
    """A folder that can be read and not written (EROFS) while the block runs.

    Files that were open for writing before stay so, as on a server that stops to take new ones.
    """
    _run("mount", "--bind", str(path), str(path))
    try:
        # Whoever opens a file between the two mounts holds the refusal up until it is closed.
        if not when(lambda: _remount_read_only(path), _REFUSE_S):
            raise TimeoutError(f"{path} had files open for all of {_REFUSE_S:.0f} s")
        yield
    finally:
        _run("umount", "--lazy", str(path))


def _remount_read_only(path: Path) -> bool:
    command = ["mount", "-o", "remount,bind,ro", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()} (root is needed)")
