"""The ranks of an evaluation under torchrun: each replica of the model answers its share of the examples.

A replica is one rank, or the ranks that split one model. Replicas exchange messages only through torchrun's store, so
a slow one does not hold up the others.
"""

import contextlib
import io
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_cream.common import devices, entry
from megatron_cream.common.errors import UsageError
from megatron_cream.distributed import launcher, rendezvous


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of the evaluation.

    rank: rank of this process.
    world_size: number of ranks.
    tensor: tensor-parallel size: ranks that split a model's weights, keys and values.
    context: context-parallel size: ranks that split keys and values further.
    """

    rank: int = 0
    world_size: int = 1
    tensor: int = 1
    context: int = 1

    @property
    def is_multi_rank(self) -> bool:
        return self.world_size > 1

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, and writes the results of all."""
        return self.rank == 0

    @property
    def replica_size(self) -> int:
        """Ranks that run one model together."""
        return self.tensor * self.context

    @property
    def replicas(self) -> int:
        return self.world_size // self.replica_size

    @property
    def replica(self) -> int:
        """Number of this rank's replica, from 0."""
        return self.rank // self.replica_size

    @property
    def is_leader(self) -> bool:
        """Whether this rank claims and records the examples of its replica."""
        return self.rank % self.replica_size == 0

    @property
    def store(self) -> torch.distributed.Store:
        store = rendezvous.open_store()
        assert store is not None, "only for several ranks"
        return store

    @property
    def replica_store(self) -> torch.distributed.Store | None:
        """A store of this replica's own, for its process group; None for a replica of one rank."""
        if self.replica_size == 1:
            return None
        return torch.distributed.PrefixStore(f"evaluation/replica/{self.replica}", self.store)


def is_multi_rank() -> bool:
    """Return whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def run(main: Callable[[], int]) -> int:
    """Return the exit code of `main()`; of several ranks only the first prints, and an error is printed once."""
    if not is_multi_rank():
        return main()
    launcher.end_with_launcher()
    try:
        rank, _ = launcher.read_environment(os.environ)
    except UsageError:  # `find_ranks` raises it again, in main
        return main()
    rendezvous.open_store()
    if rank == 0:
        code = _call(main)
        if code:
            rendezvous.confirm_printed()
        return _leave_group(code)
    words = io.StringIO()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(words):
        code = _call(main)
    if code not in (0, entry.INTERRUPTED) and (lines := words.getvalue().splitlines()):
        rendezvous.print_once(lines[-1])
    return _leave_group(code)


def _leave_group(code: int) -> int:
    """Leave the process group of a model on several ranks, and return `code`.

    After an error the process exits at once: the group's end would wait for collectives that other ranks never enter.
    """
    if _is_in_group():
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        torch.distributed.destroy_process_group()
    return code


def _is_in_group() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _call(main: Callable[[], int]) -> int:
    try:
        return main()
    except SystemExit as stop:  # raised by argparse
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # a bug
        if _is_in_group():
            traceback.print_exc(file=sys.__stderr__)
            _leave_group(1)
        raise


def find_ranks(args: Namespace) -> Ranks:
    """Return this process's place, and choose its GPU.

    Args:
        args: the command line.

    Raises:
        UsageError: the command, its engine or this machine cannot use that many ranks.
    """
    tensor, context = (getattr(args, f"{name}_parallel_size", 1) for name in ("tensor_model", "context"))
    size, sizes = tensor * context, []
    sizes += [f"--tensor-model-parallel-size {tensor}"] if tensor > 1 else []
    sizes += [f"--context-parallel-size {context}"] if context > 1 else []
    if not is_multi_rank():
        if size > 1:
            raise UsageError(
                f"{' '.join(sizes)}: needs {size} ranks. Start torchrun --nproc_per_node={size} (or a multiple)."
            )
        return Ranks()
    rank, world_size = launcher.read_environment(os.environ)
    if args.command in ("harness", "suite", "compare"):
        raise UsageError(f"{args.command}: runs in one process. Start it without torchrun.")
    if getattr(args, "engine", "auto") == "vllm":
        raise UsageError("--engine vllm: vLLM starts its own processes. Start it without torchrun.")
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise UsageError("torchrun --nnodes: an evaluation runs on one node. Use --nproc_per_node alone.")
    if devices.has_cuda():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if world_size > gpus:
            raise UsageError(f"torchrun --nproc_per_node {world_size}: this machine has {gpus} GPUs. Use at most that.")
        torch.cuda.set_device(local)
    if world_size % size:
        raise UsageError(
            f"{' '.join(sizes)}: torchrun's {world_size} ranks cannot be shared out. Use "
            f"--nproc_per_node={max(world_size // size, 1) * size}."
        )
    return Ranks(rank, world_size, tensor, context)
