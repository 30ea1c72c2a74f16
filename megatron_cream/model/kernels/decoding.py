"""Attention of one query per sample, split over the keys, so that a few heads keep a whole GPU busy."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_SPLITS = 64
_TILE_BYTES = 1 << 14  # keys that a program reads at once: 128 of 64 channels in bf16
_PROGRAMS_PER_PROCESSOR = 2


def attend_one_query(
    query_1BND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, keys_BS: Tensor, scale: float | None
) -> Tensor:
    """Return the attention of one query per sample to the keys that its mask names, [1, b, n, d].

    Shapes and launches depend on the number of keys, not on the mask, so a CUDA graph can repeat the call.

    Args:
        query_1BND: the queries, on a CUDA device.
        key_SBGD: keys; g divides n. The last dimension is contiguous.
        value_SBGD: values of these keys.
        keys_BS: bool [b, keys], contiguous; False keys are left out. Each sample has a True one.
        scale: factor of the scores; None is 1 / sqrt(d).
    """
    (keys, b, g, d), n = key_SBGD.shape, query_1BND.shape[2]
    cols = max(triton.next_power_of_2(d), 16)
    tile = max(_TILE_BYTES // (cols * key_SBGD.element_size()), 16)
    wanted = min(max(_count_programs(query_1BND.device) // (b * g), 1), _MAX_SPLITS)
    per_split = triton.cdiv(triton.cdiv(keys, wanted), tile) * tile
    splits = triton.cdiv(keys, per_split)
    query = query_1BND.contiguous()
    out = torch.empty_like(query)
    sums = query.new_empty(splits, b * n, d, dtype=torch.float32)
    largest, weights = (query.new_empty(splits, b * n, dtype=torch.float32) for _ in range(2))
    _attend_to_split[(b * g, splits)](
        query, key_SBGD, value_SBGD, keys_BS.view(torch.uint8), sums, largest, weights,
        d**-0.5 if scale is None else scale, keys, per_split, b * n, g,
        *key_SBGD.stride()[:3], *value_SBGD.stride()[:3],
        PER_GROUP=n // g, D=d, ROWS=max(triton.next_power_of_2(n // g), 16), COLS=cols, TILE=tile,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _join_splits[(b * n,)](sums, largest, weights, out, splits, b * n, D=d, COLS=cols, SPLITS=_MAX_SPLITS, num_warps=4)
    return out


@functools.cache
def _count_programs(device: torch.device) -> int:
    """Return how many programs keep the device busy; without a GPU, in Triton's interpreter, a few."""
    if device.type != "cuda":
        return 12
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


# These numbers change from prompt to prompt, and no kernel shall be compiled for each.
@triton.jit(do_not_specialize=["keys", "per_split", "queries"])
def _attend_to_split(
    query, key, value, real, sums, largest, weights, scale, keys, per_split, queries, g,
    key_s, key_b, key_g, value_s, value_b, value_g,
    PER_GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum the weighted values of one split of the keys, for the query heads of one group of one sample.

    Also store, for each query head, the largest score and the sum of the weights relative to it.
    """
    sample, group = (tl.program_id(0) // g).to(tl.int64), tl.program_id(0) % g
    split = tl.program_id(1)
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    head = tl.program_id(0) * PER_GROUP + rows  # among those of all samples
    of_query = (rows < PER_GROUP)[:, None] & (cols < D)[None, :]
    q = tl.load(query + head[:, None] * D + cols[None, :], mask=of_query, other=0.0)
    key += sample * key_b + group * key_g
    value += sample * value_b + group * value_g
    real += sample * keys

    high = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    begin = split * per_split
    for first in range(begin, tl.minimum(begin + per_split, keys), TILE):
        place = first + tl.arange(0, TILE)
        inside = (place < keys)[:, None] & (cols < D)[None, :]
        seen = tl.load(real + place, mask=place < keys, other=0) != 0
        row = place.to(tl.int64)[:, None]
        k = tl.load(key + row * key_s + cols[None, :], mask=inside, other=0.0)
        v = tl.load(value + row * value_s + cols[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_high = tl.maximum(high, tl.max(scores, 1))
        # Where no key was seen yet the largest score is -inf, and -inf - -inf would be NaN.
        shift = tl.where(new_high == float("-inf"), 0.0, new_high)
        kept = tl.exp(high - shift)
        p = tl.exp(scores - shift[:, None])
        weight = weight * kept + tl.sum(p, 1)
        total = total * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        high = new_high

    out = split * queries + head
    tl.store(largest + out, high, mask=rows < PER_GROUP)
    tl.store(weights + out, weight, mask=rows < PER_GROUP)
    tl.store(sums + out[:, None] * D + cols[None, :], total, mask=of_query)


@triton.jit(do_not_specialize=["splits", "queries"])
def _join_splits(
    sums, largest, weights, out, splits, queries, D: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr
):
    """Join the splits of one query head."""
    head, split, cols = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, COLS)
    row = split * queries + head
    high = tl.load(largest + row, mask=split < splits, other=float("-inf"))
    factor = tl.exp(high - tl.max(high, 0))
    weight = tl.load(weights + row, mask=split < splits, other=0.0)
    inside = (split < splits)[:, None] & (cols < D)[None, :]
    total = tl.load(sums + row[:, None] * D + cols[None, :], mask=inside, other=0.0)
    joined = tl.sum(total * factor[:, None], 0) / tl.sum(weight * factor, 0)
    tl.store(out + head * D + cols, joined.to(out.dtype.element_ty), mask=cols < D)
