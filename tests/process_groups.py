"""The process group that a model makes in a test's own process."""

import torch
from megatron.core import parallel_state


def leave_process_group() -> None:
    """Remove the process group and Megatron's groups, if there are any."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
