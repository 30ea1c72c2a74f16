"""The one error that a user is meant to read."""


class UsageError(Exception):
    """What a user set cannot run. The message is the one line they read; exit code 2."""
