"""Weight gradients accumulated in float32 inside the GEMM, for Megatron's linear layers.

Megatron uses an extension of NVIDIA's apex for this, which has no wheel. torch can make cuBLAS do the same.
"""

import torch
from torch import Tensor


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add grad_output [t, out]^T inputs [t, in] to main_grad [out, in] (float32)."""
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    else:
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)


def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add grad_output [t, out]^T inputs [t, in] to main_grad [out, in] of their dtype."""
    main_grad.addmm_(grad_output.t(), inputs)
