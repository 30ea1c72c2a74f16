"""Run a function in a fresh process with Megatron and without this project's patches.

The processes are forked from one that has already imported Megatron, torch and transformers, which takes ten seconds.
On machines without a GPU they have the stand-ins for CUDA (`platform`), which correct no fault of Megatron.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_cream.patches import platform

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.upstream.small"])

SECONDS = 60
"""Time after which SIGALRM ends a hanging process: then the test fails, whatever failure it expects."""


def unpatched(function: Callable, *args):
    """Run `function(*args)` in a fresh process; return its result or raise its exception."""
    _skip_with_a_gpu()
    with ProcessPoolExecutor(1, mp_context=_context, max_tasks_per_child=1) as pool:
        return pool.submit(_run, function, args).result()


def unpatched_ranks(ranks: int, function: Callable, *args) -> list:
    """Run `function(rank, *args)` in one process per rank, and return the results in order of ranks."""
    _skip_with_a_gpu()
    with ProcessPoolExecutor(ranks, mp_context=_context, max_tasks_per_child=1) as pool:
        return [future.result() for future in [pool.submit(_run, function, (rank, *args)) for rank in range(ranks)]]


def _skip_with_a_gpu() -> None:
    """Skip the test on machines with GPUs.

    There Megatron uses other code, which does not have all of these faults, and never gloo.
    """
    if torch.cuda.is_available():
        pytest.skip("these run without a GPU")


def _run(function: Callable, args: tuple):
    signal.alarm(SECONDS)
    platform.setup()
    os.chdir(Path(__file__).parents[2])
    return function(*args)
