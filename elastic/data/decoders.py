"""Decoding in processes of their own, ahead of whoever uses the pictures.

A file can crash its decoder, keep it busy for ever, or have it take all memory. Here that costs one
process, which is started anew, and the file gets the reason.
"""

import functools
import multiprocessing
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from multiprocessing.connection import Connection
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic.data.decode import DEADLINE_S, BadVideo, Unreachable, decode_clip
from elastic.data.places import is_url
from elastic.data.probe import Probe, probe

KILL_AFTER_S = 2 * DEADLINE_S  # by the clock; a decoder gives up itself at its deadline
MEMORY_BYTES = 4 << 30  # more than it has at its start
_TRIES = 3  # whatever else ends processes on a machine, it does not end three in a row
_GROW = 1 << 20

Answer = Probe | BadVideo | Unreachable | None  # None: the pictures lie in the shared memory


class Wanted(NamedTuple):
    """The arguments of `decode_clip`."""

    path: str
    frames: int
    rate: Fraction | float
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """C,T,H,W of its pictures."""
        return 3, self.frames, self.height, self.width


Do = Callable[[Wanted | str, NDArray[np.uint8]], Answer]


class Decoders:
    """So many processes that probe and decode; results come in the order of the questions.

    What is done there is a function of a question and the memory for pictures.
    """

    def __init__(self, num: int, do: Do | None = None, kill_after_s: float = KILL_AFTER_S) -> None:
        self.num = num
        self._do = do or answer
        self._kill_after_s = kill_after_s
        self._own = local()  # each thread talks to one process
        self._processes: list[_Process] = []
        self._threads = ThreadPoolExecutor(num, thread_name_prefix="decoder")

    def decode(self, wanted: Iterable[Wanted], ahead: int) -> Iterator[Tensor | BadVideo]:
        """The pictures of each clip, uint8 C,T,H,W, or what is wrong with it.

        Up to `ahead` clips are decoded before they are asked for. Raises Unreachable for a file
        that cannot be read just now.
        """
        for found in self._in_order(self._decode, wanted, ahead):
            if isinstance(found, Unreachable):
                raise found
            yield found

    def probe(self, paths: Iterable[str]) -> Iterator[Probe | BadVideo | Unreachable]:
        """What is in each file, or why that is not known."""
        return self._in_order(self._probe, paths, 4 * self.num)

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def _in_order(self, function: Any, questions: Iterable[Any], ahead: int) -> Iterator[Any]:
        left = iter(questions)
        waiting: deque[Future[Any]] = deque()
        try:
            while True:
                while len(waiting) <= ahead and (question := next(left, None)) is not None:
                    waiting.append(self._threads.submit(function, question))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _decode(self, wanted: Wanted) -> Tensor | BadVideo | Unreachable:
        num_bytes = int(np.prod(wanted.shape))
        found, pixels = self._process().ask(wanted, num_bytes)
        if found is not None:
            assert not isinstance(found, Probe), "a probe was not asked for"
            return found
        return torch.from_numpy(pixels[:num_bytes].copy()).view(wanted.shape)

    def _probe(self, path: str) -> Probe | BadVideo | Unreachable:
        found, _ = self._process().ask(path, 0)
        assert found is not None, "pictures were not asked for"
        return found

    def _process(self) -> "_Process":
        if not hasattr(self._own, "process"):
            self._own.process = _Process(self._do, self._kill_after_s)
            self._processes.append(self._own.process)
        process: _Process = self._own.process
        return process


@functools.cache
def shared_decoders(num: int) -> Decoders:
    """Those of this process, started once and kept."""
    return Decoders(num)


class _Process:
    """One decoder and the memory in which it leaves its pictures."""

    def __init__(self, do: Do, kill_after_s: float) -> None:
        self._do = do
        self._kill_after_s = kill_after_s
        self._started: Any = None  # multiprocessing's process, of a type without a name
        self._connection: Connection | None = None
        self._pixels: NDArray[np.uint8] = np.empty(0, np.uint8)

    def ask(self, question: Wanted | str, num_bytes: int) -> tuple[Answer, NDArray[np.uint8]]:
        """Its answer, and the memory with the pictures; a process that dies is replaced."""
        reason = ""
        for _ in range(_TRIES):
            if self._connection is None or num_bytes > len(self._pixels):
                self._start(num_bytes)
            assert self._connection is not None, "it has been started"
            try:
                self._connection.send(question)
                return self._connection.recv(), self._pixels
            except (EOFError, OSError):
                ended_by = self._end()
            if ended_by == signal.SIGALRM:
                reason = f"took more than {self._kill_after_s:.0f} s, and no end of it"
                path = question if isinstance(question, str) else question.path
                if is_url(path):  # that is the network's doing before it is the file's
                    return Unreachable(f"{path}: {reason}"), self._pixels
                break
            reason = f"ends its decoder by {ended_by.name}"
        return BadVideo(reason), self._pixels

    def close(self) -> None:
        """End it."""
        if self._connection is not None:
            self._end()

    def _start(self, num_bytes: int) -> None:
        if self._connection is not None:
            self._end()
        context = multiprocessing.get_context("forkserver")
        # Torch is imported once, for all processes that it forks.
        context.set_forkserver_preload([__name__])
        memory = context.RawArray("B", -(-num_bytes // _GROW) * _GROW)
        self._connection, far = context.Pipe()
        arguments = (far, memory, self._do, self._kill_after_s, dict(os.environ))
        self._started = context.Process(target=_serve, args=arguments, daemon=True)
        self._started.start()
        far.close()
        self._pixels = np.frombuffer(memory, np.uint8) if num_bytes else np.empty(0, np.uint8)

    def _end(self) -> signal.Signals:
        """End it, if it has not ended; by what it did."""
        assert self._connection is not None, "it has been started"
        self._connection.close()
        self._connection = None
        self._started.join(timeout=1.0)
        if self._started.exitcode is None:
            self._started.kill()
            self._started.join()
        return signal.Signals(max(1, -self._started.exitcode))


def _serve(
    connection: Connection, memory: Any, do: Do, kill_after_s: float, environment: dict[str, str]
) -> None:
    """Answer until the other side is gone."""
    os.environ.update(environment)  # of now: what it was forked from began at some other time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: whoever asks decides
    torch.set_num_threads(1)
    pixels = np.frombuffer(memory, np.uint8) if len(memory) else np.empty(0, np.uint8)
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY_BYTES, own + MEMORY_BYTES))
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        # By default an alarm ends the process, also one that hangs inside a library.
        signal.setitimer(signal.ITIMER_REAL, kill_after_s)
        found = do(question, pixels)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        connection.send(found)


def answer(question: Wanted | str, pixels: NDArray[np.uint8]) -> Answer:
    """Probe a path, or decode into the memory; what is wrong with a file is an answer too."""
    try:
        if isinstance(question, str):
            return probe(question)
        x_CTHW = decode_clip(*question).numpy()
        pixels[: x_CTHW.size] = x_CTHW.reshape(-1)
    except (BadVideo, Unreachable) as error:
        return error
    except MemoryError:
        return BadVideo(f"takes more than {MEMORY_BYTES >> 30} GB to decode")
    except Exception as error:  # a file that confuses the library in a way not met before
        return BadVideo(f"cannot be decoded: {type(error).__name__}: {error}")
    return None
