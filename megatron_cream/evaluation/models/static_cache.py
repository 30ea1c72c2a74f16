"""Megatron's memory for the keys and values of texts that are read together."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext

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
