"""A small model and its optimizer, made only of Megatron's parts, for the processes of `unpatched`."""

import logging
import queue

from megatron_cream.patches import platform

platform.setup()  # before Megatron is imported

import torch
import torch.utils.tensorboard
import transformers  # noqa: F401  (these two are imported once, for all processes)
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.training import training  # noqa: F401

torch.set_num_threads(1)
logging.getLogger("megatron").setLevel(logging.ERROR)

FULLY_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}
DP_RESHARDABLE = {"distrib_optim_sharding_type": "dp_reshardable"}
WEIGHTS, SIZE = 4, 100


class Model(MegatronModule):
    """A model whose weight i is filled with the number i and has the gradient i + 1."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        for i in range(WEIGHTS):
            setattr(self, f"weight{i}", torch.nn.Parameter(torch.full((SIZE,), float(i))))

    def forward(self) -> torch.Tensor:
        return sum((weight * (i + 1)).sum() for i, weight in enumerate(self.parameters()))

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        return {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in self.named_parameters()}


def start_one_rank() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    hand_over_in_process()


def hand_over_in_process() -> None:
    """Use a queue in this process, so that a save starts no process for its queue."""
    filesystem_async._results_queue = queue.Queue()


def build(
    *, steps: int, lr: float = 0.1, distributed: bool = True, bf16: bool = False, bucket_size: int | None = None
) -> tuple[Model, MegatronOptimizer]:
    """Return a model after `steps` steps, and its optimizer.

    Args:
        bucket_size: elements per bucket of the gradient buffer; None uses one bucket.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=bf16, params_dtype=dtype)
    data_parallel = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed, overlap_grad_reduce=bucket_size is not None, bucket_size=bucket_size
    )
    model = Model(config).cuda().to(dtype)
    chunk = DistributedDataParallel(config, data_parallel, model)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=0.0,
        clip_grad=0.0,
        bf16=bf16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(settings, [chunk]).chained_optimizers[0]
    for _ in range(steps):
        chunk.zero_grad_buffer()
        chunk().backward()
        chunk.finish_grad_sync()
        optimizer.step()
    return model, optimizer


def counts(optimizer: MegatronOptimizer) -> list[float]:
    """Return the number of steps that torch's Adam has counted for each parameter."""
    return [state["step"].item() for state in optimizer.optimizer.state.values()]
