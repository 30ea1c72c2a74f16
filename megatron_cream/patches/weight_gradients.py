"""Accumulate weight gradients in float32 inside the GEMM without apex."""

import sys

from megatron_cream.model.kernels import weight_gradient
from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

_LAYERS = "megatron.core.tensor_parallel.layers:"
_REASON = "Megatron's linear layers accumulate float32 weight gradients in the GEMM only with an extension of apex."

WEIGHT_GRADIENT_KERNELS = Patch(
    "weight-gradient-kernels", _LAYERS + "fused_weight_gradient_mlp_cuda", _REASON, value_type="missing | module"
)
WEIGHT_GRADIENTS_AVAILABLE = Patch(
    "weight-gradients-available", _LAYERS + "_grad_accum_fusion_available", _REASON, value_type="bool"
)


def install() -> None:
    """Install the patches. Call on CUDA devices before the model is built."""
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        registry.assign(WEIGHT_GRADIENT_KERNELS, weight_gradient)
        registry.assign(WEIGHT_GRADIENTS_AVAILABLE, True)
        # --defer-embedding-wgrad-compute imports the extension again, at the end of a step.
        sys.modules["fused_weight_gradient_mlp_cuda"] = weight_gradient
