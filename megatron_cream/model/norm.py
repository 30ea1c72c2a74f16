"""RMSNorm for layers without Transformer Engine."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019).

    Supports sequence parallelism: ranks see different tokens, so the weight is marked
    for Megatron's all-reduce of its gradient over the tensor-parallel group.

    Args:
        config: Megatron's config; `sequence_parallel` is read from it.
        hidden_size: length of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., hidden_size]; return the same shape and dtype."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
