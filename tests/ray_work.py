"""What `test_ray_tasks.py` has done on a cluster: workers import this file alone, and no torch."""

import os
import time
from pathlib import Path

import ray


def alone(marks: str, number: int) -> int:
    """A task that leaves its process's id and, the first time, goes on until it is ended."""
    path = Path(marks) / f"{number}-{os.getpid()}"
    path.touch()
    while len(list(Path(marks).glob(f"{number}-*"))) < 2:
        time.sleep(0.05)
    return number


def alive(marks: str, number: int) -> int:
    """A task whose process ends when it is tried first."""
    if not list(Path(marks).iterdir()):
        (Path(marks) / "tried").touch()
        os._exit(1)
    return number


def fails(marks: str, number: int) -> int:
    """A task with an error of its own."""
    raise OSError(f"{marks}/{number} cannot be read")


@ray.remote(num_cpus=1)
class Somebody:
    """Somebody else's work."""

    def ready(self) -> bool:
        return True
