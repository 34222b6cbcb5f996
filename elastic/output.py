"""Standard output whose reader may go before it ends, as in `plan FILE | head`."""

import os
import select
import sys

READER_GONE = 141
"""The exit code that a shell shows of a tool that SIGPIPE has ended."""


def has_reader() -> bool:
    """Whether anybody can still read what is printed."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), select.POLLOUT)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))


def end_output(code: int) -> int:
    """Print what is still held back; the exit code, which is another one if nobody reads it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = READER_GONE
    if code == READER_GONE:
        # Python prints at its own end what it could not print before, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
