"""silu(gate) * up of a fused projection, in one pass forward and one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor


class SwiGlu(torch.nn.Module):
    """The `activation_func` of Megatron's MLP: [..., 2 f] (gate, then up) -> [..., f].

    Runs on a CUDA device, computes in float32 and rounds once.
    """

    def __init__(self, config=None):
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return _SwiGlu.apply(gate_up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        f = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], f)
        _swiglu_forward[_grid(out)](gate_up, out, f, BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        grad = grad.contiguous()
        out = torch.empty_like(gate_up)
        _swiglu_backward[_grid(grad)](gate_up, grad, out, grad.shape[-1], BLOCK=_BLOCK)
        return out


_BLOCK = 1024


def _grid(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], triton.cdiv(x.shape[-1], _BLOCK)


@triton.jit
def _swiglu_forward(gate_up, out, f, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < f
    gate = tl.load(gate_up + row * 2 * f + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * f + f + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * f + cols, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(gate_up, grad, out, f, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < f
    gate = tl.load(gate_up + row * 2 * f + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * f + f + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * f + cols, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = g * up * s * (1 + gate * (1 - s))
    tl.store(out + row * 2 * f + cols, d_gate.to(out.dtype.element_ty), mask=mask)
    tl.store(out + row * 2 * f + f + cols, (g * gate * s).to(out.dtype.element_ty), mask=mask)
