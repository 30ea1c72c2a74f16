"""The choice of the attention implementation, and this project's core attentions.

Only `choose_backend` chooses. No implementation builds the s x s matrix of scores, except
`local`, Megatron's reference implementation, which is kept for comparison.
"""

import functools
import importlib.util
import sys
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_cream.model.context_parallel import context_parallel_attention
from megatron_cream.model.kernels import support
from megatron_cream.model.key_shards import KeyShard, attend_to_shards
from megatron_cream.model.packed_attention import Documents, attend_by_bounds, attend_each_document
from megatron_cream.model.rotary import apply_rotary

# Values of `--attention-backend`. `fused` and `unfused` are kernels of Transformer Engine.
ATTENTION_BACKENDS = ("auto", "te", "flash", "fused", "unfused", "sdpa", "local")


@dataclass(frozen=True)
class AttentionBackend:
    """The attention implementation of a run.

    name: `te`, `flash`, `sdpa` or `local`.
    transformer_engine: whether the other modules of a layer (norms, linears) are Transformer Engine's.
    te_kernel: kernel of `te`: `auto`, `fused` or `unfused`.
    reason: why it was chosen, for the log.
    """

    name: str
    transformer_engine: bool
    te_kernel: str
    reason: str

    def __str__(self) -> str:
        layers = " in Transformer Engine's layers" if self.transformer_engine else ""
        return f"{self.name}{layers} ({self.reason})"


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine is installed with its torch extension."""
    return all(importlib.util.find_spec(m) for m in ("transformer_engine", "transformer_engine_torch"))


@functools.cache
def find_flash_attention():
    """Return the installed flash-attention, or None.

    Version 4 if installed, else 2; called as `f(q_bsnd, k, v, causal=True)`.
    """
    try:
        from flash_attn.cute import flash_attn_func

        # flash-attn 4 returns (out, log-sum-exp).
        return lambda q, k, v, **kw: flash_attn_func(q, k, v, **kw)[0]
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_func

        return flash_attn_func
    except ImportError:
        return None


@functools.cache
def find_packed_flash_attention():
    """Return the installed flash-attention for samples of several documents, called with named `cu_seqlens_q` etc.

    There is one if `find_flash_attention` finds one.
    """
    if _has_flash_attention_4():
        from flash_attn.cute import flash_attn_varlen_func

        return lambda q, k, v, **kw: flash_attn_varlen_func(q, k, v, **kw)[0]
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def is_flash_attention_deterministic() -> bool:
    """Return whether the installed flash-attention is deterministic on this GPU.

    Its backward pass must use no atomic additions. flash-attn 2 has such a pass; flash-attn 4 (4.0.0b36) has on Hopper
    and data-centre Blackwell, not on Ampere or SM 12.
    """
    return not _has_flash_attention_4() or torch.cuda.get_device_capability()[0] in (9, 10, 11)


def _has_flash_attention_4() -> bool:
    return find_flash_attention() is not None and "flash_attn.cute" in sys.modules


def choose_backend(
    requested: str, *, has_cuda: bool, half: bool, deterministic: bool = False, own_layers: bool = False
) -> AttentionBackend:
    """Return the implementation for a value of `--attention-backend`.

    Args:
        requested: one of ATTENTION_BACKENDS.
        has_cuda: whether there is a CUDA device.
        half: whether training is in bf16 or fp16, which flash-attn needs.
        deterministic: whether runs must be bit-identical (--deterministic).
        own_layers: whether the run needs this project's layers, also where Transformer Engine is installed.

    Raises:
        ValueError: the requested backend is unknown or cannot run on this machine.
    """
    te = has_cuda and has_transformer_engine() and not own_layers
    installed = has_cuda and find_flash_attention() is not None
    flash = installed and half and not (deterministic and not is_flash_attention_deterministic())
    if requested not in ATTENTION_BACKENDS:
        raise ValueError(f"--attention-backend {requested}: choose from {', '.join(ATTENTION_BACKENDS)}")
    if requested in ("te", "fused", "unfused") and not te:
        raise ValueError(
            f"--attention-backend {requested}: needs a CUDA device and transformer-engine[pytorch]; "
            "use auto, which takes what is installed"
        )
    if requested == "flash" and not flash:
        raise ValueError(
            "--attention-backend flash: needs a CUDA device, flash-attn-4 (or flash-attn) and bf16 or fp16, and for "
            "--deterministic with flash-attn-4 a Hopper or B200 GPU; use auto, which takes what fits"
        )

    name, reason = requested, "requested"
    if requested == "auto":
        name = "flash" if flash else "te" if te else "sdpa"
        reason = {
            "flash": "flash-attn is installed",
            "te": "Transformer Engine is installed",
            "sdpa": "neither Transformer Engine nor flash-attn is installed" if has_cuda else "no CUDA device",
        }[name]
        if own_layers and name == "sdpa" and has_cuda:
            reason = "flash-attn is not installed"
        if installed and half and not flash:
            reason = "flash-attn has no deterministic backward on this GPU"
    if name in ("fused", "unfused"):
        return AttentionBackend("te", True, name, reason)
    # Transformer Engine 2.20 omits the causal mask when it selects flash-attn 4 by itself
    # (benchmarks/RESULTS.md). With both installed it must use cuDNN's kernels.
    kernel = "fused" if name == "te" and flash else "unfused" if name == "te" and installed else "auto"
    return AttentionBackend(name, te and name in ("te", "flash"), kernel, reason)


def list_alternatives(first: AttentionBackend, *, half: bool) -> list[AttentionBackend]:
    """Return `first` and what else `auto` may choose in the same kind of layers."""
    names = ["flash"] if half and find_flash_attention() is not None else []
    names += ["te"] if first.transformer_engine else []
    own = not first.transformer_engine
    others = [choose_backend(name, has_cuda=True, half=half, own_layers=own) for name in names if name != first.name]
    sdpa = AttentionBackend("sdpa", first.transformer_engine, "auto", first.reason)
    return [first, *others, *([sdpa] if first.name != "sdpa" else [])]


class RotarySelfAttention(SelfAttention):
    """Megatron's self attention with different rotary angles for each sample.

    `rotary_pos_emb` is cos and sin, float32 [2, b, s, head_dim], instead of Megatron's table of angles. One tensor
    works with every kind of activation recompute and with CUDA graphs; a pair does not.
    """

    def forward(self, hidden_states, attention_mask, rotary_pos_emb=None, **kwargs):
        # Read in get_query_key_value_tensors, the only method between the projection
        # and the attention that a subclass can override.
        self._cos_sin = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **kwargs)
        finally:
            self._cos_sin = None

    def get_query_key_value_tensors(self, hidden_states, *args, **kwargs):
        if self._cos_sin is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        cos, sin = self._cos_sin
        if support.can_use_kernels(hidden_states) and self._can_split_in_kernel():
            from megatron_cream.model.kernels.rotary import split_and_rotate

            mixed_SBGX, (queries, *_) = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
            return split_and_rotate(mixed_SBGX, cos, sin, queries // self.hidden_size_per_attention_head)
        query_SBND, key_SBND, value_SBND = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        return apply_rotary(query_SBND, cos, sin), apply_rotary(key_SBND, cos, sin), value_SBND

    def _can_split_in_kernel(self) -> bool:
        """Return whether there is no norm before the rotation and no group shared by ranks."""
        return not self.config.qk_layernorm and self.config.num_query_groups >= self.world_size


class _CausalCoreAttention(MegatronModule):
    """Base class of this project's core attentions: causal, without dropout.

    forward: query [s, b, n, d], key and value [s, b, g, d] (g divides n) -> [s, b, n * d].
    attention_mask is None, except in generation: then it is bool [b, keys], False on padding and on memory
    for tokens to come, and there is one query for each sample.
    key_shard, if set, says which keys and values of a long text this rank has in generation.
    packed_seq_params are the `Documents` of packed samples, or None.
    A subclass defines `attend`, which returns [s, b, n, d]: causal attention, aligned at the
    end if there are more keys than queries.
    """

    key_shard: KeyShard | None = None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"--attention-dropout {dropout}: not supported by this attention; use 0")
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Documents | None = None,
    ) -> Tensor:
        if attention_bias is not None:
            raise ValueError("attention bias needs --attention-backend te")
        packed = packed_seq_params is not None
        attend = functools.partial(self.attend_packed, packed_seq_params) if packed else self.attend
        if attention_mask is not None:
            out_SBND = _attend_to_named(query, key, value, attention_mask, self.softmax_scale)
        elif self.key_shard is not None:
            out_SBND = attend_to_shards(query, key, value, self.key_shard, self.softmax_scale)
        elif self.cp_group is not None:
            out_SBND = context_parallel_attention(attend, query, key, value, self.cp_group)
        else:
            out_SBND = attend(query, key, value)
        return out_SBND.flatten(2)

    def attend_packed(self, documents: Documents, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        """Return what `attend` returns, within each document."""
        return attend_each_document(self.attend, documents, query_SBND, key_SBGD, value_SBGD)


class SdpaCoreAttention(_CausalCoreAttention):
    """Attention by torch's scaled_dot_product_attention: cuDNN or flash kernels on a GPU."""

    def attend(self, query_SBND, key_SBND, value_SBND):
        q, k, v = (_fold_samples_into_heads(x).transpose(1, 2) for x in (query_SBND, key_SBND, value_SBND))
        same, mask = q.shape[2] == k.shape[2], None
        if not same:
            from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes two seconds

            mask = causal_lower_right(q.shape[2], k.shape[2])
        out_BNSD = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=same,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out_BNSD.transpose(1, 2).reshape(query_SBND.shape)


