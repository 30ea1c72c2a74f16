"""Save the states of random generators as tensors, with CUDA graphs too."""

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import convert_cuda_rng_state

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

RNG_STATES = Patch(
    "rng-states",
    "megatron.training.checkpointing:get_rng_state",
    "With CUDA graphs Megatron saves CUDA generators, which a machine without CUDA cannot unpickle; without graphs it "
    "saves their states as tensors, and it loads both.",
    parameters="ckpt_format, tp_group, pp_group, dp_cp_group, dp_group, key_prefix",
)


def install() -> None:
    """Install the patch. Call before `pretrain`."""
    registry.install(RNG_STATES, _get_states_as_tensors)


def _get_states_as_tensors(original, *args, **kwargs):
    found = original(*args, **kwargs)
    for states in found.data if isinstance(found, ShardedObject) else ():
        tracked = states["rng_tracker_states"]
        states["rng_tracker_states"] = {name: convert_cuda_rng_state(state) for name, state in tracked.items()}
    return found
