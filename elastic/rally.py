"""Where the supervisors of one worker group meet: training processes die, and the group lives on.

The supervisor of rank 0 keeps the rally, the others connect to it, each for as long as it lives.
Together they go through lives: everybody forks a training process, and when one of those is lost
all are ended and the next life begins, from the newest checkpoint, without a new worker group.
Only a lost supervisor, or too many losses without progress, gives the group up. No torch, no Ray.
"""

import contextlib
import logging
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Connection,
    answer_challenge,
    deliver_challenge,
    wait,
)
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

REGROUP = "Regroup"
REPEATS = ("StageBlocked", "InputError")  # errors that another life would only repeat
_MEET_S = 300.0  # the supervisors start together, some on machines that still read torch from disk
_ADMIT_S = 10
# Killing a process is quick, unless its disk or GPU hangs, or its supervisor waits for a fork host.
_CLEAR_S = 120.0
_KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4}


class Address(NamedTuple):
    """Where the rally is, and the key that it asks for; small enough to be broadcast by Ray."""

    host: str
    port: int
    key: bytes


class Begin(NamedTuple):
    """Fork a training process; the group's store listens at this port of rank 0."""

    life: int
    port: int


class Abort(NamedTuple):
    """End the training process and say Clear."""

    reason: str
    is_hang: bool


class Done(NamedTuple):
    """Everybody has finished."""


class Disband(NamedTuple):
    """The group is given up. `kind`: `Regroup`, or the class of elastic.errors that ends it all."""

    kind: str
    reason: str


class Hello(NamedTuple):
    """The first word of a member."""

    rank: int


class Over(NamedTuple):
    """A training process has ended: `finished`, `stopped`, `crashed`, `hung`, or with the name of
    an error that another try would only repeat. `died`: without a word of its own.
    """

    outcome: str
    reason: str = ""
    died: bool = False


class Clear(NamedTuple):
    """The training process is gone."""


@dataclass(frozen=True)
class Loss:
    """What the rally tells about a life that was lost."""

    life: int
    rank: int
    reason: str
    is_hang: bool


