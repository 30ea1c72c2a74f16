"""Whether a model's weights, keys and values fit into the GPUs, before anything is loaded."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_cream.checkpoint.families import ModelShape, shape_from_config
from megatron_cream.checkpoint.mapping import list_parameters, megatron_shape
from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import read_json
from megatron_cream.evaluation.models.fp8_memory import count_bytes
from megatron_cream.evaluation.models.language_model import Source
from megatron_cream.evaluation.ranks import Ranks
from megatron_cream.model.rotary import LENGTH_DEPENDENT_TYPES

GIB = 1 << 30
_RESERVE = GIB
"""For the CUDA context and the activations of a chunk: assumed, not measured."""
_MOST_GPUS = 8


@dataclass(frozen=True)
class Need:
    """Bytes on each GPU.

    weights: of the model's part.
    keys_values: of the longest batch.
    """

    weights: int
    keys_values: int

    def fits(self, memory: int) -> bool:
        """Return whether a GPU of `memory` bytes can hold them."""
        return self.weights + self.keys_values + _RESERVE <= memory


def read_shape(source: Source) -> ModelShape | None:
    """Return the model's shape; None for a family that only transformers or vLLM knows."""
    if source.checkpoint:
        return source.checkpoint.shape
    file = source.path / "config.json"
    with contextlib.suppress(UsageError):
        return shape_from_config(read_json(file, "a model configuration in JSON"), file)
    return None


def compute_need(
    shape: ModelShape, dtype: torch.dtype, ranks: Ranks, tokens: int, batch: int, kv_cache_dtype: str = "auto"
) -> Need:
    """Return what `batch` sequences of `tokens` tokens need on each GPU.

    Under context parallelism, prompts are read one after the other.
    """
    tensor, batch = ranks.tensor, batch if ranks.context == 1 else 1
    weights = 0
    for row, _ in list_parameters(shape):
        size = torch.Size(megatron_shape(row, shape, shape.vocab_size)).numel()
        weights += size // tensor if row.split_axis is not None else size
    groups = max(shape.num_query_groups // tensor, 1)
    numbers = 2 * groups * shape.kv_channels * tokens * batch // ranks.context
    keys_values = count_bytes(shape.num_layers, numbers, shape.kv_channels, dtype, kv_cache_dtype)
    return Need(weights * dtype.itemsize, keys_values)


def check_split(source: Source, ranks: Ranks) -> None:
    """Raise UsageError if that many GPUs cannot share the model."""
    shape = read_shape(source) if ranks.replica_size > 1 else None
    if shape and not _can_split(shape, ranks.tensor):
        raise UsageError(
            f"--tensor-model-parallel-size {ranks.tensor}: the model has {shape.num_attention_heads} attention heads, "
            f"{shape.num_query_groups} key heads and {shape.ffn_hidden_size} hidden units. Use "
            f"{', '.join(str(n) for n in range(1, _MOST_GPUS + 1) if _can_split(shape, n))}."
        )
    kind = (shape.rope_scaling or {}).get("rope_type") if shape else None
    if ranks.context > 1 and kind in LENGTH_DEPENDENT_TYPES:
        raise UsageError(
            f"--context-parallel-size {ranks.context}: {kind} rope scaling depends on the whole text, which is read at "
            "once. Use --tensor-model-parallel-size."
        )
    if ranks.context > 1 and devices.has_cuda() and source.dtype == torch.float32:
        raise UsageError(f"--context-parallel-size {ranks.context}: needs --dtype bf16 or fp16 on a GPU.")


def _can_split(shape: ModelShape, tensor: int) -> bool:
    groups = shape.num_query_groups
    divides = shape.num_attention_heads % tensor == 0 and shape.ffn_hidden_size % tensor == 0
    return divides and (groups % tensor == 0 or tensor % groups == 0)


def describe_fit(source: Source, ranks: Ranks, *, tokens: int, batch: int, memory: int | None = None) -> str | None:
    """Return a line about the memory that the longest batch needs; None where that is unknown.

    Args:
        source: the model.
        ranks: the ranks, and how many share one model.
        tokens: tokens of the longest prompt and its answer together.
        batch: prompts per batch.
        memory: bytes of one GPU; None asks the GPU.

    Raises:
        UsageError: it cannot fit; the message has the flags with which it would.
    """
    shape = read_shape(source)
    if memory is None:
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if devices.has_cuda() else 0
    if not memory or shape is None or source.engine == "vllm":
        return None
    need = compute_need(shape, source.dtype, ranks, tokens, batch, source.kv_cache_dtype)
    kept = " in FP8" if source.kv_cache_dtype == "fp8" else ""
    parts = (
        f"{need.weights / GIB:.1f} GiB of weights and {need.keys_values / GIB:.1f} GiB of keys and values{kept} "
        f"({tokens:,} tokens x {batch}) on each GPU of {memory / GIB:.0f} GiB"
    )
    if need.fits(memory):
        shared, size = f"{ranks.replicas} x " if ranks.replicas > 1 else "", ranks.replica_size
        return f"{shared}{size} GPU{'s' if size > 1 else ''} a model: {parts}"
    advice = _advise(shape, source, ranks, tokens=tokens, batch=batch, memory=memory)
    raise UsageError(f"--tensor-model-parallel-size {ranks.tensor}: {parts} cannot fit. {advice}")


def _advise(shape: ModelShape, source: Source, ranks: Ranks, *, tokens: int, batch: int, memory: int) -> str:
    """Return the flags with which it fits: a smaller batch, FP8, more GPUs, or several of them."""

    def fits(layout: Ranks, prompts: int, kv_cache_dtype: str) -> bool:
        return compute_need(shape, source.dtype, layout, tokens, prompts, kv_cache_dtype).fits(memory)

    if batch > 1 and fits(ranks, 1, source.kv_cache_dtype):
        return "Use --batch-size 1."
    more = _find_layout(shape, batch, lambda layout, prompts: fits(layout, prompts, source.kv_cache_dtype))
    prompts = next((prompts for prompts in (batch, 1) if fits(ranks, prompts, "fp8")), None)
    if prompts:  # only where --kv-cache-dtype is auto: otherwise it would have fit, or a smaller batch
        one, other = " --batch-size 1" if prompts < batch else "", f", or {more}" if more else ""
        return f"Use --kv-cache-dtype fp8{one}, which halves keys and values{other}."
    if not more and (more := _find_layout(shape, batch, lambda layout, prompts: fits(layout, prompts, "fp8"))):
        more += " --kv-cache-dtype fp8, which halves keys and values"
    return f"Use {more or 'shorter lengths'}."


def _find_layout(shape: ModelShape, batch: int, fits: Callable[[Ranks, int], bool]) -> str | None:
    """Return the launch and flags of the smallest layout that fits with this batch, or else with one prompt."""
    sizes = [size for size in range(1, _MOST_GPUS + 1) if _can_split(shape, size)]
    layouts = [Ranks(0, size, size) for size in sizes]
    # The key heads may be too few for tensor parallelism alone.
    layouts += [Ranks(0, size * n, size, n) for size in sizes for n in (2, 4, 8) if size * n <= _MOST_GPUS]
    for prompts in (batch, 1):
        for layout in layouts:
            if fits(layout, prompts):
                flags = (
                    f"torchrun --nproc_per_node={layout.world_size} with --tensor-model-parallel-size {layout.tensor}"
                )
                flags += f" --context-parallel-size {layout.context}" if layout.context > 1 else ""
                return f"{flags}{' --batch-size 1' if prompts < batch else ''}"
    return None
