"""Copy what `--async-save` writes to the host while training goes on.

In Megatron the writer process copies the tensors from the GPU, and training waits. Here the training process copies
them on a CUDA stream of its own, to memory that it shares with the writer, and waits only before the optimizer changes
them. The copies begin with the next step, because Megatron's timers wait for the whole GPU at the end of a save.
Mapping and pinning the memory takes longer than the copies, so this is done in the first step where its size is known
then, and the memory is kept for all saves. If there is too little of it, the writer copies the tensors as in Megatron.
"""

import contextlib
import functools
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_cream.checkpoint import host_memory
from megatron_cream.patches import hooks, registry

_ALIGNMENT = 512  # bytes
_SAVED = 14  # bytes of a parameter: weight in bf16, and in float32 the weight and the optimizer's two moments


class _Place(NamedTuple):
    """Where a tensor lies in the shared memory."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class _Staged(NamedTuple):
    """What the writer gets: the shared memory, and Megatron's buckets with places instead of tensors."""

    memory: torch.Tensor
    buckets: list


@dataclass
class _Handover:
    """A save whose tensors are still to be copied, or are being copied.

    copies: the tensors and where they go.
    memory: the shared memory.
    send: sends the save to the writer.
    copied: recorded behind the copies from a GPU; None until they have been started.
    """

    copies: list[tuple[_Place, torch.Tensor]]
    memory: torch.Tensor
    send: Callable[[], None]
    copied: torch.cuda.Event | None = None


_memory: torch.Tensor | None = None
_handover: _Handover | None = None
_in_background = True
_is_waiting_before_steps = False
_free_at_start = 0  # bytes, before a rank of this host has reserved any
_reserves_in_first_step = False


def install(*, in_background: bool, in_first_step: bool) -> None:
    """Install the replacements; call before `pretrain`, after those of `saving`.

    Args:
        in_background: let training go on while tensors are copied. Otherwise it waits: a CUDA graph of the optimizer's
            step does not call what waits before a step.
        in_first_step: reserve the memory before the first step, for the weights and state of the optimizer that steps
            first; otherwise the first save does.
    """
    global _in_background, _is_waiting_before_steps, _reserves_in_first_step, _free_at_start
    _free_at_start = _find_free()
    _in_background, _reserves_in_first_step = in_background, in_first_step
    registry.install(hooks.STAGE_TENSORS, _stage)
    registry.install(hooks.SEND_BEFORE_WAITING, _send_before_waiting)
    registry.install(hooks.BEGIN_STEP, _begin_step)
    if not _is_waiting_before_steps:
        register_optimizer_step_pre_hook(_before_step)
        _is_waiting_before_steps = True


def has_memory() -> bool:
    """Tell whether the memory of the next asynchronous save is reserved."""
    return _memory is not None


# In the training process.


def _begin_step(original, *args, **kwargs):
    _begin_copies()
    return original(*args, **kwargs)


def _before_step(optimizer: torch.optim.Optimizer, *_) -> None:
    global _reserves_in_first_step
    _send()
    if _reserves_in_first_step:
        _reserves_in_first_step = False
        _reserve_for([weight for group in optimizer.param_groups for weight in group["params"]])


def _reserve_for(weights: list[torch.Tensor]) -> None:
    """Reserve memory for what this rank will save, if these weights of the optimizer are on a GPU.

    A first save that needs more reserves it then.
    """
    if _memory is None and weights and all(weight.is_cuda for weight in weights):
        count = sum(weight.numel() for weight in weights)
        # Ranks do not share the weights quite evenly, because they save whole tensors.
        _reserve(int(1.02 * _SAVED * count) + min(2 * count, 1 << 29), pinned=True)


def _stage(original, self, request) -> None:
    """Prepare the copies of a save, which the writer gets when they are made."""
    global _handover
    _send()  # requests stay in order
    if request.async_fn is None or request.preload_fn is None:
        return original(self, request)
    rank, buckets, results = request.async_fn_args
    if self.process is None:  # otherwise Megatron takes the save for a finished one until it is sent
        self.process = PersistentAsyncCaller._get_process(rank)
    tensors = [tensor for _, _, (_, in_bucket) in buckets for _, tensor in in_bucket]
    size = sum(_align(tensor.numel() * tensor.itemsize) for tensor in tensors)
    is_on_gpu = _has_gpu_tensors(tensors)
    memory = _reserve(size, pinned=is_on_gpu)
    if memory is None and 2 * _count_host_bytes(tensors) > shutil.disk_usage(host_memory.SHARED).free:
        return _write_here(request)
    if memory is None:
        return original(self, request)
    staged, copies = _place(buckets, memory)
    write = functools.partial(_write_staged, request.async_fn)
    request = request._replace(async_fn=write, async_fn_args=[rank, staged, results], preload_fn=None)
    _handover = _Handover(copies, memory, functools.partial(original, self, request))
    if not (_in_background and is_on_gpu):
        _send()


