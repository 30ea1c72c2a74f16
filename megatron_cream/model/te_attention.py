"""Transformer Engine's attention for packed samples. Imports Transformer Engine."""

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_cream.model.packed_attention import Bounds, attend_by_bounds


class PackedTEAttention(TEDotProductAttention):
    """Megatron's TEDotProductAttention, with several documents in each sample of a micro-batch.

    Transformer Engine's own layout for documents, `thd`, has no dimension for samples.
    """

    def forward(
        self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None, **kwargs
    ):
        forward = super().forward
        if packed_seq_params is None:
            return forward(query, key, value, attention_mask, attn_mask_type, attention_bias, **kwargs)

        def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
            documents = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=bounds.queries,
                cu_seqlens_kv=bounds.keys,
                max_seqlen_q=bounds.longest_queries,
                max_seqlen_kv=bounds.longest_keys,
                pad_between_seqs=False,
            )
            q, k, v = (x.contiguous() for x in (q, k, v))
            return forward(q, k, v, None, attn_mask_type, packed_seq_params=documents, **kwargs)

        return attend_by_bounds(attend, packed_seq_params, query, key, value).flatten(2)
