"""Write Megatron's older checkpoint format, one `mp_rank_XX` file per model-parallel rank."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_cream.checkpoint.families import ModelShape
from megatron_cream.checkpoint.mapping import LINEARS, Row, list_parameters, megatron_shape, tensor_parallel_shard
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.safe_pickle import load_plain


def write_classic(
    folder: Path,
    shape: ModelShape,
    *,
    padded_vocab_size: int,
    dtypes: dict[str, torch.dtype],
    produce: Callable[[Row, int | None], Tensor],
    common_state: dict[str, Any],
    tensor_parallel: int,
    pipeline_parallel: int,
    transformer_engine: bool,
    progress: Callable[[int], None],
) -> dict[str, str]:
    """Write files that Megatron loads with `--ckpt-format torch`, at this layout only.

    Each file is first written with space for its tensors, which are then filled in one by one, so
    that only one parameter is in memory at a time.

    Args:
        folder: step folder, empty; each model-parallel rank gets a folder in it.
        shape: shape of the model.
        padded_vocab_size: rows of the embedding, with padding.
        dtypes: dtype of each parameter, by its key.
        produce: returns a whole parameter of a layer, given its row and the layer's number.
        common_state: Megatron's state beside the tensors (args, iteration ...).
        tensor_parallel: number of tensor-parallel ranks; must divide the heads, the feed-forward
            size and the padded vocabulary.
        pipeline_parallel: number of pipeline-parallel ranks; must divide the layers.
        transformer_engine: name the norms as Transformer Engine's layers do, not as this project's.
        progress: called with the number of bytes written.

    Returns: no checksums, since the files are not written sequentially.

    Raises:
        UsageError: the layout does not divide the model.
    """
    _check_layout(shape, padded_vocab_size, tensor_parallel, pipeline_parallel)
    ranks = [(tp, pp) for pp in range(pipeline_parallel) for tp in range(tensor_parallel)]

    def shard_names(row: Row, layer: int | None) -> list[tuple[int, str]]:
        """Return (pipeline rank, name on it) for each rank that has this parameter."""
        if layer is not None:
            stage, local = divmod(layer, shape.num_layers // pipeline_parallel)
            return [(stage, row.module_name(local, transformer_engine))]
        if row.key.startswith("embedding."):
            tied_copy = [(pipeline_parallel - 1, "output_layer.weight")] if shape.tied and pipeline_parallel > 1 else []
            return [(0, row.key), *tied_copy]
        return [(pipeline_parallel - 1, row.key)]

    with FakeTensorMode():  # sizes without memory
        models: dict[tuple[int, int], dict[str, Any]] = {rank: {} for rank in ranks}
        for row, layer in list_parameters(shape):
            whole = torch.empty(megatron_shape(row, shape, padded_vocab_size), dtype=dtypes[row.key])
            for tp, pp in ranks:
                for stage, name in shard_names(row, layer):
                    if stage == pp:
                        models[tp, pp][name] = tensor_parallel_shard(row, whole, tp, tensor_parallel).clone()
        for model in models.values():
            for layer in range(shape.num_layers // pipeline_parallel):
                model |= {f"decoder.layers.{layer}.{linear}._extra_state": None for linear in LINEARS}

    with contextlib.ExitStack() as stack:
        files, offsets = {}, {}
        for (tp, pp), model in models.items():
            name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pipeline_parallel > 1 else "")
            path = folder / name / "model_optim_rng.pt"
            path.parent.mkdir()
            try:
                with torch.serialization.skip_data(materialize_fake_tensors=True):
                    torch.save(common_state | {"model": model}, path)
            except RuntimeError as error:  # torch's zip writer hides the system's error
                raise OSError(f"{path}: torch cannot write it: {one_line(error, 100)}") from error
            with FakeTensorMode():
                placed = load_plain(path)["model"]
            offsets[tp, pp] = {
                name: tensor.untyped_storage()._checkpoint_offset
                for name, tensor in placed.items()
                if tensor is not None
            }
            files[tp, pp] = stack.enter_context(open(path, "r+b"))
        for row, layer in list_parameters(shape):
            whole = produce(row, layer)
            for tp, pp in ranks:
                for stage, name in shard_names(row, layer):
                    if stage == pp:
                        shard = tensor_parallel_shard(row, whole, tp, tensor_parallel).contiguous()
                        files[tp, pp].seek(offsets[tp, pp][name])
                        files[tp, pp].write(shard.view(torch.uint8).reshape(-1).numpy())
                        progress(shard.nbytes)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return {}


def _check_layout(shape: ModelShape, padded_vocab_size: int, tensor_parallel: int, pipeline_parallel: int) -> None:
    divided = {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "intermediate_size": shape.ffn_hidden_size,
        "padded vocabulary": padded_vocab_size,
    }
    for name, size in divided.items():
        if size % tensor_parallel:
            raise UsageError(f"--tensor-model-parallel-size {tensor_parallel}: must divide the model's {name}, {size}")
    if shape.num_layers % pipeline_parallel:
        raise UsageError(
            f"--pipeline-model-parallel-size {pipeline_parallel}: must divide the model's layers, {shape.num_layers}"
        )