def _count_host_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if not tensor.is_cuda)


def _write_here(request) -> None:
    """Write a save in this process, since the writer gets tensors of the host through shared memory only."""
    rank, _, results = request.async_fn_args
    request.async_fn(rank, request.preload_fn(), results, **request.async_fn_kwargs)
    PersistentAsyncCaller._persistent_comp_q.put(request.call_idx)  # as the writer does when it is done


def _send_before_waiting(original, self, blocking: bool = False, no_dist: bool = False) -> bool:
    """Check whether the writer has finished, after it got what it is to write."""
    if _handover:
        is_copied = _handover.copied is not None and _handover.copied.query()
        if blocking or is_copied or not self.process.is_alive():
            _send()
    return original(self, blocking, no_dist)


def _has_gpu_tensors(tensors: list[torch.Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors)


def _begin_copies() -> None:
    """Start the copies that are prepared."""
    if _handover and _handover.copied is None:
        _handover.copied = _copy(_handover.copies, _handover.memory)


def _send() -> None:
    """Make the copies that are prepared, wait for them, and send the save to the writer."""
    global _handover
    if _handover:
        _begin_copies()
        handover, _handover = _handover, None
        if handover.copied is not None:
            handover.copied.synchronize()
        handover.send()


def _place(buckets: list, memory: torch.Tensor) -> tuple[_Staged, list[tuple[_Place, torch.Tensor]]]:
    """Return what the writer gets, and the copies that fill it."""
    placed, end = [], 0
    copies: list[tuple[_Place, torch.Tensor]] = []
    for path, name, (objects, tensors) in buckets:
        places = []
        for item, tensor in tensors:
            place = _Place(end, tensor.shape, tensor.dtype)
            places.append((item, place))
            copies.append((place, tensor))
            end += _align(_count_bytes(place))
        placed.append((path, name, (objects, places)))
    return _Staged(memory, placed), copies


def _copy(copies: list[tuple[_Place, torch.Tensor]], memory: torch.Tensor) -> torch.cuda.Event | None:
    """Copy the tensors to the shared memory; return an event if the copies are not finished."""
    stream = torch.cuda.Stream() if _has_gpu_tensors([tensor for _, tensor in copies]) else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        for place, tensor in copies:
            region = memory[place.offset :][: _count_bytes(place)]
            region.view(place.dtype).view(place.shape).copy_(tensor, non_blocking=True)
    return stream.record_event() if stream else None


def _reserve(size: int, *, pinned: bool) -> torch.Tensor | None:
    """Return shared memory of at least `size` bytes: what is reserved, if it suffices. None if there is too little."""
    global _memory
    if _memory is not None and _memory.numel() >= size:
        return _memory
    if _memory is not None and pinned:
        torch.cuda.cudart().cudaHostUnregister(_memory.data_ptr())
    _memory = None  # before the new memory is reserved
    free = _find_free()
    # All ranks of this host reserve as much, some of them before this one.
    if free < size or _free_at_start < size * host_memory.count_local_ranks():
        return _say_too_little(size, free)
    try:
        _memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    except RuntimeError:  # other processes have taken it meanwhile
        return _say_too_little(size, free)
    # If it cannot be pinned, the copies are slower.
    if pinned and int(torch.cuda.cudart().cudaHostRegister(_memory.data_ptr(), size, 0)):
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # takes the error, which the next kernel would report
    return _memory


def _find_free() -> int:
    """Return the bytes that are free in shared memory and in the host's memory."""
    return min(shutil.disk_usage(host_memory.SHARED).free, psutil.virtual_memory().available)


def _say_too_little(size: int, free: int) -> None:
    ranks = host_memory.count_local_ranks()
    print(
        f"warning: --async-save: to copy {host_memory.format_bytes(size)} for each of {ranks} local ranks takes "
        f"{host_memory.format_bytes(ranks * size)} in {host_memory.SHARED} and of the host's memory; "
        f"{host_memory.format_bytes(free)} are free. Training waits longer for this save (rank "
        f"{os.environ.get('RANK', 0)}).",
        file=sys.stderr,
        flush=True,
    )


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _count_bytes(place: _Place) -> int:
    return math.prod(place.shape) * place.dtype.itemsize


# In the writer process.


def _write_staged(write: Callable, rank: int, staged: _Staged, results) -> None:
    buckets = [
        (path, name, (objects, [(item, _view(staged.memory, place)) for item, place in places]))
        for path, name, (objects, places) in staged.buckets
    ]
    write(rank, buckets, results)


def _view(memory: torch.Tensor, place: _Place) -> torch.Tensor:
    """Return a tensor whose storage is its own bytes alone, because torch saves the whole storage of a tensor."""
    region = memory.numpy()[place.offset :][: _count_bytes(place)]
    return torch.from_numpy(region).view(place.dtype).view(place.shape)
