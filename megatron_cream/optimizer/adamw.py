"""AdamW in one kernel: scales gradients, updates float32 weights, writes bf16 weights."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) on float32 CUDA tensors; Adam if not adam_w_mode.

    Parameter groups and state have the format of Transformer Engine's and apex's FusedAdam, so that
    Megatron uses and saves it like these: `step` is in the group, `exp_avg` and `exp_avg_sq` are in
    the state of each parameter.

    Attributes:
        gradient_scale: float32 [] on the device, by which gradients are multiplied when read, or None.
        copies: {parameter: tensor of the same size and another dtype} that also gets the new value.
        copies_written: whether the last step wrote `copies`.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, capturable=False
    ):
        if capturable:
            raise ValueError("capturable=True: not supported, because FusedAdamW counts steps on the host")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode
        self.gradient_scale: Tensor | None = None
        self.copies: dict[Tensor, Tensor] = {}
        self.copies_written = False

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            # The kernel computes sqrt(v / correction2) as sqrt(v) / sqrt(correction2).
            correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
            numbers = (
                float(group["lr"]),
                beta1,
                beta2,
                group["eps"],
                float(group["weight_decay"]),
                1 / correction1,
                1 / math.sqrt(correction2),
            )
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, numbers)
        self.copies_written = bool(self.copies)

    def _update(self, param: Tensor, numbers: tuple[float, ...]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        copy = self.copies.get(param)
        scale = self.gradient_scale
        count = param.numel()
        _adamw_kernel[(triton.cdiv(count, _BLOCK),)](
            param,
            param.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            param if copy is None else copy,
            param if scale is None else scale,
            count,
            *numbers,
            HAS_COPY=copy is not None,
            HAS_SCALE=scale is not None,
            DECOUPLED=self.adam_w_mode,
            BLOCK=_BLOCK,
            num_warps=8,
        )


@triton.jit
def _adamw_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    scale,
    count,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    factor1,
    factor2,
    HAS_COPY: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    p = tl.load(param + at, mask=mask, other=0.0)
    g = tl.load(grad + at, mask=mask, other=0.0)
    m = tl.load(exp_avg + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
    if HAS_SCALE:
        g = g * tl.load(scale)
    if not DECOUPLED:
        g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    update = m * factor1 / (tl.sqrt_rn(v) * factor2 + eps)
    if DECOUPLED:
        update = update + weight_decay * p
    p = p - lr * update
    tl.store(param + at, p, mask=mask)
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    if HAS_COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), mask=mask)
