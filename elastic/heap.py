"""Memory that is freed stays with the process, for tensors that come again with every batch.

By default the C library gives large blocks back, and each page is zeroed again when it is touched:
a quarter of an encoding process's time, and five sixths of what reading a batch of large latents
takes (tests/bench/encode.py, reader.py).
"""

import ctypes
from typing import Any

# Of malloc.h. One arena for all threads: what one of them frees another can use, and an arena
# of a thread's own is too small for large blocks.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST_ON_HEAP = (1 << 28, 1 << 25)  # bytes of a block; earlier versions take no more than 32 MB
_MOST_KEPT, _ARENAS = 1 << 30, 1  # bytes at the end of the heap, count


def keep_freed_memory(libc: Any = None) -> None:  # Any: what ctypes makes of the C library
    """Have the C library keep what is freed, but for the largest blocks.

    To be called before there are other threads.
    """
    libc = libc or ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # others than glibc have no such call
        return
    # Any of them ends the library's own adapting, so without the first it would do harm.
    if any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in _MOST_ON_HEAP):
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
