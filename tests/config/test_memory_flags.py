"""Checks of the flags that save GPU memory, for machines with a GPU; bad_setting_cases.py has those of any machine."""

import pytest

from megatron_cream.common.errors import UsageError
from megatron_cream.config.checks import memory
from megatron_cream.config.parser import build_parser

OFFLOAD = "--optimizer-cpu-offload"


@pytest.mark.parametrize(
    "flags, line",
    [
        (OFFLOAD, f"{OFFLOAD}: needs --use-precision-aware-optimizer; add it"),
        (f"{OFFLOAD} --use-precision-aware-optimizer", f"{OFFLOAD}: needs --use-distributed-optimizer; add it"),
        ("--offload-modules core_attn", "--offload-modules core_attn: only with --fine-grained-activation-offloading"),
        (
            "--fine-grained-activation-offloading --offload-modules attn_proj",
            "--offload-modules attn_proj: needs core_attn",
        ),
        ("--offload-modules moe_act", "--offload-modules moe_act: choose from attn_norm"),
    ],
)
def test_each_line_names_what_is_missing(flags, line):
    args = build_parser(recipe=False).parse_args(flags.split())
    with pytest.raises(UsageError) as caught:
        memory.check_each(args, has_cuda=True)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "flags",
    [
        f"{OFFLOAD} --use-precision-aware-optimizer --use-distributed-optimizer",
        "--fine-grained-activation-offloading --offload-modules core_attn attn_proj",
        "--recompute-granularity selective --recompute-modules mlp core_attn",
        "--recompute-activations --recompute-modules mlp",
    ],
)
def test_what_the_lines_advise_is_accepted(flags):
    memory.check_each(build_parser(recipe=False).parse_args(flags.split()), has_cuda=True)
