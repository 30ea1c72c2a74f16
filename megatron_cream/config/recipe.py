"""YAML recipes, which set any flag by its name and are parsed like the command line."""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import check_path, read_yaml

RECIPES = Path(__file__).with_name("recipes")
"""Folder of this project's recipes, which `--config llama2_7b_32k` finds from any working directory."""


def recipe_path(argv: list[str]) -> Path | None:
    """Return the file that --config names on a command line; None without --config.

    Raises:
        UsageError: --config has no value, or the path is not valid.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        given = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise UsageError("--config: give a YAML recipe") from error
    if given is None:
        return None
    check_path(given, "--config")
    return locate(given)


def locate(given: str) -> Path:
    """Return the file of a recipe: a path, or the name of a recipe of this project.

    Raises:
        UsageError: a plain name that is neither a file nor a recipe of this project.
    """
    own = RECIPES / f"{given}.yaml"
    if Path(given).exists() or Path(given).suffix or len(Path(given).parts) != 1:
        return Path(given)
    if not own.is_file():
        names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise UsageError(f"--config {given}: no such file or recipe; recipes of this project: {names}")
    return own


def read_recipe(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return {variable: value} from a flat YAML mapping of flag names, for `parser`.

    Raises:
        UsageError: no such file, not a mapping, an unknown key, a value of the wrong type.
    """
    recipe = _load(path)
    values = {}
    for key, value in recipe.items():
        name = key.replace("-", "_") if isinstance(key, str) else ""
        action = find_action(parser, name)
        if action is None or name in ("config", "help"):
            raise UsageError(f"--config {path}: unknown key {_shorten(key)}; --help lists every flag")
        if action.dest in values:
            raise UsageError(f"--config {path}: {key}: is set twice")
        values[action.dest] = _parse_value(action, name, value, f"--config {path}: {key}: {_shorten(value)}")
    return values


def _load(path: Path) -> dict[Any, Any]:
    try:
        recipe = read_yaml(path, "a YAML recipe", _PlainLoader)
    except UsageError as error:
        raise UsageError(f"--config {error}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path}: must map flag names to values")
    return recipe


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader that rejects tags for objects, aliases and duplicate keys.

    A few lines of nested aliases can expand to gigabytes.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, "aliases are not allowed in recipes", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is set twice", key.start_mark)
            seen.add(getattr(key, "value", None) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _construct_decimal(loader: _PlainLoader, node: yaml.ScalarNode) -> int | float:
    """Return a number, and reject YAML 1.1's other notations: 1:30 for 90, 010 for 8."""
    if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):
        base = 60 if ":" in node.value else 8
        problem = f"YAML reads {node.value} as a number in base {base}; write it in decimal"
        raise ConstructorError(None, None, problem, node.start_mark)
    is_integer = node.tag.endswith(":int")
    return loader.construct_yaml_int(node) if is_integer else loader.construct_yaml_float(node)


for _number_type in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_number_type}", _construct_decimal)


def _shorten(value: Any) -> str:
    """Return the value's repr in one line of at most 100 characters."""
    try:
        text = one_line(repr(value), 100)
    except ValueError:  # Python does not convert integers of more than 4300 digits to text
        return "a number of thousands of digits"
    return text if len(text) < 100 else text[:97] + "..."


def find_action(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    """Return the action of the flag `name`, or the one that sets the variable `name`."""
    flag = to_flag(name)
    by_flag = parser._option_string_actions.get(flag) or parser._option_string_actions.get("--" + name)
    return by_flag or next((a for a in parser._actions if a.dest == name), None)


def _parse_value(action: argparse.Action, name: str, value: Any, where: str) -> Any:
    """Convert a recipe's value as the command line would; `where` begins an error's message."""
    if value is None:
        if action.default is not None and (action.nargs == 0 or action.type in (int, float)):
            raise UsageError(f"{where}: must be {'true or false' if action.nargs == 0 else _describe_type(action)}")
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: must be true or false")
        is_flag = any(o.lstrip("-").replace("-", "_") == name for o in action.option_strings)
        if isinstance(action, argparse.BooleanOptionalAction) or not is_flag:
            return value
        return action.const if value else not action.const

    def parse_item(item: Any) -> Any:
        if isinstance(item, (dict, list)) or (isinstance(item, bool) and action.type is not bool):
            raise UsageError(f"{where}: must be {_describe_type(action)}")
        try:
            item = (action.type if callable(action.type) else str)(str(item))
        except (ValueError, LookupError, TypeError, ArithmeticError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"{where}: must be {_describe_type(action)}") from error
        if action.choices is not None and item not in action.choices:
            choices = ", ".join(str(getattr(c, "name", c)) for c in action.choices)
            raise UsageError(f"{where}: choose from {choices}")
        return item

    if action.nargs in ("+", "*"):
        return [parse_item(item) for item in (value if isinstance(value, list) else str(value).split())]
    return parse_item(value)


def _describe_type(action: argparse.Action) -> str:
    """Return what a flag's value must be, for an error message."""
    one, many = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}.get(
        action.type, ("one value", "values")
    )
    return f"a list of {many}" if action.nargs in ("+", "*") else one
