"""Save and resume Megatron's distributed optimizer with torch's AdamW, with padded buckets, and in float32."""

import torch

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer."

STATE_BEFORE_LOADING = Patch(
    "state-before-loading",
    _OPTIMIZER + "sharded_state_dict",
    "With torch's AdamW, Megatron asks for the count of steps before there is one: an assertion fails.",
    parameters="self, model_sharded_state_dict, is_loading, sharding_type, metadata",
)
STEP_IS_NO_TENSOR = Patch(
    "step-is-no-tensor",
    _OPTIMIZER + "_set_main_param_and_optimizer_states",
    "With torch's AdamW, Megatron looks for a saved tensor `step`: a KeyError, or a count of 1.",
    parameters="self, model_param, tensors",
)
OWN_STEPS = Patch(
    "own-steps",
    _OPTIMIZER + "load_state_dict",
    "With torch's AdamW, Megatron gives all parameters one tensor as their count, which each step adds to many times.",
    parameters="self, state_dict",
)
LOAD_WITHOUT_AUTOGRAD = Patch(
    "load-without-autograd",
    _OPTIMIZER + "load_parameter_state_from_dp_reshardable",
    "Megatron writes into parameters that have a gradient, which torch rejects.",
    parameters="self, state_dict",
)
UNPADDED_BUCKETS = Patch(
    "unpadded-buckets",
    _OPTIMIZER + "sharded_param_state_fully_reshardable",
    "A fully reshardable checkpoint of several buckets holds the wrong optimizer state.",
    parameters="self, model_sharded_state_dict, is_loading, metadata",
)


def install() -> None:
    """Call before `pretrain`."""
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _resume_with_torch_adam()
    registry.install(UNPADDED_BUCKETS, _save_without_padding)
    registry.install(LOAD_WITHOUT_AUTOGRAD, _load_without_autograd)


def _resume_with_torch_adam() -> None:
    """Let torch's AdamW resume, where neither Transformer Engine nor apex is installed.

    Their AdamW counts steps once for a parameter group; torch's keeps a `step` in the state of each parameter, and
    four places of the loading path do not reckon with that:
    the count is asked for before there is one (an assertion fails);
    the tensors to set are looked up by every key of the state, `step` among them, which a checkpoint does not hold
    (KeyError);
    all parameters are given the same tensor as their count, so that each later step would count once for every
    parameter;
    where the state was saved with --no-dist-ckpt-optim-fully-reshardable, a count does stand among the tensors: the
    new state's own, 1, which would silently take the saved one's place.
    """
    registry.install(STATE_BEFORE_LOADING, _make_state_first)
    registry.install(STEP_IS_NO_TENSOR, _leave_step_out)
    registry.install(OWN_STEPS, _give_each_its_step)


def _make_state_first(original, self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
    if is_loading and not self.optimizer.state:
        self._init_optimizer_states_with_dummy_values()
    return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)


def _leave_step_out(original, self, model_param, tensors):
    return original(self, model_param, {**tensors, "step": None})


def _give_each_its_step(original, self, state_dict) -> None:
    original(self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = state["step"].clone()


def _load_without_autograd(original, self, *args, **kwargs):
    """Resume from an optimizer that was saved with --no-dist-ckpt-optim-fully-reshardable in float32.

    The weights that it holds are then views of the model's own parameters. Megatron loads its two other formats
    without autograd.
    """
    with torch.no_grad():
        return original(self, *args, **kwargs)


def _save_without_padding(original, self, *args, **kwargs):
    """Save several buckets, as overlap makes them.

    Megatron joins what the ranks have without the padding at each bucket's end, and then cuts it at places that count
    the padding: every parameter behind a padded bucket gets its neighbours' moments and master weights.
    """
    padded = [buffer.param_index_map for buffer in self.buffers]
    for buffer in self.buffers:
        buffer.param_index_map = _places_without_padding(buffer)
    try:
        return original(self, *args, **kwargs)
    finally:
        for buffer, places in zip(self.buffers, padded, strict=True):
            buffer.param_index_map = places


def _places_without_padding(buffer) -> dict:
    begins, total = [], 0
    for bucket in buffer.buckets:
        begins.append(total - bucket.offset)
        total += bucket.numel_unpadded
    return {
        param: (start + begins[bucket], end + begins[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }
