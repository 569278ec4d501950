"""The one exception for bad input, here because nothing in the kernels imports the library."""


class InputError(ValueError):
    """What the caller gave cannot be used; the message says what was wrong and what to do.

    The message is one sentence or two on one line. Commands print it as ``error: <message>`` and
    exit with code 2.
    """
