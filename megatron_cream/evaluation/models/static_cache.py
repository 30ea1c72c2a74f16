"""Megatron's memory for the keys and values of texts that are read together."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_cream.model.llama import LlamaModel


def new_context(model: LlamaModel, batch: int, length: int) -> StaticInferenceContext:
    """Allocate zeros for the keys and values of `length` tokens of each sample.

    Uninitialized memory would not do: a masked value is multiplied by 0, and 0 times NaN is NaN.
    """
    context = StaticInferenceContext(batch, length)
    for layer in model.decoder.layers:
        groups, weight = layer.self_attention.num_query_groups_per_partition, layer.self_attention.linear_qkv.weight
        size = (length, batch, groups, model.config.kv_channels)
        context.key_value_memory_dict[layer.layer_number] = tuple(
            torch.zeros(size, dtype=weight.dtype, device=weight.device) for _ in range(2)
        )
    return context
