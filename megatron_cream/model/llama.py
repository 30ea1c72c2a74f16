"""Llama on Megatron's GPTModel. The model is constructed in this file only.

RMSNorm, SwiGLU, grouped or multi-head attention, missing biases, and tied or untied
embeddings are settings of TransformerConfig. This file adds rotary embeddings by
explicit position ids. Megatron has deprecated GPTModel in favour of HybridModel; a
move would change this file only.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_cream.common.errors import OtherWeights
from megatron_cream.model.attention import AttentionBackend
from megatron_cream.model.kernels import support
from megatron_cream.model.layer_spec import build_block_spec, other_norm_name
from megatron_cream.model.lora import add_adapters
from megatron_cream.model.lora_settings import LoraSettings
from megatron_cream.model.rotary import RotaryEmbedding

_NORM_EXTRA_STATE = "norm._extra_state"


def _refuse_other_weights(model: torch.nn.Module, keys: Any) -> None:
    """Refuse a state that lacks weights of the model or has others, as an `mp_rank_XX` file of another model may.

    Megatron would print their names, and train with the initial weights in place of those that are missing.
    """
    missing, unknown = (
        [name for name in names if not name.endswith("_extra_state")]
        for names in (keys.missing_keys, keys.unexpected_keys)
    )
    if missing or unknown:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} weights, such as {missing[0]}")
        if unknown:
            parts.append(f"has {len(unknown)} that the model has not, such as {unknown[0]}")
        raise OtherWeights(f"the checkpoint is not of this model: it {', and '.join(parts)}")


class LlamaModel(GPTModel):
    """GPTModel with rotary angles from `position_ids` [b, s] on every pipeline stage.

    Under context parallelism `position_ids` are this rank's, sliced like the tokens.

    angles: cos and sin by `position_ids`, which the chunks of an interleaved pipeline stage share; they get the same
        tensor for the same micro-batch. None: this model computes its own.
    """

    def __init__(
        self,
        *args,
        rotary: RotaryEmbedding,
        angles: WeakTensorKeyDictionary | None,
        real_vocab_size: int,
        **kwargs,
    ):
        super().__init__(*args, position_embedding_type="none", **kwargs)
        # Not a module, so that casting the model to bf16 does not change the frequencies.
        self.rotary = rotary
        self.angles = angles
        self.real_vocab_size = real_vocab_size
        self.has_adapters = False
        self._register_load_state_dict_pre_hook(self._add_norm_extra_states)
        self._register_load_state_dict_pre_hook(self._rename_norms)
        self.register_load_state_dict_post_hook(_refuse_other_weights)

    def add_adapters(self, settings: LoraSettings) -> None:
        """Add LoRA adapters, and freeze the other weights."""
        add_adapters(self, settings)
        self.has_adapters = True
        self._register_load_state_dict_pre_hook(self._keep_frozen_weights)

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.has_adapters and decoder_input is not None and torch.is_grad_enabled():
            # A recomputed layer has gradients only if its input has, which a frozen embedding does not give it.
            decoder_input = decoder_input if decoder_input.requires_grad else decoder_input.requires_grad_()
        return (decoder_input, self._cos_sin(position_ids), *rest)

    def _cos_sin(self, position_ids: Tensor) -> Tensor:
        """Return cos and sin, float32 [2, b, s, head_dim]."""
        if self.angles is None:
            return torch.stack(self.rotary.cos_sin(position_ids))
        if position_ids not in self.angles:
            self.angles[position_ids] = torch.stack(self.rotary.cos_sin(position_ids))
        return self.angles[position_ids]

    def sharded_state_dict(self, *args, **kwargs):
        """Return Megatron's state without the extra states of Transformer Engine's norms.

        They are empty, and other layers have none. Without them each kind of layers loads the
        checkpoints of the other. A model with adapters has only what trains.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        if self.has_adapters:
            prefix = kwargs.get("prefix", args[0] if args else "")
            trained = {prefix + name for name, weight in self.named_parameters() if weight.requires_grad}
            return {key: value for key, value in state.items() if key in trained}
        return {key: value for key, value in state.items() if not key.endswith(_NORM_EXTRA_STATE)}

    def _add_norm_extra_states(self, state_dict, prefix, *_):
        for name, module in self.named_modules():
            has_state = type(module).set_extra_state is not torch.nn.Module.set_extra_state
            if name.endswith("norm") and has_state:
                state_dict.setdefault(f"{prefix}{name}._extra_state", None)

    def _rename_norms(self, state_dict, prefix, *_):
        """Accept norms by the names of either kind of layers, as `mp_rank_XX` files have them.

        `_refuse_other_weights` would refuse them.
        """
        for name, _ in self.named_parameters():
            ours, theirs = prefix + name, prefix + other_norm_name(name)
            if ours not in state_dict and theirs in state_dict:
                state_dict[ours] = state_dict.pop(theirs)

    def _keep_frozen_weights(self, state_dict, prefix, *_):
        """Complete the state of a checkpoint, which has only what trains, with the frozen weights."""
        for name, weight in self.named_parameters():
            if not weight.requires_grad:
                state_dict.setdefault(prefix + name, weight.detach())
        for name, module in self.named_modules():
            if type(module).set_extra_state is not torch.nn.Module.set_extra_state:
                state_dict.setdefault(f"{prefix}{name}._extra_state", None)

    def compute_language_model_loss(self, labels, logits):
        """Return the cross-entropy of each token, [b, s].

        Padding rows of the vocabulary get no probability, so the loss is the one that transformers
        computes, at any tensor-parallel size.
        """
        if support.can_use_kernels(logits) and not self.config.cross_entropy_loss_fusion:
            from megatron_cream.model.kernels.cross_entropy import cross_entropy

            labels_SB = labels.transpose(0, 1).contiguous()
            losses_SB = cross_entropy(logits.contiguous(), labels_SB, self.real_vocab_size, self.pg_collection.tp)
            return losses_SB.transpose(0, 1).contiguous()
        local_size = logits.shape[-1]
        real = self.real_vocab_size - self.pg_collection.tp.rank() * local_size
        if real < local_size:
            logits[..., max(real, 0) :] = float("-inf")
        return super().compute_language_model_loss(labels, logits)


