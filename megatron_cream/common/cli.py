"""What the tools' command lines have in common."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import check_path


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


def path(text: str) -> Path:
    """A type for `add_argument`: the path of a file or folder."""
    return Path(path_or_name(text))


def path_or_name(text: str) -> str:
    """A type for `add_argument`: a folder, or a model's name on the Hugging Face Hub."""
    try:
        check_path(text, "")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error
    return text


def to_flag(name: str) -> str:
    """Return the flag that sets the variable `name`."""
    return "--" + name.replace("_", "-")


def program() -> str:
    """Return the name under which this command was started, with which each of its errors begins."""
    return Path(sys.argv[0]).name
