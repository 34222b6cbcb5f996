"""Several reads at once, as many as the time of one asks for; what they give comes in order."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")
_NEWEST = 0.25  # weight of the newest measurement


class Depth:
    """How many reads should be under way: what one takes, over what is left for it, and one more.

    Who waits for reads takes them as fast as they come, so the depth grows by one with each until
    nobody waits, or until `most`. Reads that share a line that is full get no faster by it.
    """

    def __init__(self, most: int) -> None:
        self.now = min(2, most)
        self._most = most
        self._read_s = self._between_s = 0.0

    def told(self, read_s: float, between_s: float) -> None:
        """A read took so long, and was asked for so long after the one before."""
        first = not self._read_s
        self._read_s += (1.0 if first else _NEWEST) * (read_s - self._read_s)
        self._between_s += (1.0 if first else _NEWEST) * (between_s - self._between_s)
        wanted = self._read_s / max(self._between_s, 1e-9)
        self.now = min(self._most, self.now + 1, max(2, math.ceil(min(wanted, self._most)) + 1))


def read_ahead(
    read: Callable[[_Question], _Answer], questions: Iterable[_Question], most: int
) -> Iterator[_Answer]:
    """The answers in the order of the questions, which are asked ahead by up to `most` threads.

    An error is raised in its place. What is under way when nobody asks any more is waited for.
    """
    left, depth = iter(questions), Depth(most)
    waiting: deque[Future[tuple[_Answer, float]]] = deque()

    def timed(question: _Question) -> tuple[_Answer, float]:
        began = time.monotonic()
        return read(question), time.monotonic() - began

    with ThreadPoolExecutor(most, thread_name_prefix="reader") as pool:
        try:
            taken_at = time.monotonic()
            while True:
                for question in _some(left, depth.now - len(waiting)):
                    waiting.append(pool.submit(timed, question))
                if not waiting:
                    return
                answer, read_s = waiting.popleft().result()
                depth.told(read_s, time.monotonic() - taken_at)
                taken_at = time.monotonic()
                yield answer
        finally:
            for future in waiting:
                future.cancel()


def _some(questions: Iterator[_Question], count: int) -> Iterator[_Question]:
    for _ in range(count):
        try:
            yield next(questions)
        except StopIteration:
            return
