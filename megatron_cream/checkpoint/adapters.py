"""The table of a LoRA adapter's parameters: Megatron's names, Hugging Face's names, and how ranks divide them."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_cream.checkpoint.families import ModelShape
from megatron_cream.checkpoint.mapping import LAYERS, Row, hf_shapes, rows, tensor_parallel_shard
from megatron_cream.common.cli import split_names
from megatron_cream.model.lora_settings import LINEARS, NAME, ROW_PARALLEL, TARGETS, TRAINED, LoraSettings


def adapter_rows(targets: Sequence[str]) -> list[Row]:
    """Return a row for A and for B of each target."""
    table = []
    for linear, names in LINEARS.items():
        module = "self_attn" if linear in ("linear_qkv", "linear_proj") else "mlp"
        axes = (1, None) if linear in ROW_PARALLEL else (None, 0)
        for name in names:
            if name in targets:
                table += [
                    Row(
                        f"{LAYERS}{NAME}.{linear}.{name}_{letter}",
                        (f"{module}.{name}.lora_{letter}.weight",),
                        "copy",
                        axis,
                    )
                    for letter, axis in zip("AB", axes, strict=True)
                ]
    return table


def trained_rows(shape: ModelShape, trained: Sequence[str]) -> list[Row]:
    """Return the rows of the model's own weights that train beside an adapter, by names of `TRAINED`."""
    ends = tuple(end for name in trained for end in TRAINED[name])
    return [row for row in rows(shape) if row.key.endswith(ends)]


def settings_of(args: Namespace) -> LoraSettings | None:
    """Return the settings of the adapters, from the flags of a run or a checkpoint; None if all weights train."""
    if not getattr(args, "lora_rank", 0):
        return None
    targets, trained = split_names(args.lora_targets), split_names(args.lora_train)
    return LoraSettings(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=tuple(name for name in TARGETS if name in targets),
        trained=tuple(name for name in TRAINED if name in trained),
        rank_stabilized=args.lora_rslora,
        seed=args.seed,
        base_dtype=getattr(args, "lora_base_dtype", "model"),
    )


def list_layers(table: list[Row], num_layers: int) -> Iterator[tuple[Row, int | None]]:
    """Yield each row of a table, for every layer if it belongs to the layers."""
    for row in table:
        for layer in range(num_layers) if row.is_layered else [None]:
            yield row, layer


def adapter_shape(row: Row, shape: ModelShape, rank: int) -> tuple[int, ...]:
    """Return the shape of a row of `adapter_rows`, for one layer and all ranks."""
    path, matrix, _ = row.hf[0].rsplit(".", 2)
    outputs, inputs = hf_shapes(Row("", (f"{path}.weight",)), shape)[0]
    return (rank, inputs) if matrix == "lora_A" else (outputs, rank)


@torch.no_grad()
def fill_adapters(
    model: torch.nn.Module, targets: Sequence[str], num_layers: int, get: Callable[[Row, int], Tensor]
) -> None:
    """Copy adapters into this rank's part of a model.

    Args:
        model: a LlamaModel with adapters.
        targets: the projections with adapters.
        num_layers: layers of the whole model.
        get: returns the whole parameter of a row and a layer.
    """
    parameters = dict(model.named_parameters())
    group = model.pg_collection.tp
    first = min((layer.layer_number for layer in model.decoder.layers), default=1) - 1
    for row, layer in list_layers(adapter_rows(targets), num_layers):
        name = row.module_name(layer - first, transformer_engine=True)
        if layer >= first and name in parameters:
            parameters[name].copy_(tensor_parallel_shard(row, get(row, layer), group.rank(), group.size()))
