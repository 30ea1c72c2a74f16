"""Read and write a Megatron checkpoint one tensor at a time, without a process group.

The format is Megatron's `torch_dist`: torch.distributed.checkpoint with the keys and stacked layers of
Megatron's sharded state dicts. Reading and writing use torch's planner and storage interfaces.
"""

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_cream.checkpoint.families import ModelShape, read_config, shape_from_args
from megatron_cream.checkpoint.mapping import LAYERS, LINEARS, Row, megatron_shape, rows
from megatron_cream.checkpoint.opening import Step, find_step_folder, open_step, read_newest_step
from megatron_cream.checkpoint.output import HashingFile
from megatron_cream.common.errors import UsageError, one_line

HF = "hf"  # folder with config.json, tokenizer and generation config of the original model
_COMMON_STATE = "common_state/shard_0_1"


# ---------------------------------------------------------------- reading


class MegatronCheckpoint:
    """The parameters of one saved step, of any layout.

    Attributes:
        path: folder of all steps, as given to --save.
        step: the iteration, or "release" for a converted model.
        folder: folder of the step.
        args: flags that it was trained or converted with.
        config: config.json of the original model, or None.
        shape: shape of the model, with the rotary embedding that it was trained for.

    Args:
        step: the iteration or "release"; None is the newest.
        flag: the flag that gave `path`, for messages.
        checksums: as in `open_step`.
        opened: the step, if it was opened before.

    Raises:
        UsageError: a file or parameter is missing or unreadable; the message names it.
    """

    def __init__(
        self,
        path: Path,
        step: int | str | None = None,
        *,
        flag: str = "--checkpoint",
        checksums: bool = True,
        opened: Step | None = None,
    ):
        self.path, self._where = path, f"{flag} {path}"
        self.step = read_newest_step(path, flag) if step is None else step
        saved = opened or open_step(find_step_folder(path, self.step, flag), flag, checksums=checksums)
        self.folder, self.args, self._metadata = saved.folder, saved.args, saved.metadata
        self._reader = dcp.FileSystemReader(self.folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.config, self.shape = self._read_model()
        self._check()

    @property
    def hf_folder(self) -> Path | None:
        """Folder with the original model's config.json and tokenizer, or None."""
        return self.path / HF if (self.path / HF).is_dir() else None

    @property
    def is_stretched(self) -> bool:
        """Whether its window is larger than the original model's, or there is no original model."""
        return self._original is None or self.shape.max_position_embeddings > self._original.window

    def dtype(self, row: Row, layer: int | None) -> torch.dtype:
        """Return the saved dtype of a parameter."""
        return self._tensors[self._find_key(row, layer)[0]].properties.dtype

    def read(self, row: Row, layer: int | None, out: Tensor) -> Tensor:
        """Fill `out` with a whole parameter of one layer, cast to out's dtype, and return it.

        For a vocabulary, `out` may have fewer rows than the saved tensor (its padding), or more (left unchanged).

        Raises:
            UsageError: the parameter is incomplete or unreadable.
        """
        key, stacked = self._find_key(row, layer)
        stored = self._tensors[key]
        target = out.unsqueeze(0) if stacked else out
        if row.fusion == "vocabulary":
            target = target[: stored.size[0]]
        offsets = torch.Size([layer if stacked else 0] + [0] * (target.dim() - 1))
        box = ChunkStorageMetadata(offsets=offsets, sizes=target.shape)
        items = create_read_items_for_chunk_list(key, stored, [box])
        covered = sum(item.lengths.numel() for item in items)
        if covered != target.numel():
            raise UsageError(f"{self._where}: {key}: {target.numel() - covered} elements were not saved")
        try:
            indirect = [item for item in items if not self._read_directly(item, stored, target)]
            if indirect:
                self._reader.read_data(LoadPlan(indirect), _TensorLoader(target)).wait()
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            files = sorted({self._metadata.storage_data[item.storage_index].relative_path for item in items})
            where, reason = f"{self._where}: {self.folder.name}/{', '.join(files)}", one_line(error, 200)
            raise UsageError(f"{where}: {key} cannot be read: {reason}") from error
        return out

    def _read_directly(self, item: ReadItem, stored: TensorStorageMetadata, target: Tensor) -> bool:
        """Read a saved chunk straight from the file into `target`, if both have the same layout.

        torch's own reader copies every chunk twice.

        Returns: whether the chunk was read.
        """
        info = self._metadata.storage_data[item.storage_index]
        place = _TensorLoader(target).resolve_tensor(item)
        whole_rows = place.is_contiguous() and target.dtype == stored.properties.dtype
        chunk = next(chunk for chunk in stored.chunks if chunk.offsets == item.storage_index.offset)
        if not whole_rows or info.transform_descriptors or chunk.sizes[1:] != item.lengths[1:]:
            return False
        with open(self.folder / Path(info.relative_path).name, "rb") as file:
            with FakeTensorMode():  # only the offset in the file, not the data
                view = _create_file_view(file, info.offset, info.length)
                storage = torch.load(view, weights_only=True).untyped_storage()
            first = item.storage_offsets[0] * (storage.nbytes() // chunk.sizes[0])
            file.seek(info.offset + storage._checkpoint_offset + first)
            is_complete = file.readinto(place.view(torch.uint8).reshape(-1).numpy()) == place.nbytes
            # Each chunk is read once, so free its pages for the file that is being written.
            os.posix_fadvise(file.fileno(), info.offset, info.length, os.POSIX_FADV_DONTNEED)
            return is_complete

    def _find_key(self, row: Row, layer: int | None) -> tuple[str, bool]:
        """Return the key in the checkpoint, and whether its tensor has all layers."""
        if row.key in self._tensors:
            return row.key, row.is_layered
        return row.module_name(layer, transformer_engine=True), False

    def _read_model(self) -> tuple[dict[str, Any] | None, ModelShape]:
        config = original = None
        if (self.path / HF / "config.json").is_file():
            config, original = read_config(self.path / HF)
        self._original = original
        try:
            shape = shape_from_args(self.args, original)
            shape.rotary()
        except (AttributeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
            raise UsageError(f"{self._where}: not a checkpoint of this project's models: {one_line(error)}") from error
        return config, shape

    def _check(self) -> None:
        for row in rows(self.shape):
            self._check_row(row)

    def _check_row(self, row: Row) -> None:
        self._check_shape(row, megatron_shape(row, self.shape, self.shape.vocab_size))

    def _check_shape(self, row: Row, needed: tuple[int, ...]) -> None:
        """Check that a parameter is there, for all layers, with the shape `needed` for one layer."""
        per_layer = row.is_layered and row.key not in self._tensors
        for layer in range(self.shape.num_layers) if per_layer else [0]:
            self._check_parameter(row, layer, needed)

    def _check_parameter(self, row: Row, layer: int, needed: tuple[int, ...]) -> None:
        key, stacked = self._find_key(row, layer)
        if key not in self._tensors:
            raise UsageError(f"{self._where}: parameter {row.key} is missing")
        saved = tuple(self._tensors[key].size)
        needed = (self.shape.num_layers, *needed) if stacked else needed
        fits = saved[0] >= needed[0] and saved[1:] == needed[1:] if row.fusion == "vocabulary" else saved == needed
        if not fits:
            raise UsageError(
                f"{self._where}: parameter {row.key} has shape {list(saved)}; its flags require {list(needed)}"
            )


class _TensorLoader(dcp.LoadPlanner):
    """Load planner that reads into parts of one tensor."""

    def __init__(self, target: Tensor):
        self._target = target

    def resolve_tensor(self, read_item) -> Tensor:
        tensor = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(axis, start, length)
        return tensor

    def commit_tensor(self, read_item, tensor) -> None:
        pass

    def set_up_planner(self, *args, **kwargs):
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner


# ---------------------------------------------------------------- writing


def write_torch_dist(
    folder: Path,
    shape: ModelShape,
    *,
    padded_vocab_size: int,
    dtypes: dict[str, torch.dtype],
    produce: Callable[[Row, int | None], Tensor],
    common_state: dict[str, Any],
    threads: int,
    progress: Callable[[int], None],
) -> dict[str, str]:
    """Write a `torch_dist` checkpoint step that Megatron loads at any layout.

    Args:
        folder: step folder, empty.
        shape: shape of the model.
        padded_vocab_size: rows of the embedding, with padding.
        dtypes: dtype of each parameter, by its key.
        produce: returns a whole parameter of a layer. Runs in `threads` threads at the same time; a
            thread may reuse the tensor in its next call.
        common_state: Megatron's state beside the tensors (args, iteration ...).
        threads: number of threads that write, each to its own file.
        progress: called with the number of bytes written.

    Returns: SHA-256 of each file, by name.
    """
    failure = _Failure()
    planner = _StreamingPlanner(shape, padded_vocab_size, dtypes, produce, common_state, failure)
    writer = dcp.FileSystemWriter(folder, thread_count=threads)
    writer.fs = files = _HashingFileSystem(progress, failure)
    with warnings.catch_warnings(action="ignore"):  # torch warns that there is no process group
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    if failure.error:
        raise failure.error
    if len(files.hashes) != threads + 1:  # and .metadata
        raise OSError(f"{folder}: a file could not be written")
    # Megatron recognises its format by this file.
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return files.hashes


class _Failure:
    """The first error while writing.

    torch's writer threads and its zip writer may lose an error. So the first error is kept here, later
    writes are discarded, and the caller raises it at the end.
    """

    error: BaseException | None = None

    def keep(self, error: BaseException) -> None:
        self.error = self.error or error


class _StreamingPlanner(DefaultSavePlanner):
    """Save planner that produces each parameter only when it is written."""

    def __init__(self, shape, padded_vocab_size, dtypes, produce, common_state, failure: _Failure):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._produce, self._bytes, self._failure = produce, {}, failure
        self._parameters: dict[tuple[str, int | None], tuple[Row, int | None]] = {}
        items = []
        for row in rows(shape):
            local = megatron_shape(row, shape, padded_vocab_size)
            layers = shape.num_layers if row.is_layered else None
            for layer in range(layers) if layers else [None]:
                self._parameters[row.key, layer] = (row, layer)
                items.append(_tensor_item(row.key, local, layer, layers, dtypes[row.key]))
        states = {
            f"{LAYERS}{linear}._extra_state/shard_{layer}_{shape.num_layers}": [None]
            for linear in LINEARS
            for layer in range(shape.num_layers)
        }
        for key, value in (states | {_COMMON_STATE: [common_state]}).items():
            self._bytes[key] = value
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        self._items = items

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        is_bytes = write_item.type == WriteItemType.BYTE_IO
        if self._failure.error is None:
            try:
                return self._resolve(write_item.index)
            except BaseException as error:
                self._failure.keep(error)
        return io.BytesIO() if is_bytes else torch.empty(0)

    def _resolve(self, index: MetadataIndex) -> Tensor | io.BytesIO:
        if index.fqn in self._bytes:
            file = io.BytesIO()
            torch.save(self._bytes[index.fqn], file)
            return file
        layer = index.offset[0] if index.fqn.startswith(LAYERS) else None
        row, layer = self._parameters[index.fqn, layer]
        tensor = self._produce(row, layer)
        return tensor if layer is None else tensor.unsqueeze(0)


def _tensor_item(
    key: str, local: tuple[int, ...], layer: int | None, layers: int | None, dtype: torch.dtype
) -> WriteItem:
    sizes = torch.Size(local if layers is None else (1, *local))
    whole = torch.Size(local if layers is None else (layers, *local))
    offsets = torch.Size([layer or 0] + [0] * (len(sizes) - 1))
    return WriteItem(
        index=MetadataIndex(key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=dtype),
            size=whole,
        ),
    )


class _HashingFileSystem(FileSystem):
    def __init__(self, progress: Callable[[int], None], failure: _Failure):
        self.hashes: dict[str, str] = {}
        self._progress, self._failure = progress, failure

    @contextlib.contextmanager
    def create_stream(self, path, mode: str) -> Iterator[HashingFile]:
        try:
            with super().create_stream(path, mode) as stream:
                yield (file := _ErrorKeepingFile(stream, self._progress, self._failure))
        except OSError as error:  # from the last flush of the buffer
            self._failure.keep(error)
            return
        self.hashes[Path(path).name.removesuffix(".tmp")] = file.hexdigest()


class _ErrorKeepingFile(HashingFile):
    def __init__(self, file, progress, failure: _Failure):
        super().__init__(file, progress)
        self._failure = failure

    def write(self, data) -> int:
        if self._failure.error is None:
            try:
                return super().write(data)
            except BaseException as error:
                self._failure.keep(error)
        return memoryview(data).nbytes

    def flush(self) -> None:
        if self._failure.error is None:
            try:
                self._file.flush()
            except BaseException as error:
                self._failure.keep(error)
