"""Causal attention over a sequence split over context-parallel ranks.

The kernels are those for one rank. Megatron's split: rank r of c holds chunks r and 2c-1-r of 2c, so that all ranks
have the same work. Keys and values of all ranks are gathered, and each half of the queries attends to the keys up to
its own end. The gathered tensors are not kept for the backward pass, which gathers them again: with 256K tokens they
are 4 GiB for each layer of Llama-2-7B.
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
    """Return the attention of this rank's queries to all keys before them, [s, b, n, d].

    Args:
        attend: causal attention of queries to keys, aligned at the end if there are more keys.
        query_SBND: this rank's two chunks, [s, b, n, d].
        key_SBGD: this rank's two chunks, [s, b, g, d].
        value_SBGD: this rank's two chunks, [s, b, g, d].
        group: the context-parallel process group; all its ranks must call this.
    """
    first, last = query_SBND.chunk(2)
    key_SBGD, value_SBGD = key_SBGD.contiguous(), value_SBGD.contiguous()
    key1, value1, key2, value2 = _GatherKeysValues.apply(key_SBGD, value_SBGD, group)
    # A recomputed layer runs its backward pass at once, so nothing needs to be dropped and gathered again.
    if key1.grad_fn is None or torch._C._current_graph_task_id() != -1:
        return torch.cat([attend(first, key1, value1), attend(last, key2, value2)])
    regather = _Regather(key2, value2)
    with saved_tensors_hooks(regather.pack, regather.unpack):
        halves = [attend(first, key1, value1), attend(last, key2, value2)]
    return torch.cat(halves)


class _GatherKeysValues(torch.autograd.Function):
    """This rank's keys and values [s, b, g, d] -> all that its queries attend to.

    Returns keys and values for the first chunk of queries and those for the second, in the order of the sequence. The
    backward pass reduce-scatters the gradients over the ranks.
    """

    @staticmethod
    def forward(ctx, key, value, group):
        ctx.group, ctx.gathered = group, None
        ctx.save_for_backward(key, value)
        end1, end2 = _count_visible_keys(group, key.shape[0] // 2)
        key, value = _gather(key, group), _gather(value, group)
        return key[:end1], value[:end1], key[:end2], value[:end2]

    @staticmethod
    def backward(ctx, key1, value1, key2, value2):
        ctx.gathered = None
        return _scatter(key1, key2, ctx.group), _scatter(value1, value2, ctx.group), None


class _Regather:
    """Saved-tensor hooks that regather tensors in the backward pass and keep none."""

    def __init__(self, key: Tensor, value: Tensor):
        self._node = key.grad_fn  # the context of `_GatherKeysValues`, with this rank's part
        self._indices = {tensor.untyped_storage().data_ptr(): i for i, tensor in enumerate((key, value))}

    def pack(self, tensor: Tensor):
        index = self._indices.get(tensor.untyped_storage().data_ptr())
        if index is None:
            return tensor
        return index, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, packed):
        if isinstance(packed, Tensor):
            return packed
        index, *view = packed
        if self._node.gathered is None:
            self._node.gathered = [_gather(tensor, self._node.group) for tensor in self._node.saved_tensors]
        return self._node.gathered[index].as_strided(*view)


def _find_chunk_order(ranks: int) -> list[int]:
    """Return where each chunk of the sequence is among the gathered 0, 2c-1, 1, 2c-2, ..."""
    gathered = [chunk for rank in range(ranks) for chunk in (rank, 2 * ranks - 1 - rank)]
    return [gathered.index(chunk) for chunk in range(2 * ranks)]


def _count_visible_keys(group: ProcessGroup, half: int) -> tuple[int, int]:
    """Return the number of keys for each of this rank's two chunks of `half` queries."""
    return (group.rank() + 1) * half, (2 * group.size() - group.rank()) * half


def _gather(x_SBGD: Tensor, group: ProcessGroup) -> Tensor:
    """Gather from all ranks in sequence order, up to the end of this rank's last query."""
    half = x_SBGD.shape[0] // 2
    with torch.no_grad():
        chunks = gather_from_sequence_parallel_region(x_SBGD, group=group).split(half)
        return torch.cat([chunks[i] for i in _find_chunk_order(group.size())[: 2 * group.size() - group.rank()]])


def _scatter(grad1: Tensor, grad2: Tensor, group: ProcessGroup) -> Tensor:
    """Return the gradient of this rank's part from those of both gathered views."""
    half = grad1.shape[0] // (group.rank() + 1)
    chunks = grad2.new_zeros(2 * group.size(), half, *grad2.shape[1:])
    order = _find_chunk_order(group.size())
    for i, grad in enumerate(grad2.split(half)):
        chunks[order[i]] = grad
    for i, grad in enumerate(grad1.split(half)):
        chunks[order[i]] += grad
    return reduce_scatter_to_sequence_parallel_region(chunks.flatten(0, 1), group=group)
