"""Map Hugging Face tensors to Megatron parameters in one table.

A Megatron distributed checkpoint stacks a parameter of all layers into one global tensor
[num_layers, ...]; a `Row` describes one layer's part of it, or a tensor outside the layers.
Names and shapes are global: they do not depend on tensor or pipeline parallelism.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_cream.checkpoint.families import ModelShape

LAYERS = "decoder.layers."
# Linear layers for which Transformer Engine expects an (empty) extra state in a checkpoint.
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")

Fusion = Literal["copy", "qkv", "gate_up", "vocabulary"]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter.

    key: its name in a distributed checkpoint, and in a model with Transformer Engine's layers.
    hf: names of its Hugging Face tensors; without the prefix `model.layers.N.` for a parameter of the layers.
    fusion: how `join` combines the tensors.
    split_axis: the axis that tensor parallelism divides; None if every rank has the whole parameter.
    local_key: its name in a model with this project's layers, if different.
    """

    key: str
    hf: tuple[str, ...]
    fusion: Fusion = "copy"
    split_axis: int | None = None
    local_key: str | None = None

    @property
    def is_layered(self) -> bool:
        return self.key.startswith(LAYERS)

    def names(self, layer: int | None) -> list[str]:
        """Return the full Hugging Face names."""
        prefix = "" if layer is None else f"model.layers.{layer}."
        return [prefix + name for name in self.hf]

    def module_name(self, layer: int | None, transformer_engine: bool) -> str:
        """Return the parameter's name in the model, with its layer's number."""
        key = self.key if transformer_engine else self.local_key or self.key
        return key if layer is None else key.replace(LAYERS, f"{LAYERS}{layer}.", 1)


def rows(shape: ModelShape) -> list[Row]:
    """Return the table for this model."""
    attention, mlp = LAYERS + "self_attention.", LAYERS + "mlp."
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    table = [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary", 0),
        Row(
            attention + "linear_qkv.layer_norm_weight",
            ("input_layernorm.weight",),
            local_key=LAYERS + "input_layernorm.weight",
        ),
        Row(attention + "linear_qkv.weight", tuple(name + ".weight" for name in qkv), "qkv", 0),
    ]
    if shape.family.qkv_bias:
        table.append(Row(attention + "linear_qkv.bias", tuple(name + ".bias" for name in qkv), "qkv", 0))
    if shape.family.qk_norm:
        table.append(Row(attention + "q_layernorm.weight", ("self_attn.q_norm.weight",)))
        table.append(Row(attention + "k_layernorm.weight", ("self_attn.k_norm.weight",)))
    table += [
        Row(attention + "linear_proj.weight", ("self_attn.o_proj.weight",), split_axis=1),
        Row(
            mlp + "linear_fc1.layer_norm_weight",
            ("post_attention_layernorm.weight",),
            local_key=LAYERS + "pre_mlp_layernorm.weight",
        ),
        Row(mlp + "linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up", 0),
        Row(mlp + "linear_fc2.weight", ("mlp.down_proj.weight",), split_axis=1),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not shape.tied:
        table.append(Row("output_layer.weight", ("lm_head.weight",), "vocabulary", 0))
    return table


def list_parameters(shape: ModelShape) -> Iterator[tuple[Row, int | None]]:
    """Yield every (row, layer) of the model, in the order of the forward pass."""
    table = rows(shape)
    first_layered = next(i for i, row in enumerate(table) if row.is_layered)
    layered = [row for row in table if row.is_layered]
    yield from ((row, None) for row in table[:first_layered])
    yield from ((row, layer) for layer in range(shape.num_layers) for row in layered)
    yield from ((row, None) for row in table[first_layered:] if not row.is_layered)


def hf_shapes(row: Row, shape: ModelShape) -> list[tuple[int, ...]]:
    """Return the shapes of the row's Hugging Face tensors, in order."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    queries = shape.num_attention_heads * shape.kv_channels
    keys = shape.num_query_groups * shape.kv_channels
    sizes = {
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "q_proj.bias": (queries,),
        "k_proj.bias": (keys,),
        "v_proj.bias": (keys,),
        "q_norm.weight": (shape.kv_channels,),
        "k_norm.weight": (shape.kv_channels,),
        "o_proj.weight": (hidden, queries),
        "gate_proj.weight": (ffn, hidden),
        "up_proj.weight": (ffn, hidden),
        "down_proj.weight": (hidden, ffn),
        "embed_tokens.weight": (shape.vocab_size, hidden),
        "lm_head.weight": (shape.vocab_size, hidden),
    }
    return [sizes.get(".".join(name.split(".")[-2:]), (hidden,)) for name in row.hf]  # the others are norm weights


def megatron_shape(row: Row, shape: ModelShape, padded_vocab_size: int) -> tuple[int, ...]:
    """Return the shape of the row's Megatron parameter, for one layer."""
    parts = hf_shapes(row, shape)
    if row.fusion == "vocabulary":
        return (padded_vocab_size, shape.hidden_size)
    return (sum(part[0] for part in parts), *parts[0][1:])


def join(row: Row, tensors: list[Tensor], shape: ModelShape, out: Tensor) -> Tensor:
    """Fill the Megatron parameter `out` from its Hugging Face tensors, cast to out's dtype.

    - copy: one tensor as it is.
    - qkv: Megatron's grouped order. For each of num_query_groups, the rows of its query heads, then of
      its key head, then of its value head.
    - gate_up: the gate's rows, then the up projection's (tensor parallelism divides each of the two).
    - vocabulary: the real rows, then zeros for the padding.
    """
    match row.fusion:
        case "copy":
            out.copy_(tensors[0])
        case "qkv":
            for part, tensor in zip(_split_groups(out, shape), tensors, strict=True):
                part.copy_(tensor.view(part.shape))
        case "gate_up":
            for part, tensor in zip(out.chunk(2), tensors, strict=True):
                part.copy_(tensor)
        case "vocabulary":
            out[: shape.vocab_size].copy_(tensors[0])
            out[shape.vocab_size :].zero_()
    return out


def split(row: Row, parameter: Tensor, shape: ModelShape) -> list[Tensor]:
    """Return views of the Hugging Face tensors in a Megatron parameter; the inverse of `join`.

    Views of qkv are [num_query_groups, heads, kv_channels, ...]; `hf_shapes` has their first three axes merged.
    """
    match row.fusion:
        case "qkv":
            return list(_split_groups(parameter, shape))
        case "gate_up":
            return list(parameter.chunk(2))
        case "vocabulary":
            return [parameter[: shape.vocab_size]]
    return [parameter]


def _split_groups(qkv: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """Return views of the query, key and value rows of `qkv`.

    Each is [num_query_groups, heads, kv_channels, ...], with one head for keys and one for values.
    """
    per_group = shape.num_attention_heads // shape.num_query_groups
    grouped = qkv.view(shape.num_query_groups, per_group + 2, shape.kv_channels, *qkv.shape[1:])
    return grouped.split([per_group, 1, 1], dim=1)


def tensor_parallel_shard(row: Row, parameter: Tensor, rank: int, size: int) -> Tensor:
    """Return the part of a whole parameter that tensor-parallel rank `rank` of `size` has."""
    if row.split_axis is None:
        return parameter
    if row.fusion == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in parameter.chunk(2)])
    return parameter.chunk(size, dim=row.split_axis)[rank]


def pad_vocab_size(vocab_size: int, divisor: int) -> int:
    """Return vocab_size, rounded up to a multiple of `divisor`."""
    return -(-vocab_size // divisor) * divisor
