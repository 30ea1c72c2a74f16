"""Frozen linears with weights in NF4, which takes 4 bits and a shared scale for each weight.

NF4 and its quantized scales are of QLoRA (Dettmers et al. 2023). torchao packs and unpacks; on a GPU with Triton a
kernel of this project unpacks.
"""

import math
from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_cream.model.kernels import support
from megatron_cream.model.lora_settings import NF4_BLOCK


class Nf4Weight(nn.Module):
    """A frozen weight in NF4, in the place of a linear's parameter.

    It is no parameter, so it has no gradient, no optimizer state and no entry in checkpoints. Each product, of the
    forward and of the backward pass, unpacks it again.

    Args:
        weight: the weight to pack.
    """

    requires_grad = False

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.copy_(weight)

    def copy_(self, weight: Tensor) -> None:
        """Replace the weight."""
        from torchao.quantization import to_nf4  # optional, and its import takes two seconds

        weight = weight.detach().to(device=self.device, dtype=self.dtype).contiguous()
        blocks = weight.numel() // NF4_BLOCK
        self.packed = to_nf4(weight, NF4_BLOCK, math.gcd(blocks, 256))

    def unpack(self) -> Tensor:
        """Return the weight that the products use."""
        if support.can_use_kernels(self.packed.quantized_data):
            from megatron_cream.model.kernels import nf4

            return nf4.unpack(self.packed)
        return self.packed.get_original_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Nf4Weight":
        """Move to another device. The dtype stays: Megatron casts the whole model to bf16."""
        self.device = fn(self.packed.quantized_data).device
        self.packed = self.packed.to(self.device)
        return self


class _Nf4Linear:
    """A parallel linear of Megatron that packs its weight when it is built."""

    weight: Nf4Weight

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        packed = Nf4Weight(self.weight)
        del self.weight  # a parameter, which torch does not let a module replace
        self.weight = packed

    def _forward_impl(
        self,
        input: Tensor,
        weight: Nf4Weight,
        bias: Tensor | None,
        *,
        allreduce_dgrad,
        sequence_parallel,
        tp_group,
        **_,
    ) -> Tensor:
        """Do what Megatron's `linear_with_frozen_weight` does, without keeping the unpacked weight."""
        if sequence_parallel:
            input = tensor_parallel.gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = _Product.apply(input, weight)
        return output if bias is None else output + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Nf4Weight) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight.unpack())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.unpack(), None


class Nf4ColumnParallelLinear(_Nf4Linear, tensor_parallel.ColumnParallelLinear):
    """ColumnParallelLinear with a frozen weight in NF4."""


class Nf4RowParallelLinear(_Nf4Linear, tensor_parallel.RowParallelLinear):
    """RowParallelLinear with a frozen weight in NF4."""
