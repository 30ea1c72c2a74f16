"""Argument types and the error format that all command lines share."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import check_path


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        tool = self.prog.split()[0]  # a subcommand's prog is "tool subcommand"
        self.exit(2, f"{tool}: error: {message}\n")


def positive(text: str) -> int:
    """Parse a whole number above 0; a type for `add_argument`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)


def path(text: str) -> Path:
    """Parse the path of a file or folder; a type for `add_argument`."""
    return Path(path_or_name(text))


def path_or_name(text: str) -> str:
    """Parse a folder or a model's name on the Hugging Face Hub; a type for `add_argument`."""
    try:
        check_path(text, "")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error
    return text


_OTHER_NAMES = {"microbatch_group_size_per_vp_stage": "--microbatch-group-size-per-virtual-pipeline-stage"}
"""{variable: its flag}, where the flag has other words than the variable."""


def to_flag(name: str) -> str:
    """Return the flag that sets the variable `name`."""
    return _OTHER_NAMES.get(name, "--" + name.replace("_", "-"))


def split_names(text: str) -> tuple[str, ...]:
    """Return the names in a flag's list separated by commas, without duplicates."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def format_flag(name: str, value: object) -> str:
    """Return a flag as given on the command line; a switch that is on has no value."""
    return to_flag(name) if value is True else f"{to_flag(name)} {value}"


def program_name() -> str:
    """Return the name under which this command was started; its error lines begin with it."""
    return Path(sys.argv[0]).name
