"""The line of a training that runs out of memory: where, what holds the memory, and what to do.

The figures come from torch's message, which was written when the allocation failed: until the error is reported, blocks
that unwind free tensors.
"""

import contextlib
import os
import re
import traceback
from argparse import Namespace
from dataclasses import dataclass

import torch

from megatron_cream.common import devices
from megatron_cream.common.advice import plan_command
from megatron_cream.common.errors import one_line

GIB = 1 << 30
_UNITS = {name: 1 << 10 * power for power, name in enumerate(("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))}
_SIZE = r"([\d.]+) (bytes|[KMGTPE]iB)"
_HOST = r"DefaultCPUAllocator.*tried to allocate SIZE|Unable to allocate SIZE for an array"
"""Wordings of torch and NumPy for the host's memory."""
_OF_HOST = re.compile(r"^MemoryError|DefaultCPUAllocator|Unable to allocate|can('t|not) allocate memory", re.IGNORECASE)
"""The same without a size, and the system's."""
_FROM_WORKER = "Caught "
"""The beginning of torch's message for an error of a data loader worker; the worker's traceback follows."""
_MANY = 0.1 * GIB
"""Bytes of other processes that are worth a mention."""

_PLACES = (
    ("training/watch.py", "evaluate", "in the long evaluation", "lengths"),
    ("training/evaluations.py", "evaluate", "in the evaluation at --eval-lengths", "lengths"),
    ("training/training.py", "evaluate", "in an evaluation", "activations"),
    ("optimizer/optimizer.py", "step", "in the optimizer's part of step {step}", "state"),
    ("training/checkpointing.py", "save_checkpoint", "while saving a checkpoint", "state"),
    ("training/training.py", "train_step", "in step {step}", "activations"),
    ("optimizer/__init__.py", "get_megatron_optimizer", "while building the optimizer", "state"),
    ("training/checkpointing.py", "load_checkpoint", "while loading weights", "state"),
    ("training/training.py", "setup_model_and_optimizer", "while building the model", "state"),
    ("training/training.py", "build_train_valid_test_data_iterators", "while building the data", "data"),
    ("training/initialize.py", "_initialize_tp_communicators", "while allocating user buffers", "activations"),
)
"""(end of the file, function, words, kind of memory that is too much): the frames that tell where a run was.

Weights, gradients and the optimizer's state are the same at any micro-batch. User buffers grow with it."""


@dataclass(frozen=True)
class Place:
    """Where a run was: the words for it, and the kind of memory that was too much there.

    kind: "activations", "state" (weights, gradients, optimizer), "lengths" (of evaluations), "data", or "" if unknown.
    """

    words: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Memory:
    """What holds the memory of a GPU, in bytes.

    gpu: its number on this host.
    tensors: torch's.
    unused: pieces that torch has reserved, but could not use.
    outside: of this process, outside torch.
    others: of other processes.
    """

    gpu: int
    total: int
    tensors: int
    unused: int
    outside: int
    others: int = 0


def describe(error: BaseException, rank: int) -> str:
    """Return the line of a run that ran out of memory."""
    from megatron.training import get_args

    args = None
    with contextlib.suppress(AssertionError):  # before Megatron's start
        args = get_args()
    message = str(error)
    if message.startswith(_FROM_WORKER):
        message = message.strip().splitlines()[-1]
    memory = None if _is_of_host(message) else read_message(message) or _read_gpu()
    return format_line(rank, message, memory, args, find_place(error, args), has_gpu=devices.has_cuda())


def format_line(
    rank: int, message: str, memory: Memory | None, args: Namespace | None, place: Place, *, has_gpu: bool
) -> str:
    """Return the line.

    Args:
        rank: of this process.
        message: the error's. It is quoted unless its figures are in the line.
        memory: of the GPU; None for the host's, or if it is unknown.
        args: Megatron's, if it has started.
        place: where the run was.
        has_gpu: the run has a GPU.
    """
    on_host = memory is None and (not has_gpu or _is_of_host(message))
    asked = _find_size(_HOST, message)
    parts = [f"error: rank {rank}: out of memory", *([place.words] if place.words else [])]
    if memory:
        parts.append(f"on GPU {memory.gpu}")
    elif on_host:
        parts.append("on the host")
    if message and asked is None and read_message(message) is None:
        parts.append(f"({one_line(message).rstrip('.')})")
    where = " ".join(parts)
    if memory:
        others = f", and other processes {_gib(memory.others)}" if memory.others > _MANY else ""
        where += (
            f": of {_gib(memory.total)} GiB torch has {_gib(memory.tensors)} in tensors and {_gib(memory.unused)} in "
            f"unused pieces; {_gib(memory.outside)} are outside torch (CUDA, NCCL, user buffers){others}"
        )
    elif asked is not None:
        where += f": it could not give {_gib(asked)} GiB at once"
    # Without a GPU the host's memory holds the model too.
    host_alone = on_host and (has_gpu or place.kind in ("data", ""))
    return f"{where}. {_advise_host(args, place) if host_alone else _advise(memory, args, place)}"


def _advise(memory: Memory | None, args: Namespace | None, place: Place) -> str:
    """Return what to change, by the run's own flags."""
    ranks = args.world_size if args else os.environ.get("WORLD_SIZE", 1)
    # The planner wants the size in the GPU's name, of which CUDA shows less: 79.2 of 80 GiB.
    size = ["--gpu-memory", str(-(-memory.total // GIB))] if memory and memory.total >= GIB else []
    lists = f"{plan_command(ranks, *size)} lists the layouts that fit"
    if args is not None and place.kind == "activations":
        if args.micro_batch_size > 1:
            return f"{_advise_micro_batch(args)}; {lists}"
        if not args.recompute_granularity:
            return f"Add --recompute-granularity selective --recompute-modules mlp; {lists}"
    if place.kind == "lengths":
        return f"Evaluate at smaller lengths, or use more GPUs; {lists}"
    return f"Use more GPUs or another layout: {lists}, or says how many GPUs are enough"


def _advise_micro_batch(args: Namespace) -> str:
    """Return the advice of a smaller micro-batch that leaves the global batch as it is.

    A run without --global-batch-size has one micro-batch of each rank in it.
    """
    fewer, keeps = _largest_divisor(args.micro_batch_size), ""
    if args.global_batch_size == args.micro_batch_size * args.data_parallel_size:
        keeps = f"; --global-batch-size {args.global_batch_size} keeps the batch"
    return f"Use --micro-batch-size {fewer} instead of {args.micro_batch_size}{keeps}"


def _advise_host(args: Namespace | None, place: Place) -> str:
    """Return what to change where the host's memory does not suffice for the data, or for a GPU's run."""
    ways = ["Give the job more of the host's memory"]
    if args is None or args.world_size > 1:
        ways.append("start fewer ranks on this host")
    if args is not None and args.num_workers and place.kind != "state":
        ways.append(f"use fewer --num-workers than {args.num_workers}")
    if args is not None and args.optimizer_cpu_offload:
        ways.append("leave --optimizer-cpu-offload out")
    return ", or ".join(ways)


def _largest_divisor(number: int) -> int:
    """Return the largest proper divisor: a micro-batch of that size divides the same global batch."""
    return next(each for each in range(number // 2, 0, -1) if number % each == 0)


def _is_of_host(message: str) -> bool:
    """Return whether the memory is the host's; Python's MemoryError has no message."""
    return not message or bool(_OF_HOST.search(message))


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"


def _find_size(pattern: str, message: str) -> int | None:
    """Return the bytes where `pattern` has SIZE; None if the message does not match it."""
    found = re.search(pattern.replace("SIZE", _SIZE), message)
    if not found:
        return None
    number, unit = (group for group in found.groups() if group is not None)
    return round(float(number) * _UNITS[unit])


def read_message(message: str) -> Memory | None:
    """Return what the message of torch's CUDA allocator says; None for other messages."""
    gpu = re.search(r"GPU (\d+) has a total capacity", message)
    total, free = (_find_size(text, message) for text in ("total capacity of SIZE", "of which SIZE is free"))
    tensors, unused = (
        _find_size(f"SIZE is {kind}", message) for kind in ("allocated by PyTorch", "reserved by PyTorch but")
    )
    if not gpu or total is None or free is None or tensors is None or unused is None:
        return None
    used, allowed = total - free, _find_size("SIZE allowed;", message)
    mine = _find_size("this process has SIZE memory in use", message)
    mine = used if mine is None else mine  # torch does not know it in some containers
    return Memory(
        int(gpu[1]), min(total, allowed or total), tensors, unused, max(mine - tensors - unused, 0), max(used - mine, 0)
    )


def _read_gpu() -> Memory | None:
    """Return what torch and CUDA say now; for errors of NCCL and others, whose messages have no figures."""
    if not devices.has_cuda() or not torch.cuda.is_initialized():
        return None
    with contextlib.suppress(RuntimeError):  # CUDA may have failed for good
        free, total = torch.cuda.mem_get_info()
        tensors, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        outside = max(total - free - reserved, 0)
        return Memory(torch.cuda.current_device(), total, tensors, reserved - tensors, outside)
    return None


def find_place(error: BaseException, args: Namespace | None) -> Place:
    """Return where the run was, by the innermost frame that tells it."""
    if str(error).startswith(_FROM_WORKER):
        return Place("in a data loader worker", "data")
    step = getattr(args, "curr_iteration", 0) + 1
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for file, function, words, kind in _PLACES:
            if frame.name == function and frame.filename.endswith(file):
                return Place(words.format(step=step), kind)
    return Place()
