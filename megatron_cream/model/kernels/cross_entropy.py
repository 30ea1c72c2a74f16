"""Tensor-parallel cross-entropy without float32 logits in memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def cross_entropy(logits: Tensor, labels: Tensor, real_vocab_size: int, group=None) -> Tensor:
    """Return the loss of each token.

    The backward pass overwrites the logits with their gradient, because nothing else needs them.

    Args:
        logits: [..., v], contiguous, of any floating dtype: this rank's part of the vocabulary.
        labels: int64 [...], ids in the whole vocabulary.
        real_vocab_size: ids from here on are padding; they get no probability and no gradient.
        group: tensor-parallel process group; None or one rank for the whole vocabulary.

    Returns:
        Losses, float32 [...].
    """
    return _CrossEntropy.apply(logits, labels, real_vocab_size, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, real_vocab_size, group):
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        rows, mine = labels.numel(), logits.shape[-1]
        first = rank * mine
        real = min(max(real_vocab_size - first, 0), mine)
        # For each token on this rank: largest logit, sum of exp(logit - largest), logit of the label or 0.
        largest, total, wanted = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
        _cross_entropy_forward[(rows,)](
            logits, labels, largest, total, wanted, logits.shape[-1], first, real, BLOCK=_BLOCK, num_warps=16
        )
        if size > 1:
            overall = largest.clone()
            torch.distributed.all_reduce(overall, torch.distributed.ReduceOp.MAX, group=group)
            sums = torch.stack([total * torch.exp(largest - overall), wanted])
            torch.distributed.all_reduce(sums, group=group)
            largest, (total, wanted) = overall, sums
        log_total = largest + total.log()
        ctx.save_for_backward(logits, labels, log_total)
        ctx.first, ctx.real = first, real
        return (log_total - wanted).view(labels.shape)

    @staticmethod
    def backward(ctx, grad):
        logits, labels, log_total = ctx.saved_tensors
        _cross_entropy_backward[(labels.numel(),)](
            logits,
            labels,
            log_total,
            grad.contiguous(),
            logits.shape[-1],
            ctx.first,
            ctx.real,
            BLOCK=_BLOCK,
            num_warps=16,
        )
        return logits, None, None, None


@triton.jit
def _cross_entropy_forward(logits, labels, largest, total, wanted, width, first, real, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row) - first
    cols = tl.arange(0, BLOCK)
    m = float("-inf")
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, real, BLOCK):
        at = start + cols
        x = tl.load(logits + row * width + at, mask=at < real, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(m, tl.max(x, axis=0))
        acc = acc * tl.exp(m - higher) + tl.exp(x - higher)
        m = higher
    here = (label >= 0) & (label < real)
    target = tl.load(logits + row * width + label, mask=here, other=0.0).to(tl.float32)
    tl.store(largest + row, m)
    tl.store(total + row, tl.sum(acc, axis=0))
    tl.store(wanted + row, target)


@triton.jit
def _cross_entropy_backward(logits, labels, log_total, grad, width, first, real, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row) - first
    scale = tl.load(grad + row)
    z = tl.load(log_total + row)
    cols = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        at = start + cols
        x = tl.load(logits + row * width + at, mask=at < real, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - z) - tl.where(at == label, 1.0, 0.0)
        p = tl.where(at < real, p * scale, 0.0)
        tl.store(logits + row * width + at, p.to(logits.dtype.element_ty), mask=at < width)