@dataclass(kw_only=True)
class LlamaModelConfig(GPTModelConfig):
    """Megatron's GPTModelConfig with the settings that `LlamaModelBuilder` adds.

    rotary_base: Megatron's name of rope_theta.
    rope_scaling_config: the `rope_scaling` dict of a Hugging Face config.json, or None.
    rope_max_positions: position ids are in [0, rope_max_positions).
    attention: the chosen attention backend.
    real_vocab_size: size of the tokenizer's vocabulary, without padding.
    lora: settings of the adapters; None trains all weights.
    """

    builder: ClassVar[str] = "megatron_cream.model.llama.LlamaModelBuilder"
    rope_scaling_config: dict[str, Any] | None
    rope_max_positions: int
    attention: AttentionBackend
    real_vocab_size: int
    lora: LoraSettings | None = None


class LlamaModelBuilder(GPTModelBuilder):
    """Builder of one pipeline stage. The base class wraps it for distributed training."""

    def __init__(self, model_config: LlamaModelConfig):
        super().__init__(model_config)
        self._angles = WeakTensorKeyDictionary()

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> LlamaModel:
        model = self._model_config
        config = model.transformer
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(pg_collection.pp)
        vocab_size = model.vocab_size
        if model.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size, model.make_vocab_size_divisible_by, config.tensor_model_parallel_size
            )
        built = LlamaModel(
            config=config,
            transformer_layer_spec=build_block_spec(config, model.attention, vp_stage, model.lora),
            vocab_size=vocab_size,
            max_sequence_length=model.rope_max_positions,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=model.fp16_lm_cross_entropy,
            parallel_output=model.parallel_output,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            real_vocab_size=model.real_vocab_size,
            angles=None if vp_stage is None else self._angles,
            rotary=RotaryEmbedding(
                head_dim=config.kv_channels,
                rope_theta=float(model.rotary_base),
                max_position_embeddings=model.rope_max_positions,
                rope_scaling=model.rope_scaling_config,
            ),
        )
        if model.lora is not None:
            built.add_adapters(model.lora)
        return built
