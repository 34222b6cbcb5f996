"""Decoding in processes of their own, ahead of whoever uses the pictures.

A file can crash its decoder, keep it busy for ever, or have it take all memory. Here that costs one
process, which is started anew, and the file gets the reason. What the machine does to a decoder is
told apart from that: it says nothing about the file.
"""

import fcntl
import functools
import multiprocessing
import os
import resource
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic.data.decode import DEADLINE_S, BadVideo, Unreachable, decode_clip
from elastic.data.probe import Probe, probe
from elastic.data.segment import WHOLE, Segment

MEMORY_BYTES = 4 << 30  # more than it has at its start
_START_S = 120.0  # torch is imported first, on a machine that may be busy
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_TRIES = 3
_PAUSE_S = 1.0  # before another try where the machine ended one

Pictures = NDArray[np.uint8]  # C,T,H,W
Answer = Probe | BadVideo | Unreachable | Pictures


class Wanted(NamedTuple):
    """The arguments of `decode_clip`."""

    path: str
    frames: int
    rate: Fraction | float
    height: int
    width: int
    segment: Segment = WHOLE


Do = Callable[[Wanted | str], Answer]


class Times(NamedTuple):
    """Seconds that one question may take: of the processor, and by the clock."""

    processor: float = 2 * DEADLINE_S  # a decoder gives up itself at its deadline, between frames
    clock: float = 900.0  # a disk that stands still


class Decoders:
    """So many processes that probe and decode; results come in the order of the questions."""

    def __init__(self, num: int, do: Do | None = None, times: Times | None = None) -> None:
        self.num = num
        self._do = do or answer
        self._times = times or Times()
        self._own = threading.local()  # each thread talks to one process
        self._processes: list[_Process] = []
        self._closing = threading.Event()
        self._threads = ThreadPoolExecutor(num, thread_name_prefix="decoder")

    def decode(self, wanted: Iterable[Wanted], ahead: int) -> Iterator[Tensor | BadVideo]:
        """The pictures of each clip, uint8 C,T,H,W, or what is wrong with it.

        Up to `ahead` clips are decoded before they are asked for. Raises Unreachable for a file
        that cannot be read just now, or whose decoders the machine ends.
        """
        for found in self.answers(wanted, ahead):
            if isinstance(found, Unreachable):
                raise found
            assert not isinstance(found, Probe), "a probe was not asked for"
            yield found if isinstance(found, BadVideo) else torch.from_numpy(found)

    def probe(self, paths: Iterable[str]) -> Iterator[Probe | BadVideo | Unreachable]:
        """What is in each file, or why that is not known."""
        for found in self.answers(paths, 4 * self.num):
            assert not isinstance(found, np.ndarray), "pictures were not asked for"
            yield found

    def answers(
        self,
        questions: Iterable[Wanted | str],
        ahead: int,
        known: Mapping[Wanted | str, Answer] = MappingProxyType({}),
    ) -> Iterator[Answer]:
        """The answer to each question; up to `ahead` are asked before they are wanted.

        What is `known` when a question's turn comes is not asked again.
        """
        left = iter(questions)
        waiting: deque[Future[Answer]] = deque()
        try:
            while True:
                while len(waiting) <= ahead and (question := next(left, None)) is not None:
                    waiting.append(self._threads.submit(self._ask, question, known))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def start(self) -> None:
        """Have the processes started meanwhile, for who will ask soon."""
        for _ in range(self.num):
            self._threads.submit(lambda: self._own_process().begin())

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._closing.set()
        for process in list(self._processes):
            process.kill()
        self._threads.shutdown(cancel_futures=True)

    def _ask(self, question: Wanted | str, known: Mapping[Wanted | str, Answer]) -> Answer:
        return known[question] if question in known else self._own_process().ask(question)

    def _own_process(self) -> "_Process":
        if not hasattr(self._own, "process"):
            self._own.process = _Process(self._do, self._times, self._closing)
            self._processes.append(self._own.process)
        process: _Process = self._own.process
        return process


@functools.cache
def shared_decoders(num: int) -> Decoders:
    """Those of this process, started once and kept."""
    return Decoders(num)


