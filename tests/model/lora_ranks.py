"""Compute a model's loss and gradients with adapters, on each rank of a tensor-parallel group.

torchrun ... lora_ranks.py FOLDER: FOLDER has the model in hf/, PEFT's adapter in peft/, and the batch in batch.pt. Rank 0
writes VARIANT.pt: the losses, and the whole gradient of each trained parameter by PEFT's name. Those in NF4, which need
torchao, have the unpacked weights too.
"""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

from megatron_cream.patches import platform

platform.setup()

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from safetensors.torch import load_file

from megatron_cream.checkpoint.adapters import adapter_rows, fill_adapters, list_layers, trained_rows
from megatron_cream.checkpoint.convert import build_reader
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.mapping import hf_shapes, list_parameters, split
from megatron_cream.checkpoint.model import fill_model, transformer_config
from megatron_cream.model.attention import choose_backend
from megatron_cream.model.llama import LlamaModelBuilder, LlamaModelConfig
from megatron_cream.model.lora_settings import LoraSettings
from megatron_cream.model.nf4 import Nf4Weight

SETTINGS = LoraSettings(rank=4, alpha=6.0, rank_stabilized=True)
# {variant: (sequence parallelism, settings)}
VARIANTS = {
    "all": (False, SETTINGS),
    "sequence-parallel": (True, SETTINGS),
    "adapters-only": (False, replace(SETTINGS, trained=())),  # recomputed layers whose input has no gradient
    "nf4": (False, replace(SETTINGS, base_dtype="nf4")),
    "nf4-sequence-parallel": (True, replace(SETTINGS, base_dtype="nf4")),
    "some-targets": (False, replace(SETTINGS, targets=("q_proj", "v_proj", "gate_proj", "down_proj"), dropout=0.5)),
}
PEFT = "base_model.model."


def build_model(source: HfFolder, sequence_parallel: bool, settings: LoraSettings):
    shape = source.shape
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformer_config(
        shape,
        use_cpu_initialization=True,
        tensor_model_parallel_size=groups.tp.size(),
        sequence_parallel=sequence_parallel,
        pipeline_dtype=torch.float32,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    model = LlamaModelConfig(
        transformer=config,
        vocab_size=shape.vocab_size,
        should_pad_vocab=True,
        make_vocab_size_divisible_by=128,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",
        rotary_base=shape.rope_theta,
        rope_scaling_config=shape.rope_scaling,
        rope_max_positions=shape.max_position_embeddings,
        real_vocab_size=shape.vocab_size,
        attention=choose_backend("sdpa", has_cuda=False, half=False),
        lora=settings,
    )
    return LlamaModelBuilder(model).build_model(groups, pre_process=True, post_process=True), groups


def gather(tensor: torch.Tensor, axis: int | None, group) -> torch.Tensor:
    if axis is None:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, axis)


def unpack_base(model, shape, group) -> dict[str, torch.Tensor]:
    """Return the whole weights that are in NF4, by PEFT's name; each rank has packed its own part."""
    modules, found = dict(model.named_modules()), {}
    for row, layer in list_parameters(shape):
        module = modules.get(row.module_name(layer, False))
        if isinstance(module, Nf4Weight):
            whole = gather(module.unpack(), row.split_axis, group)
            if row.fusion == "gate_up":
                whole = torch.cat([torch.cat(part) for part in zip(*(x.chunk(2) for x in whole.chunk(group.size())))])
            parts = zip(row.names(layer), split(row, whole, shape), hf_shapes(row, shape), strict=True)
            found |= {PEFT + name: part.reshape(size).clone() for name, part, size in parts}
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    ranks = int(os.environ["WORLD_SIZE"])
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    for name, variant in VARIANTS.items():
        lacks_torchao = variant[1].base_dtype == "nf4" and importlib.util.find_spec("torchao") is None
        if (ranks > 1 or not variant[0]) and not lacks_torchao:
            found = compute_gradients(folder, *variant)
            if torch.distributed.get_rank() == 0:
                torch.save(found, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def compute_gradients(folder: Path, sequence_parallel: bool, settings: LoraSettings) -> dict[str, torch.Tensor]:
    source = HfFolder(folder / "hf")
    shape = source.shape
    model, groups = build_model(source, sequence_parallel, settings)
    fill_model(model, shape, build_reader(source))
    saved = load_file(folder / "peft" / "adapter_model.safetensors")
    get = lambda row, layer: saved[PEFT + row.names(layer)[0]]
    fill_adapters(model, settings.targets, shape.num_layers, get)

    batch = torch.load(folder / "batch.pt")
    inputs = (batch["tokens"], batch["ids"], None)
    if settings.dropout:
        dropped = model(*inputs, labels=batch["labels"]).detach()
        return {"dropped": dropped, "losses": model.eval()(*inputs, labels=batch["labels"]).detach()}
    losses = model(*inputs, labels=batch["labels"])
    losses.sum().backward()
    model.ddp_config = DistributedDataParallelConfig()  # read by the next function
    _allreduce_non_tensor_model_parallel_grads([model], model.config, groups.tp)
    parameters = dict(model.named_parameters())
    found = {"losses": losses.detach(), **unpack_base(model, shape, groups.tp)}
    table = [*adapter_rows(settings.targets), *trained_rows(shape, settings.trained)]
    for row, layer in list_layers(table, shape.num_layers):
        (name,) = {row.module_name(layer, is_te) for is_te in (True, False)} & parameters.keys()
        whole = gather(parameters.pop(name).grad, row.split_axis, groups.tp)
        parts = split(row, whole, shape)
        found |= {PEFT + key: part.clone() for key, part in zip(row.names(layer), parts, strict=True)}
    assert all(weight.grad is None and not weight.requires_grad for weight in parameters.values())
    return found


if __name__ == "__main__":
    main()
