"""The exception for bad input."""


class UsageError(ValueError):
    """Bad input. The message is one line: what was given, what is allowed, what to do.

    Launchers print it and exit with code 2.
    """
