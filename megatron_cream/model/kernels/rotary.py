"""Split and rotate the fused query-key-value projection in one pass each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def split_and_rotate(
    mixed_SBGX: Tensor, cos: Tensor, sin: Tensor, queries_per_group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split Megatron's fused query-key-value tensor, and rotate queries and keys.

    The rotation is the one of `model.rotary.apply_rotary`.

    Args:
        mixed_SBGX: [s, b, g, (queries_per_group + 2) * d], contiguous, on a CUDA device: for each group
            its query heads, then its key head, then its value head.
        cos: float32 [b, s, d], contiguous; only the first half of d is read.
        sin: like `cos`.
        queries_per_group: number of query heads that share a key head.

    Returns:
        Queries [s, b, g * queries_per_group, d], keys and values [s, b, g, d], contiguous, of the input's
        dtype. The rotation is computed in float32 and rounded once.
    """
    return _SplitAndRotate.apply(mixed_SBGX, cos, sin, queries_per_group)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin, per_group):
        s, b, g, width = mixed.shape
        d = width // (per_group + 2)
        parts = tuple(mixed.new_empty(s, b, heads, d) for heads in (g * per_group, g, g))
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.per_group = mixed.shape, per_group
        _launch(mixed.contiguous(), parts, cos, sin, per_group, forward=True)
        return parts

    @staticmethod
    def backward(ctx, *grads):
        mixed = grads[0].new_empty(ctx.shape)
        grads = tuple(grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        # The transpose of a rotation is its inverse.
        _launch(mixed, grads, *ctx.saved_tensors, ctx.per_group, forward=False)
        return mixed, None, None, None


def _launch(mixed: Tensor, parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, per_group: int, forward: bool) -> None:
    s, b, g, width = mixed.shape
    d = width // (per_group + 2)
    heads = 8
    _split_and_rotate_kernel[(s * b, triton.cdiv(g * (per_group + 2), heads))](
        mixed, *parts, cos, sin, s, b, g,
        *(stride for part in parts for stride in part.stride()[:3]),
        PER_GROUP=per_group, HALF=d // 2, BLOCK=triton.next_power_of_2(d // 2), HEADS=heads, FORWARD=forward,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _split_and_rotate_kernel(
    mixed, query, key, value, cos, sin, s, b, g,
    query_s, query_b, query_n, key_s, key_b, key_n, value_s, value_b, value_n,
    PER_GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """Process HEADS heads of one token, which may be query, key or value heads."""
    token = tl.program_id(0).to(tl.int64)
    position, sample = token // b, token % b
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, BLOCK)[None, :]
    group, place = heads // (PER_GROUP + 2), heads % (PER_GROUP + 2)
    inside = (heads < g * (PER_GROUP + 2))[:, None] & (dims < HALF)
    is_query, is_key, is_value = place < PER_GROUP, place == PER_GROUP, place > PER_GROUP

    in_mixed = mixed + token * g * (PER_GROUP + 2) * 2 * HALF + heads[:, None] * 2 * HALF + dims
    in_query = query + position * query_s + sample * query_b + (group * PER_GROUP + place)[:, None] * query_n + dims
    in_key = key + position * key_s + sample * key_b + group[:, None] * key_n + dims
    in_value = value + position * value_s + sample * value_b + group[:, None] * value_n + dims
    of_query, of_key, of_value = inside & is_query[:, None], inside & is_key[:, None], inside & is_value[:, None]

    angle = (sample * s + position) * 2 * HALF + dims
    c = tl.where(is_value[:, None], 1.0, tl.load(cos + angle, mask=dims < HALF, other=0.0))
    r = tl.where(is_value[:, None], 0.0, tl.load(sin + angle, mask=dims < HALF, other=0.0))
    if FORWARD:
        x1 = tl.load(in_mixed, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(in_mixed + HALF, mask=inside, other=0.0).to(tl.float32)
        y1, y2 = (x1 * c - x2 * r).to(mixed.dtype.element_ty), (x2 * c + x1 * r).to(mixed.dtype.element_ty)
        tl.store(in_query, y1, mask=of_query)
        tl.store(in_query + HALF, y2, mask=of_query)
        tl.store(in_key, y1, mask=of_key)
        tl.store(in_key + HALF, y2, mask=of_key)
        tl.store(in_value, y1, mask=of_value)
        tl.store(in_value + HALF, y2, mask=of_value)
    else:
        # Each head is in one of the three tensors; the other two loads give zero.
        x1 = tl.load(in_query, mask=of_query, other=0.0) + tl.load(in_key, mask=of_key, other=0.0)
        x1 = (x1 + tl.load(in_value, mask=of_value, other=0.0)).to(tl.float32)
        x2 = tl.load(in_query + HALF, mask=of_query, other=0.0) + tl.load(in_key + HALF, mask=of_key, other=0.0)
        x2 = (x2 + tl.load(in_value + HALF, mask=of_value, other=0.0)).to(tl.float32)
        tl.store(in_mixed, (x1 * c + x2 * r).to(mixed.dtype.element_ty), mask=inside)
        tl.store(in_mixed + HALF, (x2 * c - x1 * r).to(mixed.dtype.element_ty), mask=inside)
