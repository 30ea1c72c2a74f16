"""Weight gradients accumulated into float32 inside the GEMM, for Megatron's own linear layers.

Megatron does that with an extension of NVIDIA's apex, which has no wheel; cuBLAS does it through
torch as well.
"""

import torch
from torch import Tensor


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] (float32) += grad_output [t, out]^T inputs [t, in]."""
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    else:
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)


def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """The same, into a main_grad of the inputs' half type."""
    main_grad.addmm_(grad_output.t(), inputs)
