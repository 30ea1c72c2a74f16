"""Give Megatron's fault tolerance the flags that this run has parsed."""

from argparse import Namespace
from types import SimpleNamespace

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

COMMAND_LINE = Patch(
    "command-line",
    "megatron.training.ft_integration:arguments",
    "`pretrain` parses sys.argv once more, with a parser that knows neither recipes nor this project's flags.",
    value_type="module",
)


def install(args: Namespace) -> None:
    """Call for each run."""
    registry.assign(COMMAND_LINE, SimpleNamespace(parse_args=lambda **_: args))
