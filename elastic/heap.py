"""Memory that is freed stays with the process, for tensors that come again with every batch.

By default the C library gives large blocks back, and each page is zeroed again when it is touched:
a quarter of an encoding process's time, and five sixths of what reading a batch of large latents
takes (tests/bench/encode.py, reader.py).
"""

import ctypes

# Of malloc.h. One arena for all threads: what one of them frees another can use, and an arena
# of a thread's own is too small for large blocks.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST_ON_HEAP, _MOST_KEPT, _ARENAS = 1 << 28, 1 << 30, 1  # bytes, bytes, count


def keep_freed_memory() -> None:
    """Have the C library keep up to a gigabyte of what is freed, but for single large blocks.

    To be called before there are other threads.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # others than glibc have no such call
        libc.mallopt(_M_MMAP_THRESHOLD, _MOST_ON_HEAP)
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
