"""Convert a Hugging Face folder to a Megatron checkpoint and back.

The conversion is streamed, in one process, without a GPU.
"""

import threading
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_cream.checkpoint import card, carried, output, window
from megatron_cream.checkpoint.classic import write_classic
from megatron_cream.checkpoint.families import ModelShape
from megatron_cream.checkpoint.hf_folder import CONFIG, Group, HfFolder, write_config, write_weights
from megatron_cream.checkpoint.mapping import (
    Row,
    hf_shapes,
    join,
    list_parameters,
    megatron_shape,
    pad_vocab_size,
    split,
)
from megatron_cream.checkpoint.megatron_folder import HF, MegatronCheckpoint, write_torch_dist
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import write_json
from megatron_cream.common.progress_bar import TransferBar

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Files written at the same time; each thread hashes its file. An import writes this many files of equal size. An
# export's shards differ in size, and more threads avoid a long wait for the last one.
_IMPORT_THREADS, _EXPORT_THREADS = 2, 4
SPARE_BYTES = 64 << 20  # for tokenizer, metadata and file system overhead


def import_hf(
    source: HfFolder,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    vocabulary_divisor: int = 128,
    checkpoint_format: Literal["torch_dist", "torch"] = "torch_dist",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    transformer_engine: bool = True,
    overwrite: bool = False,
    progress: TransferBar | None = None,
) -> None:
    """Write a Megatron checkpoint of a Hugging Face model, as a `release` to train from.

    Args:
        source: the Hugging Face model.
        target: folder of the checkpoint to write.
        dtype: dtype of the checkpoint; None keeps each tensor's own.
        vocabulary_divisor: the vocabulary is padded with zeros to a multiple of it.
        checkpoint_format: torch_dist loads at any layout; torch is one file for each rank of
            `tensor_parallel` x `pipeline_parallel`, with the parameter names of Transformer
            Engine's layers or of this project's.
        tensor_parallel: number of ranks, for the format torch.
        pipeline_parallel: number of ranks, for the format torch.
        transformer_engine: use Transformer Engine's parameter names, for the format torch.
        overwrite: replace an earlier conversion in `target`.
        progress: called with the number of bytes written.

    Raises:
        UsageError: nothing was written; the message says why.
    """
    shape = source.shape
    carried.check_files(source.path, vocabulary=shape.vocab_size)
    padded = pad_vocab_size(shape.vocab_size, vocabulary_divisor)

    # One dtype for all layers, because they share a tensor in the checkpoint.
    kinds: dict[str, torch.dtype] = {}
    for row, layer in list_parameters(shape):
        for name in row.names(layer):
            kind = dtype or source.dtype(name)
            kinds[row.key] = torch.promote_types(kinds.get(row.key, kind), kind)

    scratch, read = _Scratch(), build_reader(source)

    def produce(row: Row, layer: int | None) -> Tensor:
        names = row.names(layer)
        out = read(row, layer, scratch.get(megatron_shape(row, shape, padded), kinds[row.key]))
        if dtype is not None:
            _check_range(out, map(source.dtype, names), lambda: zip(names, map(source.get, names)))
        return out

    needs = sum(
        torch.Size(megatron_shape(row, shape, padded)).numel() * kinds[row.key].itemsize
        for row, _ in list_parameters(shape)
    )
    common_state = {
        "args": checkpoint_args(shape, padded, tensor_parallel, pipeline_parallel),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }
    progress = progress or TransferBar(None)
    progress.expect(needs)
    with output.new_folder(target, flag="--output", overwrite=overwrite, needs_bytes=needs + SPARE_BYTES) as folder:
        step = folder / "release"
        step.mkdir()
        if checkpoint_format == "torch":
            hashes = write_classic(
                step,
                shape,
                padded_vocab_size=padded,
                dtypes=kinds,
                produce=produce,
                common_state=common_state,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
                transformer_engine=transformer_engine,
                progress=progress,
            )
        else:
            hashes = write_torch_dist(
                step,
                shape,
                padded_vocab_size=padded,
                dtypes=kinds,
                produce=produce,
                common_state=common_state,
                threads=_IMPORT_THREADS,
                progress=progress,
            )
        output.write_manifest(step, hashes)
        (folder / HF).mkdir()
        write_json(folder / HF / CONFIG, source.config)
        carried.copy_files(source.path, folder / HF)
        output.write_manifest(folder / HF, {})
        output.write_manifest(folder, {f"release/{name}": digest for name, digest in hashes.items()})
        (folder / TRACKER).write_text("release")


def check_no_overlap(source: Path, target: Path, *, flag: str) -> None:
    """Raise UsageError if writing `target` would remove all or part of `source`.

    Args:
        source: the folder that is read.
        target: the folder to write.
        flag: the flag that gave `target`, for messages.
    """
    read, written = source.resolve(), target.resolve()
    if read == written or written in read.parents or (read in written.parents and target.exists()):
        raise UsageError(f"{flag} {target}: must not overlap the source folder, {source}")


