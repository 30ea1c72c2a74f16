"""`--attention-backend auto`: which of the installed attentions is fastest on this GPU, at a run's own sizes."""

import contextlib
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_cream.model.attention import CORE_ATTENTIONS, AttentionBackend

LEAST_FLOPS = 1e10
"""Of one layer's attention forward, about 20 us; of less it makes no difference."""

MOST_TOKENS = 8192
"""Measured at; one pass over 256K tokens takes seconds, and who is fastest changes no more."""

MARGIN = 0.03
"""What another must be faster by than the first: starts of the same run should choose the same."""

_SECONDS = 0.15  # for each candidate, beside compilation
_ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """What one rank's attention is given: sizes of [tokens, samples, heads, head_dim]; keys have `groups` heads."""

    tokens: int
    samples: int
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype

    @property
    def flops(self) -> float:
        """Of the causal forward pass."""
        return 2.0 * self.samples * self.tokens**2 * self.heads * self.head_dim


def fastest(candidates: list[AttentionBackend], shape: Shape) -> AttentionBackend:
    """The fastest of the candidates, with what each took as its reason; the first if it hardly matters."""
    if len(candidates) < 2:
        return candidates[0]
    if shape.flops < LEAST_FLOPS:
        return replace(candidates[0], reason=f"{candidates[0].reason}; too little work to measure")
    shape = replace(shape, tokens=min(shape.tokens, MOST_TOKENS))
    return decide(candidates, measure(candidates, shape), shape)


def decide(candidates: list[AttentionBackend], times: dict[str, float | None], shape: Shape) -> AttentionBackend:
    """Choose a candidate by the times; the first, unless another is faster by MARGIN.

    Args:
        candidates: the preferred one first.
        times: candidate's name -> milliseconds of a layer's forward and backward pass; None of one that failed.
        shape: that was measured, for the reason.
    """
    finite = {name: math.inf if value is None else value for name, value in times.items()}
    best = min(candidates, key=lambda each: finite[each.name])
    first = candidates[0]
    chosen = first if finite[first.name] <= (1 + MARGIN) * finite[best.name] else best
    said = ", ".join(f"{name} {'failed' if value is None else f'{value:.2f} ms'}" for name, value in times.items())
    return replace(chosen, reason=f"measured, {shape.tokens} tokens forward and backward: {said}")


def measure(candidates: list[AttentionBackend], shape: Shape) -> dict[str, float | None]:
    """Milliseconds of one layer's attention, forward and backward, by name; None of one that cannot run.

    In turn, so that a change of the GPU's clock meets all; on the current device, whose memory it leaves free.
    """
    steps = {}
    for each in candidates:
        with contextlib.suppress(Exception):  # of many kinds: no kernel for this GPU, no memory, no compiler
            step = _step(each, shape)
            step()
            steps[each.name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    calls = {name: max(1, int(_SECONDS * 1000 / _ROUNDS / _milliseconds(step, 1))) for name, step in steps.items()}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            times[name].append(_milliseconds(step, calls[name]))
    steps.clear()
    torch.cuda.empty_cache()
    return {each.name: statistics.median(times[each.name]) if each.name in times else None for each in candidates}


def _milliseconds(step: Callable[[], object], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def _step(backend: AttentionBackend, shape: Shape) -> Callable[[], object]:
    """One forward and backward pass on random numbers."""
    s, b, d = shape.tokens, shape.samples, shape.head_dim
    query, key, value = (
        torch.randn(s, b, heads, d, device="cuda", dtype=shape.dtype, requires_grad=True)
        for heads in (shape.heads, shape.groups, shape.groups)
    )
    attend = _function(backend, shape)
    grad = torch.randn_like(query)

    def step():
        with _chosen(backend.te_kernel) if backend.name == "te" else contextlib.nullcontext():
            out = attend(query, key, value)
            return torch.autograd.grad(out, (query, key, value), grad.view(out.shape))

    return step


def _function(backend: AttentionBackend, shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if backend.name == "te":
        from transformer_engine.pytorch import DotProductAttention

        return DotProductAttention(
            shape.heads, shape.head_dim, num_gqa_groups=shape.groups, attention_dropout=0.0,
            attn_mask_type="causal", qkv_format="sbhd",
        )  # fmt: skip
    module = CORE_ATTENTIONS[backend.name]
    shell = type("Shell", (), {"softmax_scale": None})()
    return lambda query, key, value: module.attend(shell, query, key, value)


@contextlib.contextmanager
def _chosen(te_kernel: str) -> Iterator[None]:
    """Transformer Engine's kernel by its environment variables, as Megatron will set them when it builds the model."""
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
