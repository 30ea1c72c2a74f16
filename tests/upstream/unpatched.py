"""Run a function in a fresh process that has Megatron, and none of this project's patches.

The processes are forked from one that has imported Megatron, torch and transformers already, which takes ten seconds.
The stand-ins for CUDA (`platform`) are there on machines without a GPU: they correct nothing of Megatron's.
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
"""After which a process that hangs ends by SIGALRM: then the test fails, whatever it expects of Megatron."""


def unpatched(function: Callable, *args):
    """Return what `function(*args)` returns in the process, or raise what it raises there."""
    _skip_with_a_gpu()
    with ProcessPoolExecutor(1, mp_context=_context, max_tasks_per_child=1) as pool:
        return pool.submit(_run, function, args).result()


def unpatched_ranks(ranks: int, function: Callable, *args) -> list:
    """Return what `function(rank, *args)` returns in each process; each has `torch.distributed` over gloo."""
    _skip_with_a_gpu()
    with ProcessPoolExecutor(ranks, mp_context=_context, max_tasks_per_child=1) as pool:
        return [future.result() for future in [pool.submit(_run, function, (rank, *args)) for rank in range(ranks)]]


def _skip_with_a_gpu() -> None:
    """Where there are GPUs Megatron takes other parts, which have not all of these faults, and gloo for none."""
    if torch.cuda.is_available():
        pytest.skip("these run without a GPU")


def _run(function: Callable, args: tuple):
    signal.alarm(SECONDS)
    platform.setup()
    os.chdir(Path(__file__).parents[2])
    return function(*args)
