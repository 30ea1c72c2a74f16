"""Other faults of Megatron's trainer."""

import argparse
import sys
from argparse import Namespace

import torch
from megatron.training import ft_integration, training
from megatron.training.arguments import add_megatron_arguments

from tests.upstream import upstream_fault
from tests.upstream.small import start_one_rank
from tests.upstream.unpatched import unpatched


@upstream_fault("command-line", "`pretrain` is given its arguments, and parses sys.argv once more", raises=SystemExit)
def test_a_program_may_have_a_command_line_of_its_own():
    unpatched(_set_up_fault_tolerance)


def _set_up_fault_tolerance() -> None:
    sys.argv = ["program", "--seed", "random"]
    ft_integration.arguments.get_args = lambda: Namespace(enable_ft_package=False)
    ft_integration.setup()


@upstream_fault(
    "single-rank-and single-rank-max", "a rank sends to itself, and waits for the device, twice in each step"
)
def test_one_rank_alone_calls_no_collective():
    assert unpatched(_collectives_of_a_step) == 0


def _collectives_of_a_step() -> int:
    start_one_rank()
    calls, all_reduce = [], torch.distributed.all_reduce

    def counted(*args, **kwargs):
        calls.append(args)
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    training.logical_and_across_model_parallel_group(True, group=torch.distributed.group.WORLD)
    training.reduce_max_stat_across_model_parallel_group(1.0, group=torch.distributed.group.WORLD)
    return len(calls)


@upstream_fault("help-without-percent", "a bare % in a help text, on which argparse stops", raises=ValueError)
def test_help_is_printed():
    unpatched(_format_help)


def _format_help() -> None:
    add_megatron_arguments(argparse.ArgumentParser()).format_help()
