"""Megatron's memory for the keys and values of texts that are read together."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_cream.evaluation.models.fp8_memory import Fp8Memory, ReadBuffer
from megatron_cream.model.llama import LlamaModel


def new_context(model: LlamaModel, batch: int, length: int, kv_cache_dtype: str = "auto") -> StaticInferenceContext:
    """Allocate zeros for the keys and values of `length` tokens of each sample.

    Uninitialized memory would not do: a masked value is multiplied by 0, and 0 times NaN is NaN.
    """
    context, buffers = StaticInferenceContext(batch, length), (ReadBuffer(), ReadBuffer())
    for layer in model.decoder.layers:
        groups, weight = layer.self_attention.num_query_groups_per_partition, layer.self_attention.linear_qkv.weight
        size = (length, batch, groups, model.config.kv_channels)
        context.key_value_memory_dict[layer.layer_number] = tuple(
            Fp8Memory.allocate(size, weight.dtype, weight.device, buffer)
            if kv_cache_dtype == "fp8"
            else torch.zeros(size, dtype=weight.dtype, device=weight.device)
            for buffer in buffers
        )
    return context


def append_at(context: StaticInferenceContext, place: Tensor) -> None:
    """Let the next tokens be written at `place`, int64 [1], and the whole memory be read.

    The caller moves `place`, and masks the rest of the memory. So each step has the same shapes and reads its place
    from the device, as a CUDA graph needs.
    """
    context.key_value_memory_dict = {
        layer: tuple(_AppendedMemory(memory, place) for memory in pair)
        for layer, pair in context.key_value_memory_dict.items()
    }


class _AppendedMemory:
    """Keys or values of one layer, which Megatron writes and reads by slices; this class ignores them."""

    def __init__(self, memory: Tensor | Fp8Memory, place: Tensor):
        self._memory, self._place = memory, place

    def size(self, dim: int) -> int:
        return self._memory.size(dim)

    def __setitem__(self, _slices: tuple, x: Tensor) -> None:
        self._memory.index_copy_(0, self._place, x)

    def __getitem__(self, _slices: tuple) -> Tensor:
        return self._memory[:]
