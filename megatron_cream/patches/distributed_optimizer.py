"""Save and resume the distributed optimizer: torch's AdamW, float32."""

import torch

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer."

STATE_BEFORE_LOADING = Patch(
    "state-before-loading",
    _OPTIMIZER + "sharded_state_dict",
    "With torch's AdamW, Megatron reads the step count before it exists: an assertion fails.",
    parameters="self, model_sharded_state_dict, is_loading, sharding_type, metadata",
)
STEP_IS_NO_TENSOR = Patch(
    "step-is-no-tensor",
    _OPTIMIZER + "_set_main_param_and_optimizer_states",
    "With torch's AdamW, Megatron looks for a saved tensor `step`: a KeyError, or a step count of 1.",
    parameters="self, model_param, tensors",
)
OWN_STEPS = Patch(
    "own-steps",
    _OPTIMIZER + "load_state_dict",
    "With torch's AdamW, Megatron loads one step count tensor for all parameters, and each parameter increments it.",
    parameters="self, state_dict",
)
LOAD_WITHOUT_AUTOGRAD = Patch(
    "load-without-autograd",
    _OPTIMIZER + "load_parameter_state_from_dp_reshardable",
    "Megatron writes in place into parameters that require a gradient, which torch rejects.",
    parameters="self, state_dict",
)


def install() -> None:
    """Install the patches. Call before `pretrain`."""
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _resume_with_torch_adam()
    registry.install(LOAD_WITHOUT_AUTOGRAD, _load_without_autograd)


def _resume_with_torch_adam() -> None:
    """Make torch's AdamW resume where neither Transformer Engine nor apex is installed.

    Their AdamW has one step count for each parameter group. torch's AdamW has a `step` in the state of each parameter,
    which Megatron's loading code does not expect:
    - it reads the count before the state exists (an assertion fails);
    - it looks up a saved tensor for every key of the state, and a checkpoint has none for `step` (KeyError);
    - it sets the same count tensor for all parameters, so each later step would add one to it for every parameter;
    - if the state was saved with --no-dist-ckpt-optim-fully-reshardable, the count of the new state, 1, silently
      replaces the saved count.
    """
    registry.install(STATE_BEFORE_LOADING, _init_state_before_loading)
    registry.install(STEP_IS_NO_TENSOR, _drop_step)
    registry.install(OWN_STEPS, _copy_step_per_parameter)


def _init_state_before_loading(original, self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
    if is_loading and not self.optimizer.state:
        self._init_optimizer_states_with_dummy_values()
    return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)


def _drop_step(original, self, model_param, tensors):
    return original(self, model_param, {**tensors, "step": None})


def _copy_step_per_parameter(original, self, state_dict) -> None:
    original(self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = state["step"].clone()


def _load_without_autograd(original, self, *args, **kwargs):
    """Load a checkpoint of --no-dist-ckpt-optim-fully-reshardable in float32.

    In float32 the optimizer's weights are views of the model's parameters. Megatron loads its two other formats without
    autograd already.
    """
    with torch.no_grad():
        return original(self, *args, **kwargs)
