"""What a training process and its supervisor say to each other, over one pipe.

Neither torch nor Ray is imported here: the supervisor must start in a second, and the training
process must run without Ray.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

STOP = "stop"  # save, publish, end
SAVE = "save"  # save and go on
SETTLED = "settled"
_BEAT_EVERY_S = 0.5
_SETTLE_S = 30.0


@dataclass(frozen=True)
class Order:
    """One life of one training process: who it is, whom it meets, and what it trains."""

    rank: int
    size: int
    host: str  # where rank 0 keeps the store that the group meets at
    port: int
    job: bytes  # a pickled WorkerJob: only the training process can afford to load it
    supervisor: int  # pid
    node: int  # pid of what lives as long as this node takes part: its raylet
    use_gpu: bool = False
    num_threads: int = 1
    num_decoders: int = 1  # processes that decode videos for it
    env: dict[str, str] = field(default_factory=dict)


class Told(NamedTuple):
    """An event for the journal."""

    kind: str
    stage: str
    position: int | None
    reason: str
    more: dict[str, Any]  # the fields of Event that belong to the kind


class Measured(NamedTuple):
    """One line of metrics."""

    line: dict[str, Any]  # a Metric


class Beat(NamedTuple):
    """A sign of life: what the process is busy with, and how far it is."""

    phase: str
    position: int


class Settle(NamedTuple):
    """A wish to hear SETTLED when everything that was told before is on the disk."""


class Ended(NamedTuple):
    """The loop has left by its door: `finished` or `stopped`."""

    outcome: str


class Failed(NamedTuple):
    """The loop has raised; `kind` is the name of the class in elastic.errors, or `crash`."""

    kind: str
    message: str


class Link:
    """The training process's end of the pipe."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:  # Any: the messages above
        self._pipe = pipe
        self._heard: set[str] = set()
        self._beat_at = -_BEAT_EVERY_S
        self._phase = ""

    def send(self, message: Any) -> None:  # Any: one of the messages above
        """Tell the supervisor; OSError if it is gone, and then this process is to end as well."""
        self._pipe.send(message)

    def beat(self, phase: str, position: int) -> None:
        """Give a sign of life: at once when the phase is new, else twice a second at most."""
        now = time.monotonic()
        if phase != self._phase or now - self._beat_at >= _BEAT_EVERY_S:
            self._phase, self._beat_at = phase, now
            self._pipe.send(Beat(phase, position))

    def stop_wanted(self) -> bool:
        """Whether the supervisor has asked to save and end."""
        self._listen()
        return STOP in self._heard

    def save_wanted(self) -> bool:
        """Whether the supervisor has asked for a checkpoint since the last call."""
        self._listen()
        wanted = SAVE in self._heard
        self._heard.discard(SAVE)
        return wanted

    def settle(self) -> None:
        """Wait until what was told is on the disk, or for half a minute."""
        self.send(Settle())
        deadline = time.monotonic() + _SETTLE_S
        while SETTLED not in self._heard and time.monotonic() < deadline:
            self._listen(0.2)
        self._heard.discard(SETTLED)

    def _listen(self, wait_s: float = 0.0) -> None:
        while self._pipe.poll(wait_s):
            self._heard.add(self._pipe.recv())
            wait_s = 0.0


Tell = Callable[..., None]  # kind, stage, position, reason, and the fields of the kind
