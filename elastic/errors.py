"""What a person can put right, and what another try would only repeat."""


class InputError(Exception):
    """Input that cannot be used: the message says what, which value, which rule, what to do."""


class StageBlocked(Exception):
    """A stage that would fail in the same way again: no retry, and the message says what to do."""
