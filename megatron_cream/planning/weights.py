"""The weights on a rank: those of the model, the adapters of LoRA, and which of them train."""

from dataclasses import dataclass

from megatron_cream.model.lora_settings import NF4_BLOCK
from megatron_cream.planning.run import Layout, Model


@dataclass(frozen=True)
class Adapter:
    """The low-rank matrices of one projection on one tensor-parallel rank.

    A layer's query, key and value (gate and up) have one adapter each, though they share a linear.

    linear: name of the linear in `layer_weights`.
    inputs, outputs: its width on this rank.
    """

    linear: str
    inputs: int
    outputs: int


def stage_layers(model: Model, layout: Layout) -> list[int]:
    """Return the number of layers of each pipeline stage."""
    ends = {}
    if layout.pipeline > 1:
        if layout.first_stage is not None:
            ends[0] = layout.first_stage
        if layout.last_stage is not None:
            ends[layout.pipeline - 1] = layout.last_stage
    others = layout.pipeline - len(ends)
    share = (model.num_layers - sum(ends.values())) // max(others, 1)
    return [ends.get(stage, share) for stage in range(layout.pipeline)]


def layer_weights(model: Model, tensor: int) -> dict[str, int]:
    """Return the number of elements of a layer's four linears, on one tensor-parallel rank."""
    heads = model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    return {
        "qkv": model.hidden_size * (heads + 2 * groups) // tensor,
        "proj": model.hidden_size * heads // tensor,
        "fc1": model.hidden_size * 2 * model.ffn_hidden_size // tensor,
        "fc2": model.hidden_size * model.ffn_hidden_size // tensor,
    }


def parameters(model: Model, layout: Layout, stage: int) -> int:
    """Return the number of parameters on one rank of a stage.

    The first stage has the embedding, the last has the final norm and the head. A tied head on another stage than the
    embedding is a copy of it.
    """
    heads, groups = model.num_attention_heads, model.num_query_groups
    layer = sum(layer_weights(model, layout.tensor).values()) + 2 * model.hidden_size
    if model.qkv_bias:
        layer += (heads + 2 * groups) * model.kv_channels // layout.tensor
    if model.qk_norm:
        layer += 2 * model.kv_channels
    vocabulary = model.padded_vocab_size * model.hidden_size // layout.tensor
    first, last = stage == 0, stage == layout.pipeline - 1
    total = stage_layers(model, layout)[stage] * layer
    total += vocabulary if first else 0
    total += model.hidden_size if last else 0
    total += vocabulary if last and not (model.tied and first) else 0
    return total


# LoRA.


def adapters(model: Model, tensor: int) -> list[Adapter]:
    """Return the adapters of one layer on one tensor-parallel rank."""
    if model.lora is None:
        return []
    heads = model.num_attention_heads * model.kv_channels // tensor
    groups = max(model.num_query_groups * model.kv_channels // tensor, 1)
    ffn = model.ffn_hidden_size // tensor
    every = {
        "q_proj": Adapter("qkv", model.hidden_size, heads),
        "k_proj": Adapter("qkv", model.hidden_size, groups),
        "v_proj": Adapter("qkv", model.hidden_size, groups),
        "o_proj": Adapter("proj", heads, model.hidden_size),
        "gate_proj": Adapter("fc1", model.hidden_size, ffn),
        "up_proj": Adapter("fc1", model.hidden_size, ffn),
        "down_proj": Adapter("fc2", ffn, model.hidden_size),
    }
    return [every[name] for name in model.lora.targets]


def joined_adapters(model: Model, tensor: int) -> dict[str, tuple[int, int, int]]:
    """Return {linear: (rank, inputs, outputs)} of a linear's adapters as one, on one tensor-parallel rank.

    Their A are computed as one matrix, and their B as one with a block for each projection, as wide as the linear.
    """
    joined: dict[str, tuple[int, int, int]] = {}
    for adapter in adapters(model, tensor):
        rank = joined.get(adapter.linear, (0,))[0] + model.lora.rank
        outputs = layer_weights(model, tensor)[adapter.linear] // adapter.inputs
        joined[adapter.linear] = (rank, adapter.inputs, outputs)
    return joined


def adapter_parameters(model: Model, layout: Layout, stage: int) -> int:
    """Return the number of elements of the adapters on one rank of a stage."""
    if model.lora is None:
        return 0
    each = sum(adapter.inputs + adapter.outputs for adapter in adapters(model, layout.tensor))
    return stage_layers(model, layout)[stage] * model.lora.rank * each


def trained_parameters(model: Model, layout: Layout, stage: int) -> int:
    """Return the number of elements that have gradients and optimizer state, on one rank of a stage."""
    if model.lora is None:
        return parameters(model, layout, stage)
    first, last = stage == 0, stage == layout.pipeline - 1
    total = adapter_parameters(model, layout, stage)
    if model.lora.norms:
        each = 2 * model.hidden_size + (2 * model.kv_channels if model.qk_norm else 0)
        total += stage_layers(model, layout)[stage] * each + (model.hidden_size if last else 0)
    vocabulary = model.padded_vocab_size * model.hidden_size // layout.tensor
    total += vocabulary if first and trains_embedding(model) else 0
    total += vocabulary if last and trains_head(model) and not (model.tied and first) else 0
    return total


def has_nf4(model: Model) -> bool:
    """Return whether the layers' linears are in NF4."""
    return model.lora is not None and model.lora.nf4


def nf4_bytes(weights: int, element: int) -> int:
    """Return the bytes of weights in NF4: a code each, a scale for 64, and a scale of scales for 256 of those.

    The last is as wide as a number of the model, `element` bytes.
    """
    return weights // 2 + weights // NF4_BLOCK + element * (weights // (256 * NF4_BLOCK))


def trains_linears(model: Model) -> bool:
    """Return whether the layers' linears have weight gradients."""
    return model.lora is None


def trains_embedding(model: Model) -> bool:
    """Return whether the embedding has a gradient."""
    return model.lora is None or model.lora.embeddings


def trains_head(model: Model) -> bool:
    """Return whether the output layer has a weight gradient."""
    return model.lora is None or model.lora.embeddings
