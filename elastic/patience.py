"""How long a training process may be silent before it counts as hung."""

import time
from collections.abc import Callable

# Phases in which a healthy process may be silent for long: reading, writing, measuring, compiling.
_SLOW_FACTOR = 10.0
_TRAINING = "train"
_LONGEST_FACTOR = 10.0  # against what this process has shown to be normal


class Patience:
    """Judges the silence of one training process, in whatever phase it last spoke of.

    While it trains, silence is a hang after `hang_after` seconds, or ten times the longest silence
    seen so far in training if that is more; the first update, which may compile, and all other
    phases have ten times `hang_after`, which is also the most that training gets, unless a silence
    twice as short has been normal.
    """

    def __init__(self, hang_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._hang_after = hang_after
        self._clock = clock
        self._heard_at = clock()
        self._phase = "start"
        self._position = 0
        self._longest = 0.0
        self._updates = 0

    def heard(self, phase: str, position: int) -> None:
        """A sign of life that says what comes next."""
        now = self._clock()
        if self._phase == _TRAINING:
            if self._updates > 1:
                self._longest = max(self._longest, now - self._heard_at)
            self._updates += position != self._position
        self._heard_at, self._phase, self._position = now, phase, position

    def stirred(self) -> None:
        """Any other sign of life."""
        self._heard_at = self._clock()

    @property
    def limit(self) -> float:
        """Seconds of silence that are allowed now."""
        most = self._hang_after * _SLOW_FACTOR
        if self._phase != _TRAINING or self._updates < 1:
            return most
        usual = min(self._longest * _LONGEST_FACTOR, most)
        return max(self._hang_after, usual, 2 * self._longest)

    def complaint(self) -> str | None:
        """What to say when patience is at its end; None while it is not."""
        silent = self._clock() - self._heard_at
        if silent <= self.limit:
            return None
        return (
            f"silent for {silent:.0f} s in {self._phase!r} at {self._position:,} samples "
            f"(allowed: {self.limit:.0f} s, setting hang_after)"
        )
