"""What a person can put right, and what another try would only repeat."""


class InputError(Exception):
    """Input that cannot be used: the message says what, which value, which rule, what to do."""


class StageBlocked(Exception):
    """A stage that would fail in the same way again: no retry, and the message says what to do."""


class StageFailed(RuntimeError):
    """A stage crashed more often than it may; its state is in its last checkpoint."""


class RunStopped(Exception):
    """The driver ends because somebody has asked it to (elastic.stop)."""


def last_line(error: BaseException) -> str:
    """The last line of what an error says: tracebacks that were sent as text end with it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
