"""Specification of a transformer layer: modules of Transformer Engine or of this project."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_cream.model.attention import CORE_ATTENTIONS, AttentionBackend, RotarySelfAttention
from megatron_cream.model.kernels import support
from megatron_cream.model.lora_settings import LoraSettings
from megatron_cream.model.nf4 import Nf4ColumnParallelLinear, Nf4RowParallelLinear
from megatron_cream.model.norm import RMSNorm

# Transformer Engine stores each norm in the linear layer that follows it.
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def build_block_spec(
    config: TransformerConfig,
    backend: AttentionBackend,
    vp_stage: int | None = None,
    lora: LoraSettings | None = None,
) -> TransformerBlockSubmodules | ModuleSpec:
    """Return the specification of the layers of one pipeline stage.

    Both kinds of layers use the same tensor names in a distributed checkpoint, so each
    loads the checkpoints of the other.

    Args:
        config: Megatron's configuration.
        backend: the attention backend, which also chooses the kind of layers.
        vp_stage: number of the virtual pipeline stage.
        lora: settings of the adapters; None trains all weights.
    """
    if backend.transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        attention = layer.submodules.self_attention
        attention.module = RotarySelfAttention
        attention.submodules.core_attention = _choose_core_attention(backend)
        layer.submodules.mlp.keywords["submodules"].activation_func = _choose_activation()
        if lora is not None:
            _separate_norms(layer.submodules)  # so that adapters can read their output
        return layer
    is_nf4 = lora is not None and lora.base_dtype == "nf4"
    linears = (Nf4ColumnParallelLinear, Nf4RowParallelLinear) if is_nf4 else (ColumnParallelLinear, RowParallelLinear)
    layers = [_build_local_layer(config, backend, *linears)] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def other_norm_name(name: str) -> str:
    """Return the name of a parameter in the other kind of layers: only those of norms differ."""
    for separate, fused in _FUSED_NORMS.items():
        for ours, theirs in ((separate, fused), (fused, separate)):
            if ours in name:
                return name.replace(ours, theirs)
    return name


def _separate_norms(layer: TransformerLayerSubmodules) -> None:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer.input_layernorm = layer.pre_mlp_layernorm = TENorm
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    layer.mlp.keywords["submodules"].linear_fc1 = TEColumnParallelLinear
    layer.sharded_state_dict_keys_map = dict(_FUSED_NORMS)


def _choose_core_attention(backend: AttentionBackend) -> type:
    if backend.name != "te":
        return CORE_ATTENTIONS[backend.name]
    from megatron_cream.model.te_attention import PackedTEAttention

    return PackedTEAttention


def _choose_activation():
    """Return the MLP's activation class, or None without Triton.

    Megatron uses it if `use_te_activation_func` is set, as it is on a GPU.
    """
    if not support.HAS_TRITON:
        return None
    from megatron_cream.model.kernels.swiglu import SwiGlu

    return SwiGlu


def _build_local_layer(
    config: TransformerConfig, backend: AttentionBackend, column_parallel: type, row_parallel: type
) -> ModuleSpec:
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column_parallel,
            core_attention=CORE_ATTENTIONS[backend.name],
            linear_proj=row_parallel,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=column_parallel, linear_fc2=row_parallel, activation_func=_choose_activation()
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(_FUSED_NORMS),
        ),
    )
