"""Build and load a model on one rank or on those of a tensor-parallel group, without Megatron's command line."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_cream.checkpoint.families import ModelShape
from megatron_cream.checkpoint.mapping import (
    Row,
    list_parameters,
    megatron_shape,
    pad_vocab_size,
    tensor_parallel_shard,
)
from megatron_cream.common import devices
from megatron_cream.model.attention import choose_backend
from megatron_cream.model.llama import LlamaModel, LlamaModelBuilder, LlamaModelConfig
from megatron_cream.model.lora_settings import is_adapter
from megatron_cream.model.nf4 import Nf4Weight


class Weights(Protocol):
    """A model's weights: a MegatronCheckpoint, or the BaseWeights of a Hugging Face folder."""

    @property
    def shape(self) -> ModelShape: ...

    def read(self, row: Row, layer: int | None, out: Tensor) -> Tensor:
        """Fill `out` with a whole parameter and return it."""


@dataclass(frozen=True)
class Group:
    """The ranks that run one model together.

    store: through which they find each other; None for a single rank.
    rank: this process's rank among them.
    tensor: tensor-parallel size.
    context: context-parallel size: ranks with the same weights that split keys and values.
    """

    store: torch.distributed.Store | None = None
    rank: int = 0
    tensor: int = 1
    context: int = 1

    @property
    def size(self) -> int:
        return self.tensor * self.context


def load_model(weights: Weights, dtype: torch.dtype, attention: str = "sdpa", group: Group | None = None) -> LlamaModel:
    """Load the model in evaluation mode, with this project's layers; of several ranks each has its part.

    On one rank the vocabulary is not padded. Starts a process group of these ranks if there is none.

    Args:
        weights: shape and weights.
        dtype: dtype of the parameters.
        attention: one of `ATTENTION_BACKENDS`.
        group: the ranks; None is a single rank.
    """
    _start_group(group or Group())
    model = _build_model(weights.shape, dtype, attention)
    if devices.has_cuda():
        model.cuda()  # moves this project's norms; Megatron's layers are on the GPU already
    fill_model(model, weights.shape, weights.read)
    model.rotary = weights.shape.rotary(by_length=True)
    return model.eval()


def transformer_config(shape: ModelShape, **options) -> TransformerConfig:
    """Return Megatron's configuration of the layers of a Llama, without dropout; `options` are other fields."""
    args = shape.megatron_args()
    names = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels".split()
    names += ["layernorm_epsilon", "add_qkv_bias", "qk_layernorm"]
    return TransformerConfig(
        **{name: args[name] for name in names},
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        **options,
    )


def _build_model(shape: ModelShape, dtype: torch.dtype, attention: str) -> LlamaModel:
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    config = transformer_config(
        shape,
        tensor_model_parallel_size=tensor,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=not devices.has_cuda(),
        perform_initialization=False,
    )
    model = LlamaModelConfig(
        transformer=config,
        vocab_size=pad_vocab_size(shape.vocab_size, tensor),
        should_pad_vocab=False,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",
        rotary_base=shape.rope_theta,
        rope_scaling_config=shape.rope_scaling,
        rope_max_positions=shape.max_position_embeddings,
        real_vocab_size=shape.vocab_size,
        attention=choose_backend(attention, has_cuda=devices.has_cuda(), half=dtype != torch.float32),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return LlamaModelBuilder(model).build_model(groups, pre_process=True, post_process=True)


@torch.no_grad()
def fill_model(model: LlamaModel, shape: ModelShape, produce) -> None:
    """Fill this rank's part of a model with weights.

    Args:
        model: this rank's part; its parameters are overwritten.
        shape: shape of the whole model.
        produce: function (row, layer, out) that fills `out` with a whole parameter and returns it:
            `MegatronCheckpoint.read`, or `build_reader` of a Hugging Face folder.
    """
    parameters: dict[str, Any] = {name: weight for name, weight in model.named_parameters() if not is_adapter(name)}
    parameters |= {name: module for name, module in model.named_modules() if isinstance(module, Nf4Weight)}
    group = model.pg_collection.tp
    first = min((layer.layer_number for layer in model.decoder.layers), default=1) - 1
    for row, layer in list_parameters(shape):
        for name in _parameter_names(row, layer if layer is None else layer - first):
            if name in parameters:
                parameter = parameters.pop(name)
                out = torch.zeros(
                    _whole_shape(row, shape, parameter, group.size()), dtype=parameter.dtype, device="cpu"
                )
                _overwrite(parameter, tensor_parallel_shard(row, produce(row, layer, out), group.rank(), group.size()))
                break
    tied_copy = parameters.pop("output_layer.weight", None)
    if tied_copy is not None and shape.tied:  # on the last pipeline stage
        row, layer = next(list_parameters(shape))
        out = torch.zeros(_whole_shape(row, shape, tied_copy, group.size()), dtype=tied_copy.dtype, device="cpu")
        _overwrite(tied_copy, tensor_parallel_shard(row, produce(row, layer, out), group.rank(), group.size()))
    assert not parameters, f"not filled: {sorted(parameters)}"


def _overwrite(parameter: Any, weights: Tensor) -> None:
    """Overwrite a parameter, and the initial value that Transformer Engine keeps beside one in FP8.

    Megatron's distributed optimizer makes the float32 weights from that value, which is not rounded to FP8.
    """
    parameter.copy_(weights)
    get = getattr(parameter, "get_high_precision_init_val", None)
    if get is not None and (initial := get()) is not None:
        initial.copy_(weights)


def _parameter_names(row: Row, layer: int | None) -> list[str]:
    if layer is not None and layer < 0:
        return []
    return [row.module_name(layer, transformer_engine) for transformer_engine in (True, False)]


def _whole_shape(row: Row, shape: ModelShape, parameter, tensor_parallel: int) -> tuple[int, ...]:
    padded = parameter.shape[0] * tensor_parallel if row.fusion == "vocabulary" else shape.vocab_size
    return megatron_shape(row, shape, padded)


def _start_group(group: Group) -> None:
    if not torch.distributed.is_initialized():
        store = group.store or torch.distributed.HashStore()
        backend = "cpu:gloo,cuda:nccl" if group.size > 1 and devices.has_cuda() else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=group.rank, world_size=group.size)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=group.tensor, context_parallel_size=group.context
        )
        model_parallel_cuda_manual_seed(1)
