"""LoRA on Megatron's parallel linears, with trained embeddings and norms.

LoRA is of Hu et al. 2021; training embeddings and norms besides is LongLoRA's (Chen et al. 2023).

Each projection of Hugging Face's model (q_proj, gate_proj ...) has its own A and B, also where Megatron computes
several of them in one linear. So the matrices are those of PEFT's adapters. A hook adds their product to the output of
the linear, which stays as it is. The frozen weights have no gradients and no optimizer state.
"""

import math
from collections.abc import Sequence

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_cream.model.lora_settings import LINEARS, NAME, ROW_PARALLEL, TARGETS, TRAINED, LoraSettings


def add_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Add adapters to the layers of a pipeline stage, and freeze the other weights.

    Args:
        model: this rank's part of a LlamaModel.
        settings: of the adapters.
    """
    ends = tuple(end for name in settings.trained for end in TRAINED[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(ends))
    for layer in model.decoder.layers:
        adapters = MegatronModule(model.config)
        for name, linear in _find_linears(layer):
            targets = [target for target in LINEARS[name] if target in settings.targets]
            if targets:
                group = model.pg_collection.tp
                adapter = Adapter(model.config, settings, name, targets, linear, layer.layer_number, group)
                adapters.add_module(name, adapter)
                linear.register_forward_hook(_build_hook(adapter))
        layer.add_module(NAME, adapters)


def _find_linears(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        ("linear_qkv", layer.self_attention.linear_qkv),
        ("linear_proj", layer.self_attention.linear_proj),
        ("linear_fc1", layer.mlp.linear_fc1),
        ("linear_fc2", layer.mlp.linear_fc2),
    ]


def _build_hook(adapter: "Adapter"):
    def add_to_output(linear, inputs, output):
        result, *others = output
        return (adapter(inputs[0], result), *others)

    return add_to_output


class Adapter(MegatronModule):
    """The A and B of each projection that one linear computes; its output is added to the linear's.

    Parameters are NAME_A [rank, inputs] and NAME_B [outputs, rank], divided over the tensor-parallel ranks as the
    linear's weight is: B of a column-parallel linear by rows, A of a row-parallel linear by columns. Communication
    between the ranks has the width of the ranks of the adapters, not of the model.

    Args:
        config: Megatron's configuration.
        settings: of all adapters.
        name: of the linear, in `LINEARS`.
        targets: the projections of the linear that have an adapter.
        linear: the linear.
        layer_number: number of the layer in the whole model.
        tp_group: the tensor-parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        settings: LoraSettings,
        name: str,
        targets: list[str],
        linear: nn.Module,
        layer_number: int,
        tp_group: torch.distributed.ProcessGroup,
    ):
        super().__init__(config)
        self.scale, self.dropout = settings.scale, settings.dropout
        self.targets, self.linear_name = targets, name
        self.is_row_parallel = name in ROW_PARALLEL
        self.tp_group, size, rank = tp_group, tp_group.size(), tp_group.rank()
        self.widths = {target: width // size for target, width in _output_widths(config, name).items()}
        inputs = linear.weight.shape[1] * (size if self.is_row_parallel else 1)
        for target in targets:
            # The same values at any layout.
            seed = (settings.seed * config.num_layers + layer_number) * len(TARGETS) + TARGETS.index(target)
            a = torch.empty(settings.rank, inputs)
            bound = 1 / math.sqrt(inputs)  # as PEFT: Kaiming's uniform distribution with a = sqrt(5)
            a.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
            if self.is_row_parallel:
                a, outputs = a.chunk(size, dim=1)[rank], config.hidden_size
            else:
                outputs = self.widths[target]
            self._register(f"{target}_A", a, linear.weight)
            self._register(f"{target}_B", torch.zeros(outputs, settings.rank), linear.weight)

    def _register(self, name: str, values: Tensor, like: Tensor) -> None:
        parameter = nn.Parameter(values.to(device=like.device, dtype=self.config.params_dtype, copy=True).contiguous())
        axis = self.split_axis(name)
        if axis is not None:
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, axis, 1)
        else:  # each rank computes the gradient of its part of the sequence
            parameter.sequence_parallel = self.config.sequence_parallel
        self.register_parameter(name, parameter)

    def split_axis(self, name: str) -> int | None:
        """Return the axis of a parameter that tensor parallelism divides."""
        if self.is_row_parallel:
            return 1 if name.endswith("_A") else None
        return 0 if name.endswith("_B") else None

    def forward(self, x: Tensor, result: Tensor) -> Tensor:
        """Return the linear's output with the adapters' added, for its input [s, b, h]."""
        every = [getattr(self, f"{target}_A") for target in self.targets]
        a = torch.cat(every) if len(every) > 1 else every[0]
        low = nn.functional.linear(self._drop(x), a) * self.scale  # [s, b, rank * len(targets)]
        if self.is_row_parallel:
            reduce = (
                tensor_parallel.reduce_scatter_to_sequence_parallel_region
                if self.config.sequence_parallel
                else tensor_parallel.reduce_from_tensor_model_parallel_region
            )
            low = reduce(low, group=self.tp_group)
        elif self.config.sequence_parallel:
            low = tensor_parallel.gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = tensor_parallel.copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return _AddProduct.apply(result, low, self._joined_b())

    def _joined_b(self) -> Tensor:
        """Return the B of all projections of the linear as one matrix [rank * len(targets), outputs]."""
        if len(self.widths) == 1:
            return getattr(self, f"{self.targets[0]}_B").t()
        like = getattr(self, f"{self.targets[0]}_B")
        blocks = [
            getattr(self, f"{target}_B").t() if target in self.targets else like.new_zeros(0, width)
            for target, width in self.widths.items()
        ]
        joined = torch.block_diag(*blocks)
        if self.linear_name != "linear_qkv":
            return joined
        return self._join_groups(joined.split(list(self.widths.values()), dim=-1))

    def _join_groups(self, parts: Sequence[Tensor]) -> Tensor:
        """Return query, key and value in Megatron's order: for each group its query heads, its key, its value."""
        groups = self.config.num_query_groups // self.tp_group.size()
        heads = [part.unflatten(-1, (groups, -1, self.config.kv_channels)) for part in parts]
        return torch.cat(heads, dim=-2).flatten(-3)

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return x
        if self.is_row_parallel or self.config.sequence_parallel:  # each rank has other values
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return nn.functional.dropout(x, self.dropout)
        return nn.functional.dropout(x, self.dropout)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        axes = {name: axis for name, _ in self.named_parameters() if (axis := self.split_axis(name)) is not None}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class _AddProduct(torch.autograd.Function):
    """Add low @ b to the output of a linear in one kernel, without a copy.

    The output is overwritten, which no linear's backward pass reads. It is not marked as dirty, since autograd forbids
    that for the views that Megatron's and Transformer Engine's functions return.
    """

    @staticmethod
    def forward(ctx, result: Tensor, low: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(low, b)
        flat, low = result.detach().view(-1, b.shape[1]), low.reshape(-1, b.shape[0])
        if flat.is_cuda:
            flat.addmm_(low, b)
        else:  # the CPU's addmm rounds more
            flat.add_(low @ b)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, b = ctx.saved_tensors
        flat = grad.reshape(-1, b.shape[1])
        return grad, (flat @ b.t()).view_as(low), low.reshape(-1, b.shape[0]).t() @ flat


def _output_widths(config: TransformerConfig, linear: str) -> dict[str, int]:
    """Return {projection: outputs} of a linear, over all ranks."""
    queries = config.num_attention_heads * config.kv_channels
    keys = config.num_query_groups * config.kv_channels
    widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    widths |= {"gate_proj": config.ffn_hidden_size, "up_proj": config.ffn_hidden_size}
    return {name: widths.get(name, config.hidden_size) for name in LINEARS[linear]}
