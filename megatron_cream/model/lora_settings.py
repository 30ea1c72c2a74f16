"""Settings of LoRA adapters, and the names of their modules, without Megatron, so that tools start fast."""

import math
from dataclasses import dataclass

LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""{Megatron's linear: the projections that it computes, in their order}."""

TARGETS = tuple(name for names in LINEARS.values() for name in names)
ROW_PARALLEL = ("linear_proj", "linear_fc2")

TRAINED = {
    "embeddings": ("word_embeddings.weight", "output_layer.weight"),
    "norms": ("norm.weight", "layer_norm_weight"),
}
"""{name in --lora-train: ends of the parameters' names}."""

NF4_BLOCK = 64
"""Frozen weights in NF4 that share a scale, as in QLoRA."""

NAME = "lora"
"""The module of a layer that has its adapters: decoder.layers.0.lora.linear_qkv.q_proj_A."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The settings of a run's adapters.

    rank: rows of A and columns of B.
    alpha: the product of B and A is multiplied by alpha / rank.
    dropout: probability of a zero in the input of A.
    targets: the projections with adapters, in the order of `TARGETS`.
    trained: what trains besides adapters: names in `TRAINED`.
    rank_stabilized: multiply by alpha / sqrt(rank) instead (Kalajdzievski 2023).
    seed: of the initial A.
    base_dtype: number format of the frozen linears: "model", as in the rest of the model, or "nf4".
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    trained: tuple[str, ...] = ("embeddings", "norms")
    rank_stabilized: bool = False
    seed: int = 0
    base_dtype: str = "model"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def is_adapter(name: str) -> bool:
    """Return whether a parameter of the model belongs to an adapter."""
    return f".{NAME}." in name