class FlashCoreAttention(_CausalCoreAttention):
    """Attention by flash-attn, without Transformer Engine."""

    def attend(self, query_SBND, key_SBND, value_SBND):
        q, k, v = (_fold_samples_into_heads(x) for x in (query_SBND, key_SBND, value_SBND))
        deterministic = torch.are_deterministic_algorithms_enabled()
        out_BSND = find_flash_attention()(
            q, k, v, softmax_scale=self.softmax_scale, causal=True, deterministic=deterministic
        )
        return out_BSND.view(query_SBND.shape)

    def attend_packed(self, documents, query_SBND, key_SBGD, value_SBGD):
        def attend(q, k, v, bounds):
            return find_packed_flash_attention()(
                q,
                k,
                v,
                cu_seqlens_q=bounds.queries,
                cu_seqlens_k=bounds.keys,
                max_seqlen_q=bounds.longest_queries,
                max_seqlen_k=bounds.longest_keys,
                softmax_scale=self.softmax_scale,
                causal=True,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )

        return attend_by_bounds(attend, documents, query_SBND, key_SBGD, value_SBGD)


def _fold_samples_into_heads(x_SBND: Tensor) -> Tensor:
    """Return [s, b, n, d] as a view [1, s, b * n, d], with the samples as further heads.

    Heads are independent of each other, so samples can be heads. Kernels need the batch dimension first; this way
    no tensor is copied, forward or backward. Query heads stay aligned with their key heads.
    """
    return x_SBND.flatten(1, 2).unsqueeze(0)


def _attend_to_named(query_1BND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, keys_BS: Tensor, scale) -> Tensor:
    """Return the attention of one query per sample to the keys that are True in keys_BS, [1, b, n, d]."""
    if support.can_use_kernels(query_1BND):
        from megatron_cream.model.kernels.decoding import attend_one_query

        return attend_one_query(query_1BND, key_SBGD, value_SBGD, keys_BS, scale)
    key_BGSD, value_BGSD = (x.permute(1, 2, 0, 3) for x in (key_SBGD, value_SBGD))
    # Query heads of a group become queries of its key head, so keys need not be repeated.
    query_BGND = query_1BND[0].unflatten(1, (key_SBGD.shape[2], -1))
    out_BGND = scaled_dot_product_attention(
        query_BGND, key_BGSD, value_BGSD, attn_mask=keys_BS[:, None, None], scale=scale
    )
    return out_BGND.flatten(1, 2).unsqueeze(0)


CORE_ATTENTIONS = {"sdpa": SdpaCoreAttention, "flash": FlashCoreAttention, "local": DotProductAttention}
