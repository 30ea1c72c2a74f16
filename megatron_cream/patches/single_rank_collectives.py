"""Skip two collectives at the end of each step if the whole model is on one rank."""

import torch

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

_REASON = "At the end of each step a rank with the whole model reduces a number over itself and waits for the device."

MODEL_PARALLEL_AND = Patch(
    "single-rank-and",
    "megatron.training.training:logical_and_across_model_parallel_group",
    _REASON,
    parameters="input, group",
)
MODEL_PARALLEL_MAX = Patch(
    "single-rank-max",
    "megatron.training.training:reduce_max_stat_across_model_parallel_group",
    _REASON,
    parameters="stat, group",
)


def install() -> None:
    """Install the patches. Call before `pretrain`."""
    registry.install(MODEL_PARALLEL_AND, skip_single_rank_collectives)
    registry.install(MODEL_PARALLEL_MAX, skip_single_rank_collectives)


def skip_single_rank_collectives(original, value, group=None):
    """Return this rank's own number if the group has one rank, without a collective."""
    if group is None or group.size() > 1:
        return original(value, group=group)
    return value.item() if isinstance(value, torch.Tensor) else value
