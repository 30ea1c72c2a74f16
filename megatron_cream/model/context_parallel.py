"""Causal attention over a sequence that context-parallel ranks share, for kernels that know one rank only.

Megatron's split: rank r of c holds chunks r and 2c-1-r of 2c, so that all have as much to do. Keys and values
of all ranks are gathered, and each half of the queries attends to the keys up to its own end. What is gathered
is not kept for the backward pass, which gathers it again: of 256K tokens one layer of Llama-2-7B's has 4 GiB.
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def context_parallel_attention(
    attend: Attend, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, group: ProcessGroup
) -> Tensor:
    """Compute attention of this rank's queries to all keys before them.

    Returns [s, b, n, d].

    Args:
        attend: causal attention of queries to keys, aligned at the end where there are more keys.
        query_SBND: this rank's two chunks, [s, b, n, d].
        key_SBGD: this rank's two chunks, [s, b, g, d].
        value_SBGD: this rank's two chunks, [s, b, g, d].
        group: of the context-parallel ranks; all must call this.
    """
    first, last = query_SBND.chunk(2)
    key_SBGD, value_SBGD = key_SBGD.contiguous(), value_SBGD.contiguous()
    key1, value1, key2, value2 = _Gathered.apply(key_SBGD, value_SBGD, group)
    # A layer that is computed again runs backward at once: nothing to save there.
    if key1.grad_fn is None or torch._C._current_graph_task_id() != -1:
        return torch.cat([attend(first, key1, value1), attend(last, key2, value2)])
    again = _Again(key2, value2)
    with saved_tensors_hooks(again.pack, again.unpack):
        halves = [attend(first, key1, value1), attend(last, key2, value2)]
    return torch.cat(halves)


class _Gathered(torch.autograd.Function):
    """Keys and values [s, b, g, d] -> those that this rank's first chunk of queries sees, and those its second sees.

    In the sequence's order. Gradients are summed over the ranks and shared out again.
    """

    @staticmethod
    def forward(ctx, key, value, group):
        ctx.group, ctx.again = group, None
        ctx.save_for_backward(key, value)
        end1, end2 = _ends(group, key.shape[0] // 2)
        key, value = _gather(key, group), _gather(value, group)
        return key[:end1], value[:end1], key[:end2], value[:end2]

    @staticmethod
    def backward(ctx, key1, value1, key2, value2):
        ctx.again = None
        return _scatter(key1, key2, ctx.group), _scatter(value1, value2, ctx.group), None


class _Again:
    """Stands in for the gathered tensors wherever attention would keep them."""

    def __init__(self, key: Tensor, value: Tensor):
        self._node = key.grad_fn  # the context of `_Gathered`, with this rank's part
        self._names = {tensor.untyped_storage().data_ptr(): i for i, tensor in enumerate((key, value))}

    def pack(self, tensor: Tensor):
        which = self._names.get(tensor.untyped_storage().data_ptr())
        if which is None:
            return tensor
        return which, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, packed):
        if isinstance(packed, Tensor):
            return packed
        which, *view = packed
        if self._node.again is None:
            self._node.again = [_gather(tensor, self._node.group) for tensor in self._node.saved_tensors]
        return self._node.again[which].as_strided(*view)


def _order(ranks: int) -> list[int]:
    """Where each chunk of the sequence lies among the gathered ones, which come as 0, 2c-1, 1, 2c-2, .."""
    held = [chunk for rank in range(ranks) for chunk in (rank, 2 * ranks - 1 - rank)]
    return [held.index(chunk) for chunk in range(2 * ranks)]


def _ends(group: ProcessGroup, half: int) -> tuple[int, int]:
    """Number of keys that each of this rank's chunks sees."""
    return (group.rank() + 1) * half, (2 * group.size() - group.rank()) * half


def _gather(x_SBGD: Tensor, group: ProcessGroup) -> Tensor:
    """Of all ranks, in the sequence's order, as far as this rank's queries see."""
    half = x_SBGD.shape[0] // 2
    with torch.no_grad():
        chunks = gather_from_sequence_parallel_region(x_SBGD, group=group).split(half)
        return torch.cat([chunks[i] for i in _order(group.size())[: 2 * group.size() - group.rank()]])


def _scatter(grad1: Tensor, grad2: Tensor, group: ProcessGroup) -> Tensor:
    """Gradients of both views of the gathered tensor -> that of this rank's part."""
    half = grad1.shape[0] // (group.rank() + 1)
    chunks = grad2.new_zeros(2 * group.size(), half, *grad2.shape[1:])
    order = _order(group.size())
    for i, grad in enumerate(grad2.split(half)):
        chunks[order[i]] = grad
    for i, grad in enumerate(grad1.split(half)):
        chunks[order[i]] += grad
    return reduce_scatter_to_sequence_parallel_region(chunks.flatten(0, 1), group=group)
