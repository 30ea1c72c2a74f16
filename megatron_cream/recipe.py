"""YAML recipes: any flag by its name, parsed as the command line would parse it."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from megatron_cream.errors import UsageError


def recipe_path(argv: list[str]) -> Path | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        path = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise UsageError("--config: give the path of a YAML recipe") from error
    return None if path is None else Path(path)


def read_recipe(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """A flat YAML mapping of flag names to values, as defaults for `parser`.

    Raises:
        UsageError: no such file, not a mapping, an unknown key, a value of the wrong type.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: not a YAML file that can be read: {reason}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path}: must map flag names to values")
    values = {}
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        action = find_action(parser, name)
        if action is None or name in ("config", "help"):
            raise UsageError(f"--config {path}: unknown key '{key}'; --help lists every flag")
        values[action.dest] = _value(action, name, value, f"--config {path}: {key}: {value!r}")
    return values


def find_action(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    """The action of the flag `name`, or the one that sets the variable `name`."""
    flag = "--" + name.replace("_", "-")
    by_flag = parser._option_string_actions.get(flag) or parser._option_string_actions.get("--" + name)
    return by_flag or next((a for a in parser._actions if a.dest == name), None)


def _value(action: argparse.Action, name: str, value: Any, where: str) -> Any:
    """`value` as the command line would have parsed it."""
    if value is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: must be true or false")
        is_flag = any(o.lstrip("-").replace("-", "_") == name for o in action.option_strings)
        if isinstance(action, argparse.BooleanOptionalAction) or not is_flag:
            return value
        return action.const if value else not action.const

    def one(item: Any) -> Any:
        if isinstance(item, (dict, list)) or (isinstance(item, bool) and action.type is not bool):
            raise UsageError(f"{where}: must be {_kind(action)}")
        try:
            item = (action.type or str)(str(item))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{where}: must be {_kind(action)}") from error
        if action.choices is not None and item not in action.choices:
            choices = ", ".join(str(getattr(c, "name", c)) for c in action.choices)
            raise UsageError(f"{where}: choose from {choices}")
        return item

    if action.nargs in ("+", "*"):
        return [one(item) for item in (value if isinstance(value, list) else str(value).split())]
    return one(value)


def _kind(action: argparse.Action) -> str:
    one = {int: "a whole number", float: "a number"}.get(action.type, "one value")
    return f"a list of {one}s" if action.nargs in ("+", "*") else one
