"""What a person can put right: bad input, said in one message."""


class InputError(Exception):
    """Input that cannot be used: the message says what, which value, which rule, what to do."""