class _Process:
    """One decoder; it is started when it is asked, and again when it has ended."""

    def __init__(self, do: Do, times: Times, closing: threading.Event) -> None:
        self._do = do
        self._times = times
        self._started: Any = None  # multiprocessing's process, of a type without a name
        self._connection: Connection | None = None
        self._closing = closing  # then it is not started again

    def begin(self) -> None:
        """Start it before it is asked."""
        if self._connection is None:
            self._start()

    def ask(self, question: Wanted | str) -> Answer:
        """Its answer; a process that dies is replaced, and asked again where that may help."""
        path = question if isinstance(question, str) else question.path
        why = ""
        for turn in range(_TRIES):
            if self._closing.wait(_PAUSE_S * turn) or self._closing.is_set():
                break
            connection = self._connection or self._start()
            try:
                connection.send(question)
                if connection.poll(self._times.clock):
                    return self._receive(connection)
                ended_by = None
            except (EOFError, OSError):
                ended_by = self._ended_by()
            self._end()
            if ended_by is None:
                why = f"no answer in {self._times.clock:.0f} s; does its storage stand still?"
                break
            why = f"its decoder was ended by {ended_by.name}"
            if ended_by == signal.SIGPROF:
                return BadVideo(f"took more than {self._times.processor:.0f} s of the processor")
            if ended_by in _CRASHES and turn:
                return BadVideo(f"ends its decoder by {ended_by.name}")
        return Unreachable(f"{path}: {why or 'given up'}")

    def _receive(self, connection: Connection) -> Answer:
        found: Answer | tuple[int, ...] = connection.recv()
        if not isinstance(found, tuple) or isinstance(found, Probe):
            return found
        pixels = np.empty(found, np.uint8)
        connection.recv_bytes_into(pixels.reshape(-1).data)
        return pixels

    def kill(self) -> None:
        """End it, whatever it is doing."""
        if self._started is not None:
            self._started.kill()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("forkserver")
        # Torch is imported once, for all processes that it forks.
        context.set_forkserver_preload([__name__])
        connection, far = context.Pipe()
        arguments = (far, self._do, self._times.processor, dict(os.environ))
        process = context.Process(target=_serve, args=arguments, daemon=True)
        try:
            try:
                process.start()
            finally:
                far.close()  # at once: as long as it is open here, nobody sees the other end close
            self._started, self._connection = process, connection
            if self._closing.is_set():  # whoever closes may have looked just before
                process.kill()
            if not connection.poll(_START_S):
                raise EOFError
            connection.recv()  # it is ready
        except (EOFError, OSError):
            if self._started is process:
                self._end()
            connection.close()
            code = process.exitcode if self._started is process else "none"
            raise RuntimeError(
                f"a process that decodes videos cannot be started here (exit code {code}); what it "
                "says stands above: mend it, and go on"
            ) from None
        return connection

    def _ended_by(self) -> signal.Signals:
        """The signal that ended it, or will: nobody else does while it is asked something."""
        self._started.join(timeout=5.0)
        code = self._started.exitcode
        return signal.Signals(-code) if code is not None and code < 0 else signal.SIGKILL

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._started.kill()
        # One that waits for a disk ends when that answers; nobody waits for it here.
        self._started.join(timeout=5.0)


def _serve(connection: Connection, do: Do, processor_s: float, environment: dict[str, str]) -> None:
    """Answer until the other side is gone."""
    _end_with_parent()
    os.environ.update(environment)  # of now: what it was forked from began at some other time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: whoever asks decides
    torch.set_num_threads(1)
    _limit_memory()
    connection.send("ready")
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        # By default its signal ends the process, also one that is busy inside a library.
        signal.setitimer(signal.ITIMER_PROF, processor_s)
        found = do(question)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        if isinstance(found, np.ndarray):
            connection.send(found.shape)
            connection.send_bytes(np.ascontiguousarray(found).reshape(-1).data)
        else:
            connection.send(found)


def _end_with_parent() -> None:
    """Have the kernel end this process, whatever it is busy with, when whoever asks ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by multiprocessing"
    # A pipe that is never written to: its signal, which ends a process by default, means its end.
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = own + MEMORY_BYTES
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def answer(question: Wanted | str) -> Answer:
    """Probe a path, or decode; what is wrong with a file, or hinders its reading, is an answer."""
    try:
        if isinstance(question, str):
            return probe(question)
        return decode_clip(*question).numpy()
    except (BadVideo, Unreachable) as error:
        return error
    except MemoryError:
        return _too_large()
    except OSError as error:
        path = question if isinstance(question, str) else question.path
        return Unreachable(f"{path}: {error}")
    except Exception as error:  # a file that confuses the library in a way not met before
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch's own
            return _too_large()
        return BadVideo(f"cannot be decoded: {type(error).__name__}: {str(error)[:200]}")


def _too_large() -> BadVideo:
    return BadVideo(f"takes more than {MEMORY_BYTES >> 30} GB to decode")