def _check_range(out: Tensor, before: Iterable[torch.dtype], again: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
    """Raise UsageError if the cast to the dtype of `out` made a finite value infinite.

    Args:
        out: the values after the cast.
        before: the dtypes before the cast.
        again: reads the (name, tensor) pairs again, as they were before the cast.
    """
    wider = any(torch.finfo(kind).max > torch.finfo(out.dtype).max for kind in before)
    if not wider or all(value.isfinite() for value in out.aminmax()):
        return
    for name, tensor in again():
        lost = tensor[tensor.isfinite() & tensor.to(out.dtype).isinf()]
        if lost.numel():
            flag = next(flag for flag, kind in DTYPES.items() if kind == out.dtype)
            raise UsageError(f"--dtype {flag}: {name} contains {lost.abs().max():.4g}, which {flag} cannot represent")


def build_reader(source: HfFolder) -> Callable[[Row, int | None, Tensor], Tensor]:
    """Return a function (row, layer, out) that fills and returns the Megatron parameter."""
    return lambda row, layer, out: join(row, [source.get(name) for name in row.names(layer)], source.shape, out)


def checkpoint_args(
    shape: ModelShape, padded_vocab_size: int, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> Namespace:
    """Return the flags that Megatron and `MegatronCheckpoint` read from a checkpoint."""
    return Namespace(
        **shape.megatron_args(),
        padded_vocab_size=padded_vocab_size,
        target_length=shape.max_position_embeddings,
        max_position_embeddings=shape.max_position_embeddings,
        rope_scaling_config=shape.rope_scaling,
        rope_window=shape.original_window,
        position_embedding_type="none",
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        world_size=tensor_parallel * pipeline_parallel,
        data_parallel_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        no_save_optim=True,
        no_save_rng=True,
    )


def export_hf(
    source: MegatronCheckpoint,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    flag: str = "--hf-path",
    with_card: bool = False,
    progress: TransferBar | None = None,
) -> None:
    """Export a checkpoint of any layout to a folder that transformers and vLLM load.

    Args:
        source: the checkpoint to export.
        target: the folder to write.
        dtype: dtype of the exported weights; None keeps each parameter's own.
        max_shard_bytes: largest size of a shard with several parameters.
        overwrite: replace an earlier conversion in `target`.
        flag: the flag that gave `target`, for messages.
        with_card: write a model card, if a run saved the checkpoint.
        progress: called with the number of bytes written.

    Raises:
        UsageError: nothing was written; the message says why.
    """
    if source.hf_folder:
        carried.check_files(source.hf_folder, vocabulary=source.shape.vocab_size)
    groups = export_groups(source, dtype)
    needs = sum(group.nbytes for group in groups)
    progress = progress or TransferBar(None)
    progress.expect(needs)
    with output.new_folder(target, flag=flag, overwrite=overwrite, needs_bytes=needs + SPARE_BYTES) as folder:
        hashes = write_weights(
            folder, groups, max_shard_bytes=max_shard_bytes, threads=_EXPORT_THREADS, progress=progress
        )
        kinds = {kind for group in groups for _, kind, _ in group.entries}
        write_config(folder, source.shape, source.config, max(kinds, key=lambda kind: kind.itemsize))
        if source.hf_folder:
            carried.copy_files(source.hf_folder, folder)
            if source.is_stretched:
                window.raise_limits(folder, source.shape.max_position_embeddings)
        if with_card and card.is_trained(source):
            card.write_card(folder, source, target.name)
        output.write_manifest(folder, hashes)


def export_groups(source: MegatronCheckpoint, dtype: torch.dtype | None) -> list[Group]:
    """Return the Hugging Face model's tensors, grouped by their Megatron parameter."""
    scratch = _Scratch()
    shape = source.shape

    def group(row: Row, layer: int | None) -> Group:
        own = source.dtype(row, layer)
        kind, out_shape = dtype or own, megatron_shape(row, shape, shape.vocab_size)

        def produce() -> list[Tensor]:
            out = scratch.get(out_shape, kind)
            source.read(row, layer, out)
            if dtype is not None:
                _check_range(out, [own], lambda: zip(row.names(layer), read_again()))
            return split(row, out, shape)

        def read_again() -> list[Tensor]:
            return split(row, source.read(row, layer, torch.empty(out_shape, dtype=own)), shape)

        names = zip(row.names(layer), hf_shapes(row, shape), strict=True)
        return Group([(name, kind, size) for name, size in names], produce)

    return [group(row, layer) for row, layer in list_parameters(shape)]


class _Scratch:
    """One buffer per thread, reused for each parameter.

    Page faults on new memory of these sizes cost more than filling it.
    """

    def __init__(self):
        self._threads = threading.local()

    def get(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        memory = getattr(self._threads, "memory", None)
        if memory is None or memory.nbytes < count * dtype.itemsize:
            self._threads.memory = memory = np.empty(count * dtype.itemsize, dtype=np.uint8)
        # From the buffer, not a view of a larger tensor, because torch's writer would copy a view.
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
