"""Memory that is freed stays with the process, whichever thread asks for it next."""

import os
import subprocess
import sys

import pytest

from elastic.heap import keep_freed_memory

# Pages that the kernel had to bring in for a block of 64 MB that comes again and again: made by
# one thread and let go by another, as a batch is.
_PROGRAM = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from elastic.heap import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
with ThreadPoolExecutor(1) as pool:
    def batch():
        return torch.ones(64 << 20, dtype=torch.uint8)
    def faults(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            pool.submit(batch).result()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    faults(20)
    print(faults(40))
"""


class _Libc:
    """A C library that takes blocks of some size at most for its heap."""

    def __init__(self, most: int) -> None:
        self._most, self.taken = most, dict[int, int]()

    def mallopt(self, option: int, value: int) -> int:
        """1 if the option is taken."""
        if option == -3 and value > self._most:
            return 0
        self.taken[option] = value
        return 1


@pytest.mark.parametrize(
    ("most", "options"), [(1 << 40, {-3, -1, -8}), (1 << 25, {-3, -1, -8}), (0, set())]
)
def test_a_library_that_takes_no_large_blocks_is_left_as_it_is(
    most: int, options: set[int]
) -> None:
    libc = _Libc(most)
    keep_freed_memory(libc)
    assert libc.taken.keys() == options
    assert libc.taken.get(-3, 0) <= most


def _faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU C library")
def test_a_block_that_comes_again_is_not_zeroed_again_by_the_kernel() -> None:
    given_back, kept = _faults("given back"), _faults("kept")
    assert given_back > 1000, "or there is nothing to keep"
    assert kept < given_back / 20
