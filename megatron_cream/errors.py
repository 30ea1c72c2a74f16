"""The one error that a user is meant to read."""


class UsageError(Exception):
    """What a user set cannot run. The message is the one line they read; exit code 2."""

    def __init__(self, message: str):
        # Names out of a damaged file may hold anything, a terminal's control codes among it.
        super().__init__("".join(c if c.isprintable() else " " for c in message))


def one_line(error: object, most: int = 300) -> str:
    """What an error of another library says, in one line of `most` characters."""
    return " ".join(str(error).split())[:most]
