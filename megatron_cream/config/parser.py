"""Flags: Megatron's and ours, with this project's defaults, from YAML recipes and the command line.

The order of authority, weakest first: Megatron's defaults, this project's, the recipe given with `--config`, the
command line.
"""

import argparse
import functools
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments, parse_args

from megatron_cream.common.errors import UsageError
from megatron_cream.config import flag_support
from megatron_cream.config.options import CreamConfig, LongEvalConfig, SaveConfig, project_defaults
from megatron_cream.config.recipe import find_action, read_recipe, recipe_path
from megatron_cream.model.attention import ATTENTION_BACKENDS

GROUPS = {"cream": CreamConfig, "long evaluation": LongEvalConfig, "after a checkpoint": SaveConfig}
"""Titles of this project's groups of flags in --help, and their flags."""


def parse_flags(argv: list[str] | None) -> Namespace:
    """The flags as they were given, recipe and command line; None takes the process's own.

    Raises:
        UsageError: an unknown flag, or a value of the wrong type.
    """
    saved, sys.argv = sys.argv, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    try:
        args = parse_args(_add_arguments)
    except RuntimeError as error:  # Megatron's own, at --enable-msc
        raise UsageError(f"--enable-msc: {error}") from error
    finally:
        sys.argv = saved
    if args.recompute_granularity == "none":
        args.recompute_granularity = args.recompute_method = args.recompute_num_layers = None
    return args


def build_parser(recipe: bool = True) -> argparse.ArgumentParser:
    """Megatron's parser with our flags and defaults, as `parse` uses it; `recipe`: and those of --config."""
    return _add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), recipe)


@functools.cache
def _default_values() -> Namespace:
    return build_parser(recipe=False).parse_args([])


def default_values() -> dict[str, Any]:
    """Return {variable: value} of a command line without flags. Megatron's 800 flags are parsed once for a process."""
    return dict(vars(_default_values()))


def _add_arguments(parser: argparse.ArgumentParser, recipe: bool = True) -> argparse.ArgumentParser:
    def one_line(message: str):
        raise UsageError(message)

    parser.error = one_line  # not Megatron's 800 flags first
    for title, options in GROUPS.items():
        ArgumentGroupFactory(options).build_group(parser, title)
    _show_first(parser, tuple(GROUPS))
    # One flag for attention: Megatron's names (all of them Transformer Engine's) and ours.
    attention = _action(parser, "attention_backend")
    attention.type, attention.choices = str, ATTENTION_BACKENDS
    # So that the command line can undo a recipe's, and this project's default.
    parser.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable", dest="dist_ckpt_optim_fully_reshardable", action="store_false",
        help="Save the distributed optimizer as it lies on the ranks: faster, in no host memory, and it resumes at "
        "the same tensor and pipeline parallelism alone.",
    )  # fmt: skip
    _action(parser, "recompute_granularity").choices = ("full", "selective", "none")
    for name in ("overlap-grad-reduce", "overlap-param-gather"):
        parser.add_argument(
            f"--no-{name}", action="store_false", dest=name.replace("-", "_"), help=f"Turn off --{name}, which is on "
            "by default on GPUs with --use-distributed-optimizer and data or context parallelism.",
        )  # fmt: skip
    _action(parser, "rotary_base").type = float  # an exported ntk scaling is no whole number
    parser.set_defaults(**project_defaults())
    for action in parser._actions:
        _mend_help(action)
        if callable(action.type) and action.type not in (str, int, float):
            action.type = functools.partial(_converted, action.type)
    flag_support.refuse_when_parsing(parser)  # by the defaults before a recipe's
    path = recipe_path(sys.argv[1:]) if recipe else None
    if path is not None:
        parser.set_defaults(**read_recipe(path, parser))
    return parser


def _action(parser: argparse.ArgumentParser, name: str) -> argparse.Action:
    """Return the action of a flag that Megatron has; without it this is another Megatron."""
    if (action := find_action(parser, name)) is None:
        raise LookupError(name)
    return action


def _show_first(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    """Let --help show these groups before Megatron's 800 flags."""
    groups = parser._action_groups
    groups.sort(key=lambda group: (group.title not in ("positional arguments", "options"), group.title not in names))


def _converted(convert: Callable[[str], Any], text: str) -> Any:
    """Some of Megatron's types raise what argparse does not expect of one."""
    try:
        return convert(text)
    except (LookupError, TypeError, AssertionError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}") from error


def _mend_help(action: argparse.Action) -> None:
    """Some of Megatron's help texts hold a bare %, on which argparse stops."""
    try:
        str((action.help or "") % vars(action))
    except (ValueError, TypeError, KeyError):
        action.help = (action.help or "").replace("%", "%%")
