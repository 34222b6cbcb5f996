"""A save that goes on in a thread beside the training."""

import threading
import time
from collections.abc import Callable


class Flight:
    """A save that goes on beside the training."""

    def __init__(self, position: int, reason: str, stall_s: float, work: Callable[[], None]):
        self.position = position
        self.reason = reason
        self.stall_s = stall_s
        self.began = time.monotonic()
        self._work = work
        self._error: BaseException | None = None
        # A daemon: a process that has to end must not wait for storage that does not answer.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error  # raised where the training waits for it

    def is_over(self) -> bool:
        """Whether the save has ended on this rank."""
        return not self._thread.is_alive()

    def took(self, has_waited: bool) -> tuple[float, float]:
        """Seconds, until now: how long training stood still, and how long it went on beside this.

        All of the time, if it `has_waited` for the end.
        """
        beside = time.monotonic() - self.began
        return (self.stall_s + beside, 0.0) if has_waited else (self.stall_s, beside)

    def join(self, timeout_s: float) -> None:
        """Return when it has ended, or after so many seconds."""
        self._thread.join(timeout_s)

    def wait(self) -> None:
        """Return when it has ended; what it raised is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
