"""The one error type that a user's input can raise."""


class UsageError(ValueError):
    """Bad input. The message is one line: what was given, what is allowed, what to do.

    Launchers print it and exit with code 2.
    """
