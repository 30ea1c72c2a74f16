"""What the tools' command lines have in common."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A fault is one line that begins with the tool's name, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        tool = self.prog.split()[0]  # a subcommand's parser has its name after that
        self.exit(2, f"{tool}: error: {message}\n")


def positive(text: str) -> int:
    """A type for `add_argument`: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)