class Rally:
    """Kept by the supervisor of rank 0, in a thread of its own.

    `may_go_on(loss)` is told of every lost life, and answers whether another one is worth trying.
    """

    def __init__(self, host: str, size: int, may_go_on: Callable[[Loss], bool]) -> None:
        self._size = size
        self._host = host
        self._may_go_on = may_go_on
        self._key = secrets.token_bytes(32)
        self._door = _listen(host, size)
        self._arrivals: queue.SimpleQueue[tuple[int, Connection[Any, Any]]] = queue.SimpleQueue()
        self._members: dict[int, Connection[Any, Any]] = {}
        self._life = 0
        # The store of the coming life; the thread of rank 0 hands it to its training process.
        self.store: socket.socket | None = None
        self.address = Address(host, self._door.getsockname()[1], self._key)
        threading.Thread(target=self._run, name="rally", daemon=True).start()

    def _run(self) -> None:
        try:
            self._meet()
            end = None
            while end is None:
                end = self._live()
            self._send(end)
        except Exception as error:  # whatever it is: a rally that ends in silence hangs them all
            log.exception("the rally is over")
            self._send(Disband(REGROUP, str(error)))
        finally:
            self._close_store()

    def _close_store(self) -> None:
        if self.store is not None:
            self.store.close()

    def _meet(self) -> None:
        """Wait for every supervisor; whoever has not the key, or says nothing, holds up nobody."""
        threading.Thread(target=self._accept, name="rally door", daemon=True).start()
        deadline = time.monotonic() + _MEET_S
        try:
            while len(self._members) < self._size:
                rank, member = self._arrivals.get(timeout=max(deadline - time.monotonic(), 0))
                self._members[rank] = member
        except queue.Empty:
            num = len(self._members)
            raise TimeoutError(
                f"{num} of {self._size} supervisors came within {_MEET_S:.0f} s"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                self._door.shutdown(socket.SHUT_RDWR)  # closing alone would not wake `accept`
            self._door.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the door is shut
            while True:
                stranger, _ = self._door.accept()
                threading.Thread(target=self._admit, args=(stranger,), daemon=True).start()

    def _admit(self, stranger: socket.socket) -> None:
        _limit(stranger, _ADMIT_S)
        _keep_alive(stranger)
        connection: Connection[Any, Any] = Connection(stranger.detach())
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            rank = connection.recv().rank
        except (AuthenticationError, EOFError, OSError) as error:
            log.warning("somebody without the key knocked: %s", error)
            connection.close()
            return
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            _limit(same, 0)
        self._arrivals.put((rank, connection))

    def _live(self) -> Done | Disband | None:
        """One life; None if another one follows."""
        self._life += 1
        self._close_store()
        self.store = _listen(self._host, self._size)
        self._send(Begin(self._life, self.store.getsockname()[1]))
        outcomes: dict[int, Over] = {}
        while len(outcomes) < self._size:
            rank, word = self._hear()
            if not isinstance(word, Over):
                continue
            outcomes[rank] = word
            if word.outcome not in ("finished", "stopped"):
                return self._lost(rank, word)
        if all(over.outcome == "finished" for over in outcomes.values()):
            return Done()
        # Stopped for a resize: Ray Train ends the supervisors, so there is nothing more to hear.
        rank, word = self._hear()
        return Disband(REGROUP, f"rank {rank} said {word} after it had stopped")

    def _lost(self, rank: int, over: Over) -> Disband | None:
        self._send(Abort(f"rank {rank}: {over.reason}", over.outcome == "hung"))
        deadline = time.monotonic() + _CLEAR_S
        cleared: set[int] = set()
        while len(cleared) < self._size:
            other, word = self._hear(deadline - time.monotonic())
            if isinstance(word, Clear):
                cleared.add(other)
            elif isinstance(word, Over) and _explains(word, over):
                rank, over = other, word
        if over.outcome in REPEATS:
            return Disband(over.outcome, over.reason)
        loss = Loss(self._life, rank, over.reason, over.outcome == "hung")
        if self._may_go_on(loss):
            return None
        return Disband(REGROUP, f"rank {loss.rank}: {loss.reason}")

    def _hear(self, timeout_s: float | None = None) -> tuple[int, Any]:
        """The next word of a member; EOFError if one is gone, TimeoutError if none speaks."""
        ready = wait(list(self._members.values()), None if timeout_s is None else max(timeout_s, 0))
        if not ready:
            raise TimeoutError("a training process could not be ended")
        ranks = [rank for rank, member in self._members.items() if member is ready[0]]
        try:
            return ranks[0], self._members[ranks[0]].recv()
        except (EOFError, OSError):
            raise EOFError(f"the supervisor of rank {ranks[0]} is lost") from None

    def _send(self, word: Any) -> None:  # Any: one of the words above
        for member in self._members.values():
            try:
                member.send(word)
            except OSError:  # seen as the end of its connection by whoever reads next
                log.warning("a supervisor did not hear %s", type(word).__name__)


def _explains(word: Over, other: Over) -> bool:
    """Whether a rank's word tells more of the cause: those left behind only say that they are."""
    if other.outcome in REPEATS:
        return False
    return word.outcome in REPEATS or (word.died and not other.died)


def join(address: Address, rank: int) -> "Connection[Any, Any]":
    """Take part in the rally at `address`; closing the connection leaves it."""
    found = socket.create_connection((address.host, address.port), timeout=_ADMIT_S)
    found.settimeout(None)
    _keep_alive(found)
    member: Connection[Any, Any] = Connection(found.detach())
    answer_challenge(member, address.key)
    deliver_challenge(member, address.key)
    member.send(Hello(rank))
    return member


def _listen(host: str, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=backlog)


def _limit(connection: socket.socket, seconds: int) -> None:
    """Have the kernel end a read that takes longer; 0 for no limit."""
    limit = struct.pack("ll", seconds, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _keep_alive(connection: socket.socket) -> None:
    """Notice within half a minute that the other machine has lost its power or its network."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
