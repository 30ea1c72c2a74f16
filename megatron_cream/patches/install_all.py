"""The list of corrections of megatron-core 0.19.2, each in a file of its own.

`safe_loading` and `tensorboard` are installed earlier, while the command line is parsed.
"""

from argparse import Namespace

from megatron_cream.common import devices
from megatron_cream.patches import (
    async_writer,
    blend_cache,
    command_line,
    cuda_graphs,
    dataset_helpers,
    distributed_optimizer,
    rng_states,
    single_rank_collectives,
    tokenizers,
    tracker,
    weight_gradients,
)


def install(args: Namespace) -> None:
    """Install the corrections. Call before each `pretrain`, also in the same process."""
    command_line.install(args)
    single_rank_collectives.install()
    tracker.install()
    dataset_helpers.install()
    blend_cache.install()
    async_writer.install()
    tokenizers.install()
    cuda_graphs.install()
    rng_states.install()
    if devices.has_cuda():
        weight_gradients.install()
    distributed_optimizer.install()
