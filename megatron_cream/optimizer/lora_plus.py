"""LoRA+ (Hayou et al. 2024): B of each adapter has a higher learning rate than A."""

from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_cream.model.lora_settings import NAME
from megatron_cream.patches import hooks, registry

_ratio = 1.0
"""Learning rate of B, divided by that of A."""


def install(ratio: float | None) -> None:
    """Set the ratio of the next run; None means equal learning rates."""
    global _ratio
    _ratio = ratio or 1.0
    registry.install(hooks.PARAMETER_GROUPS, _add_group)


def _add_group(original, config):
    overrides = original(config=config)
    if _ratio != 1.0 and config.lr is not None:  # --skip-train needs no learning rate
        rates = ParamGroupOverride(max_lr=config.lr * _ratio, min_lr=(config.min_lr or 0.0) * _ratio)
        overrides[ParamKey(name=f"*.{NAME}.*_B")] = rates
    return overrides
