"""Pass the parsed flags of this run to Megatron's fault tolerance code."""

from argparse import Namespace
from types import SimpleNamespace

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

COMMAND_LINE = Patch(
    "command-line",
    "megatron.training.ft_integration:arguments",
    "`pretrain` parses sys.argv again, with a parser that knows neither recipes nor this project's flags.",
    value_type="module",
)


def install(args: Namespace) -> None:
    """Install the patch. Call before each run."""
    registry.assign(COMMAND_LINE, SimpleNamespace(parse_args=lambda **_: args))
