"""Megatron's optimizer step in one pass over gradients, moments and weights.

Megatron divides the gradients by the number of tokens, clips them, updates the float32 weights and copies
them to bf16 in four passes. Here the first two only compute a factor. `FusedAdamW` applies it when it
reads the gradients, and writes the bf16 weights together with the float32 weights.
"""

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_cream.optimizer.adamw import FusedAdamW
from megatron_cream.patches import hooks, registry


class _GradientFactor:
    """The deferred factor of the gradients in memory: two parts, each set once a step."""

    tokens: Tensor | None = None  # 1 / tokens of the global batch, float32 [] on the device
    clip: float = 1.0

    def reset(self) -> None:
        self.tokens, self.clip = None, 1.0

    def value(self) -> Tensor | None:
        if self.tokens is None:
            return None if self.clip == 1.0 else torch.tensor(self.clip, device="cuda")
        return self.tokens * self.clip


_factor = _GradientFactor()


def install() -> None:
    """Use FusedAdamW in Megatron, for `--optimizer adam` on CUDA devices."""
    from megatron.core import optimizer as builder

    if builder.Adam is FusedAdamW:
        return
    registry.assign(hooks.ADAM, FusedAdamW)
    registry.assign(hooks.PYTORCH_ADAM, False)
    registry.assign(hooks.APEX_OR_TE_ADAM, True)
    registry.assign(hooks.TE_ADAM, True)
    registry.install(hooks.FINALIZE_GRADIENTS, _finalize_model_grads)
    registry.install(hooks.GRADIENT_NORM, _grad_norm)
    registry.install(hooks.CLIP_GRADIENTS, _clip)
    registry.install(hooks.OPTIMIZER_UPDATE, _step)
    registry.install(hooks.OPTIMIZER_SHARDS, _register_copies)
    registry.install(hooks.COPY_WEIGHTS, _copy_unless_written)


def _finalize_model_grads(original, model, num_tokens=None, pg_collection=None, **kwargs) -> None:
    """Finalize gradients as Megatron does, but defer the division by `num_tokens`."""
    original(model, None, pg_collection=pg_collection, **kwargs)
    _factor.reset()
    if num_tokens is not None:
        _reduce_tokens(num_tokens, pg_collection)
        _factor.tokens = 1.0 / num_tokens.clamp(min=1).float().squeeze()


def _reduce_tokens(num_tokens: Tensor, pg_collection) -> None:
    """Set `num_tokens` to the tokens of the global batch, in place on every rank."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.utils import get_pp_last_rank

    if pg_collection is not None:
        pipeline, data = pg_collection.pp, pg_collection.dp_cp
    else:
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if pipeline.size() > 1:
        torch.distributed.broadcast(num_tokens, src=get_pp_last_rank(pipeline), group=pipeline)
    if data.size() > 1:
        torch.distributed.all_reduce(num_tokens, group=data)


def _grad_norm(original, grads: list[Tensor] | Tensor, norm_type: float = 2.0, grad_stats_parallel_group=None) -> float:
    """Return the 2-norm of the whole gradient per token, before clipping."""
    assert norm_type == 2.0
    grads = [grads] if isinstance(grads, Tensor) else grads
    square = torch.zeros((), dtype=torch.float32, device="cuda")
    if grads:
        square = torch.stack(torch._foreach_norm(grads)).square().sum()
    if grad_stats_parallel_group.size() > 1:
        torch.distributed.all_reduce(square, op=ReduceOp.SUM, group=grad_stats_parallel_group)
    norm = square.sqrt()
    return (norm if _factor.tokens is None else norm * _factor.tokens).item()


def _clip(original, parameters, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    assert not use_decoupled_grad
    _factor.clip = min(max_norm / (total_norm + 1e-6), 1.0)


def _step(original, self) -> bool:
    inner = [each.optimizer for each in self.chained_optimizers if isinstance(each.optimizer, FusedAdamW)]
    for optimizer in inner:
        optimizer.gradient_scale = _factor.value()
    try:
        return original(self)
    finally:
        _factor.reset()
        for optimizer in inner:
            optimizer.gradient_scale = None


def _register_copies(original, self, *args, **kwargs) -> None:
    """Let the AdamW of a distributed optimizer write the bf16 weights of its shards."""
    original(self, *args, **kwargs)
    quantized = self.ddp_config.fp8_param_gather or getattr(self.ddp_config, "fp4_param_gather", False)
    if not isinstance(self.optimizer, FusedAdamW) or quantized:
        return
    for mains, models in zip(self.shard_fp32_from_float16_groups, self.model_float16_groups):
        for main, model in zip(mains, models):
            index, _, bucket = self.model_param_gbuf_map[model]
            place = self._get_model_param_range_map(model)["gbuf_world_in_bucket"]
            buffer = self.buffers[index].buckets[bucket].param_data
            self.optimizer.copies[main] = buffer.view(-1)[place.start : place.end]


def _copy_unless_written(original, self) -> None:
    if isinstance(self.optimizer, FusedAdamW) and self.optimizer.copies_written:
        self.optimizer.copies_written = False
    else:
        original(self)
