"""Find the fastest installed attention at a run's sizes (--attention-backend auto)."""

import contextlib
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_cream.model.attention import CORE_ATTENTIONS, AttentionBackend

MIN_FLOPS = 1e10
"""Forward operations of one layer's attention, about 20 us. With fewer the choice makes no difference."""

MAX_TOKENS = 8192
"""Longest measured sequence. One pass over 256K tokens takes seconds, and the fastest stays the same."""

MARGIN = 0.03
"""Another candidate must be faster than the first by this share, so that restarts of a run choose the same."""

_SECONDS = 0.15  # for each candidate, without compilation
_ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """Input sizes of one rank's attention.

    Queries are [tokens, samples, heads, head_dim]; keys and values have `groups` heads.
    """

    tokens: int
    samples: int
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype

    @property
    def flops(self) -> float:
        """Floating-point operations of the causal forward pass."""
        return 2.0 * self.samples * self.tokens**2 * self.heads * self.head_dim


def choose_fastest(candidates: list[AttentionBackend], shape: Shape) -> AttentionBackend:
    """Return the fastest candidate, or the first if there is little work.

    The reason of the returned candidate has the times.
    """
    if len(candidates) < 2:
        return candidates[0]
    if shape.flops < MIN_FLOPS:
        return replace(candidates[0], reason=f"{candidates[0].reason}; too little work to measure")
    shape = replace(shape, tokens=min(shape.tokens, MAX_TOKENS))
    return choose_by_times(candidates, measure(candidates, shape), shape)


def choose_by_times(
    candidates: list[AttentionBackend], times: dict[str, float | None], shape: Shape
) -> AttentionBackend:
    """Choose the first candidate, unless another is faster by MARGIN.

    Args:
        candidates: the preferred one first.
        times: {candidate's name: milliseconds of one layer's forward and backward pass, None if it failed}.
        shape: the measured sizes, for the reason.
    """
    finite = {name: math.inf if value is None else value for name, value in times.items()}
    best = min(candidates, key=lambda each: finite[each.name])
    first = candidates[0]
    chosen = first if finite[first.name] <= (1 + MARGIN) * finite[best.name] else best
    shown = ", ".join(f"{name} {'failed' if value is None else f'{value:.2f} ms'}" for name, value in times.items())
    return replace(chosen, reason=f"measured, {shape.tokens} tokens forward and backward: {shown}")


def measure(candidates: list[AttentionBackend], shape: Shape) -> dict[str, float | None]:
    """Return the milliseconds of one layer's attention, forward and backward, by name.

    None for a candidate that cannot run. Candidates are measured in turns, so that changes of the GPU clock affect all
    of them. Runs on the current device and frees its memory afterwards.
    """
    steps = {}
    for each in candidates:
        with contextlib.suppress(Exception):  # for example no kernel for this GPU, out of memory, no compiler
            step = _build_step(each, shape)
            step()
            steps[each.name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    calls = {name: max(1, int(_SECONDS * 1000 / _ROUNDS / _time_calls(step, 1))) for name, step in steps.items()}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            times[name].append(_time_calls(step, calls[name]))
    steps.clear()
    torch.cuda.empty_cache()
    return {each.name: statistics.median(times[each.name]) if each.name in times else None for each in candidates}


def _time_calls(step: Callable[[], object], calls: int) -> float:
    """Return the milliseconds of one call, as a mean over `calls`."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def _build_step(backend: AttentionBackend, shape: Shape) -> Callable[[], object]:
    """Return a function that runs one forward and backward pass on random numbers."""
    s, b, d = shape.tokens, shape.samples, shape.head_dim
    query, key, value = (
        torch.randn(s, b, heads, d, device="cuda", dtype=shape.dtype, requires_grad=True)
        for heads in (shape.heads, shape.groups, shape.groups)
    )
    attend = _build_attention(backend, shape)
    grad = torch.randn_like(query)

    def step():
        with _select_te_kernel(backend.te_kernel) if backend.name == "te" else contextlib.nullcontext():
            out = attend(query, key, value)
            return torch.autograd.grad(out, (query, key, value), grad.view(out.shape))

    return step


def _build_attention(backend: AttentionBackend, shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if backend.name == "te":
        from transformer_engine.pytorch import DotProductAttention

        return DotProductAttention(
            shape.heads,
            shape.head_dim,
            num_gqa_groups=shape.groups,
            attention_dropout=0.0,
            attn_mask_type="causal",
            qkv_format="sbhd",
        )
    module = CORE_ATTENTIONS[backend.name]
    shell = type("Shell", (), {"softmax_scale": None})()
    return lambda query, key, value: module.attend(shell, query, key, value)


@contextlib.contextmanager
def _select_te_kernel(te_kernel: str) -> Iterator[None]:
    """Select Transformer Engine's kernel by its environment variables in the context.

    Megatron sets the same variables when it builds the model.
    """
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    before = {name: os.environ.get(name) for name in names}
    if te_kernel != "auto":
        os.environ |= {name: str(int(name == f"NVTE_{te_kernel.upper()}_ATTN")) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
