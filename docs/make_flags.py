"""Write docs/flags.md from the flags themselves and from megatron_cream/config/flag_support.py.

python docs/make_flags.py
"""

import argparse
import enum
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_cream.patches import platform

platform.setup()

from megatron.training.arguments import add_megatron_arguments

from megatron_cream.config import flag_support
from megatron_cream.config.parser import build_parser

HEAD = """# Flags

Every flag of `pretrain_cream.py`, this project's first and then Megatron's. Search for a name, or for what it does.
`python docs/make_flags.py` writes this page from the flags themselves, and a test keeps it up to date.

- **Tested** flags work; the column *test* names the file in `tests/` that runs them.
- **Untested** flags are passed on to Megatron; no test of this project runs them.
- **Rejected** flags end the run with one line, which gives the reason, before anything is started. Their default value
  is accepted.

A recipe (`--config`) sets any flag by its name without dashes. A default of `-` means that nothing is set, or that the
value follows from other flags. A switch has no value.

| | flags |
|---|---:|
"""
BY_DEVICE = {"bf16", "distributed_backend", "use_cpu_initialization"}
"""Flags whose default depends on whether there is a GPU."""

LONGEST = 400
"""Characters of a meaning; some of Megatron's have twenty lines."""


def page() -> str:
    """Return the text of docs/flags.md."""
    parser = build_parser(recipe=False)
    support = flag_support.sort_flags(parser)
    counts = {kind: sum(each.kind == kind for each in support.values()) for kind in ("tested", "untested", "rejected")}
    parts = [HEAD, f"| tested | {counts['tested']} |\n| untested | {counts['untested']} |\n"]
    parts.append(f"| rejected | {counts['rejected']} |\n")
    groups = [(group.title, _accepted(group._group_actions, support)) for group in parser._action_groups]
    megatrons = _names_of_megatron()
    for is_ours in (True, False):
        parts.append(f"\n## {'This project' if is_ours else 'Megatron'}\n")
        for title, actions in groups:
            if actions and _is_any_ours(actions, megatrons) == is_ours:
                parts.append(_section(title, actions, support))
    return "".join(parts) + _rejected(support)


def _accepted(actions: list[argparse.Action], support: dict[str, flag_support.Support]) -> list[argparse.Action]:
    named = [action for action in actions if action.dest != "help"]
    return [action for action in named if support[flag_support.name_of(action)].kind != "rejected"]


def _names_of_megatron() -> set[str]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return {flag_support.name_of(action) for action in parser._actions}


def _is_any_ours(actions: list[argparse.Action], megatrons: set[str]) -> bool:
    return sum(flag_support.name_of(action) not in megatrons for action in actions) > len(actions) / 2


def _section(title: str, actions: list[argparse.Action], support: dict[str, flag_support.Support]) -> str:
    lines = [f"\n### {title[0].upper()}{title[1:]}\n"]
    lines += ["| flag | value | default | meaning | test |", "|---|---|---|---|---|"]
    lines += [_row(action, support[flag_support.name_of(action)]) for action in actions]
    return "\n".join(lines) + "\n"


def _rejected(support: dict[str, flag_support.Support]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, each in support.items():
        if each.kind == "rejected":
            by_reason.setdefault(each.note, []).append(f"`--{name}`")
    lines = [f"- {reason}: {', '.join(names)}" for reason, names in sorted(by_reason.items())]
    return "\n## Rejected\n\nEach reason, and its flags.\n\n" + "\n".join(lines) + "\n"


def _row(action: argparse.Action, support: flag_support.Support) -> str:
    test = f"`{support.note}`" if support.kind == "tested" else f"untested: {_escaped(support.note)}"
    flags = ", ".join(f"`{option}`" for option in action.option_strings)
    return f"| {flags} | {_value(action)} | {_default(action)} | {_meaning(action)} | {test} |"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "switch"
    if action.choices:
        return ", ".join(f"`{_shown(choice)}`" for choice in action.choices)
    convert = action.type.args[0] if isinstance(action.type, functools.partial) and action.type.args else action.type
    kind = {int: "whole number", float: "number", None: "text", str: "text"}.get(convert, "value")
    return f"{kind}, several" if action.nargs not in (None, "?") else kind


def _default(action: argparse.Action) -> str:
    if action.dest in BY_DEVICE:
        return "by device"
    if action.nargs == 0:
        return "on" if action.default is True and action.const is True else "off"
    if action.default is None or action.default in ("", [], argparse.SUPPRESS):
        return "-"
    values = action.default if isinstance(action.default, list | tuple) else [action.default]
    return f"`{' '.join(map(_shown, values))}`"


def _shown(value: object) -> str:
    return value.name if isinstance(value, enum.Enum) else str(value)


def _meaning(action: argparse.Action) -> str:
    try:
        text = (action.help or "") % vars(action)
    except (ValueError, TypeError, KeyError):
        text = action.help
    text = " ".join(text.split())
    if any(option.startswith("--disable-") for option in action.option_strings[1:]):  # made from a field that is on
        text = f"Turn this off: {text}"
    return _escaped(text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …")


def _escaped(text: str) -> str:
    for character in "\\`*_|<[{":
        text = text.replace(character, f"\\{character}")
    return text


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(page())
