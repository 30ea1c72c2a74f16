"""The argument parser of Megatron's and this project's flags, with YAML recipes.

Later sources override earlier ones: Megatron's defaults, this project's defaults, the recipe of `--config`, the
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
from megatron_cream.config.options import (
    CreamConfig,
    LongEvalConfig,
    LoraConfig,
    SaveConfig,
    ShortTextConfig,
    project_defaults,
)
from megatron_cream.config.recipe import find_action, read_recipe, recipe_path
from megatron_cream.model.attention import ATTENTION_BACKENDS

GROUPS = {
    "cream": CreamConfig,
    "LoRA": LoraConfig,
    "short texts": ShortTextConfig,
    "long evaluation": LongEvalConfig,
    "after a checkpoint": SaveConfig,
}
"""{title of a group in --help: dataclass of its flags}, for this project's flags."""


def parse_flags(argv: list[str] | None) -> Namespace:
    """Parse the command line and its recipe; `argv` None means the flags of the process.

    Raises:
        UsageError: an unknown flag, or a value of the wrong type.
    """
    saved, sys.argv = sys.argv, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    try:
        args = parse_args(_add_arguments)
    except RuntimeError as error:  # raised by Megatron for --enable-msc
        raise UsageError(f"--enable-msc: {error}") from error
    finally:
        sys.argv = saved
    if args.recompute_granularity == "none":
        args.recompute_granularity = args.recompute_method = args.recompute_num_layers = args.recompute_modules = None
    return args


def build_parser(recipe: bool = True) -> argparse.ArgumentParser:
    """Return Megatron's parser with this project's flags and defaults.

    With `recipe`, the values of the recipe in --config become defaults too.
    """
    return _add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), recipe)


_defaults: dict[str, Any] = {}


def default_values() -> dict[str, Any]:
    """Return {variable: value} for a command line without flags."""
    if not _defaults:
        build_parser(recipe=False)
    return dict(_defaults)


def _add_arguments(parser: argparse.ArgumentParser, recipe: bool = True) -> argparse.ArgumentParser:
    def raise_usage_error(message: str):
        raise UsageError(message)

    parser.error = raise_usage_error  # argparse would print the usage of 800 flags first
    for title, options in GROUPS.items():
        ArgumentGroupFactory(options).build_group(parser, title)
    _move_groups_first(parser, tuple(GROUPS))
    # One flag for all attention kernels: Megatron's names (all of Transformer Engine) and this project's.
    attention = _require_action(parser, "attention_backend")
    attention.type, attention.choices = str, ATTENTION_BACKENDS
    graphs = _require_action(parser, "cuda_graph_impl")
    graphs.help = (
        "CUDA graphs of each layer, which the host launches at once: local (Megatron's own) or none. Default: local if "
        "the planner knows the GPU, the host is the limit by its plan, and such runs were tested with graphs; else "
        "none. docs/training.md has the conditions."
    )
    # Negative flags, so that the command line can undo a recipe and this project's default.
    parser.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        dest="dist_ckpt_optim_fully_reshardable",
        action="store_false",
        help="Save the distributed optimizer as Megatron's buffers, which resume only with the same tensor and "
        "pipeline parallelism.",
    )
    _require_action(parser, "recompute_granularity").choices = ("full", "selective", "none")
    for name in ("overlap-grad-reduce", "overlap-param-gather"):
        parser.add_argument(
            f"--no-{name}",
            action="store_false",
            dest=name.replace("-", "_"),
            help=f"Turn off --{name}, which is on "
            "by default on GPUs with --use-distributed-optimizer and data or context parallelism.",
        )
    _require_action(parser, "rotary_base").type = float  # an exported ntk scaling has a fractional theta
    parser.set_defaults(**project_defaults())
    for action in parser._actions:
        _escape_help(action)
        if callable(action.type) and action.type not in (str, int, float):
            action.type = functools.partial(_convert, action.type)
    # Before the recipe, so that it compares with the real defaults.
    _defaults.update(vars(flag_support.reject_when_parsing(parser)))
    path = recipe_path(sys.argv[1:]) if recipe else None
    if path is not None:
        parser.set_defaults(**read_recipe(path, parser))
    return parser


def _require_action(parser: argparse.ArgumentParser, name: str) -> argparse.Action:
    """Return the action of a Megatron flag.

    Raises:
        LookupError: this Megatron has no such flag.
    """
    if (action := find_action(parser, name)) is None:
        raise LookupError(name)
    return action


def _move_groups_first(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    """Make --help show these groups before Megatron's 800 flags."""
    groups = parser._action_groups
    groups.sort(key=lambda group: (group.title not in ("positional arguments", "options"), group.title not in names))


def _convert(convert: Callable[[str], Any], text: str) -> Any:
    """Convert a flag's text, with argparse's error where Megatron's type raises another."""
    try:
        return convert(text)
    except (LookupError, TypeError, AssertionError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}") from error


def _escape_help(action: argparse.Action) -> None:
    """Escape a bare % in a help text; some of Megatron's have one, and argparse fails on it."""
    try:
        str((action.help or "") % vars(action))
    except (ValueError, TypeError, KeyError):
        action.help = (action.help or "").replace("%", "%%")
