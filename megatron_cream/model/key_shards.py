"""Attention to keys and values that are split over ranks, for reading texts whose keys do not fit into one GPU.

All ranks of the group have the same queries. Each attends to its own keys, and the parts are combined by the
log-sum-exp of their scores, as in flash-attention. There is no backward pass.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


@dataclass
class KeyShard:
    """One rank's share of the keys and values.

    group: the ranks that share them.
    owns_last: whether this rank keeps the keys of the tokens that the model reads now.
    """

    group: ProcessGroup
    owns_last: bool = True


def attend_to_shards(
    query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, shard: KeyShard, scale: float | None
) -> Tensor:
    """Return the causal attention of the queries to the keys of all ranks, [s, b, n, d].

    Args:
        query_SBND: the queries, equal on all ranks.
        key_SBGD: this rank's earlier keys, and then those of the queries' own tokens.
        value_SBGD: the values of these keys.
        shard: this rank's share; all ranks of its group must call this.
        scale: factor of the scores; None is 1 / sqrt(d).
    """
    scale = 1 / math.sqrt(query_SBND.shape[-1]) if scale is None else scale
    earlier = len(key_SBGD) - len(query_SBND)
    parts = []
    if earlier:
        parts.append(_attend(query_SBND, key_SBGD[:earlier], value_SBGD[:earlier], scale, causal=False))
    if shard.owns_last:
        parts.append(_attend(query_SBND, key_SBGD[earlier:], value_SBGD[earlier:], scale, causal=True))
    largest_SBN = torch.full(query_SBND.shape[:-1], float("-inf"), device=query_SBND.device)
    for _, lse_SBN in parts:
        largest_SBN = torch.maximum(largest_SBN, lse_SBN)
    torch.distributed.all_reduce(largest_SBN, ReduceOp.MAX, group=shard.group)
    # The weighted values and, as one more column, the sum of the weights.
    total = torch.zeros(*query_SBND.shape[:-1], query_SBND.shape[-1] + 1, device=query_SBND.device)
    for out_SBND, lse_SBN in parts:
        weight_SBN1 = (lse_SBN - largest_SBN).exp().unsqueeze(-1)
        total[..., :-1] += out_SBND * weight_SBN1
        total[..., -1:] += weight_SBN1
    torch.distributed.all_reduce(total, group=shard.group)
    return (total[..., :-1] / total[..., -1:]).to(query_SBND.dtype)


def _attend(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, scale: float, *, causal: bool):
    """Return attention [s, b, n, d] and the log-sum-exp of the scores, float32 [s, b, n]."""
    if query_SBND.is_cuda:
        # Samples become heads, which are independent of each other: [1, b * n, s, d].
        q, k, v = (x.flatten(1, 2).transpose(0, 1).unsqueeze(0) for x in (query_SBND, key_SBGD, value_SBGD))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out_1NSD, lse_1NS, *_ = flash(q, k, v, 0.0, causal, False, scale=scale)
        shape = query_SBND.shape
        return out_1NSD[0].transpose(0, 1).reshape(shape), lse_1NS[0].transpose(0, 1).reshape(shape[:-1])
    query_SBGND = query_SBND.float().unflatten(2, (key_SBGD.shape[2], -1))
    scores = torch.einsum("sbgnd,tbgd->sbgnt", query_SBGND, key_SBGD.float()) * scale
    if causal:
        size = len(query_SBND)
        hidden = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden[:, None, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("sbgnt,tbgd->sbgnd", (scores - lse[..., None]).exp(), value_SBGD.float())
    return out.flatten(2, 3), lse.flatten(2, 3)
