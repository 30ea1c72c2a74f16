"""Resume without the distributed optimizer from a checkpoint that was saved with it.

If it was saved fully reshardable, this project's default, the moments have the same names and shapes as with the plain
optimizers. The master weights, the parameter groups and the step count are stored elsewhere and are moved here.
"""

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_cream.patches import hooks, registry


def install() -> None:
    """Install the replacements; call before `pretrain`."""
    registry.install(hooks.HALF_OPTIMIZER_SHARDS, _use_distributed_names)
    registry.install(hooks.HALF_OPTIMIZER_STATE, _load_half)
    registry.install(hooks.FLOAT32_OPTIMIZER_STATE, _load_float32)


def _use_distributed_names(original, self, model_sharded_state_dict, is_loading=False, metadata=None):
    state = original(self, model_sharded_state_dict, is_loading, metadata)
    if is_loading and (metadata or {}).get("distrib_optim_sharding_type"):
        for tensor in (tensor for group in state["fp32_from_fp16_params"] for tensor in group):
            tensor.key = tensor.key.replace("optimizer.state.fp32_param.", "optimizer.state.param.", 1)
    return state


def _load_half(original, self, state_dict) -> None:
    _convert_step_count(self, state_dict["optimizer"])
    original(self, state_dict)


def _load_float32(original, self, state_dict) -> None:
    if "optimizer" in state_dict:  # the distributed optimizer nests its parameter groups one level deeper
        saved = state_dict.pop("optimizer")["param_groups"]
        ours = state_dict["param_groups"]
        state_dict["param_groups"] = [{**theirs, **group} for theirs, group in zip(saved, ours, strict=True)]
        _convert_step_count(self, state_dict)
    original(self, state_dict)


def _convert_step_count(self: MegatronOptimizer, state: dict) -> None:
    """Move the step count from the parameter groups to the state, for torch's AdamW.

    The distributed optimizer saves it in each parameter group; torch's AdamW has it for each parameter.
    """
    if isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
        for group in state["param_groups"]:
            if "step" in group:
                state["state"]["common_step"] = torch.tensor(float(group.pop("step")))
