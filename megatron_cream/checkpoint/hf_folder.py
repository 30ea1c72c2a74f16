"""A Hugging Face model folder: tensors read one by one, or written as sharded safetensors."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_cream.checkpoint.families import ModelShape, check_types, read_config
from megatron_cream.checkpoint.mapping import hf_shapes, list_parameters
from megatron_cream.checkpoint.output import HashingFile
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import is_file_name, read_json, write_json

CONFIG = "config.json"
# In the order in which transformers looks for them: (file, is it an index of shards).
WEIGHTS = (
    ("model.safetensors", False),
    ("model.safetensors.index.json", True),
    ("pytorch_model.bin", False),
    ("pytorch_model.bin.index.json", True),
)
# Safetensors' names of the types that weights come in.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Files are mapped anew after a thread has read this much: what was read through a mapping counts
# as this process's memory for as long as the mapping lives.
_REMAP_BYTES = 32 << 20


class HfFolder:
    """Reads the tensors of a Hugging Face folder, each when it is asked for.

    Attributes:
        path: the folder.
        config: config.json as it stands.
        shape: what it describes.
        weights: {name: file} of every tensor.

    Raises:
        UsageError: one line that names what is missing, too much, or of another shape.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.shape = read_config(path)
        self.weights = _find_weights(path)
        self._open = threading.local()  # each thread reads through mappings of its own
        self._files = {file: _TensorFile(file) for file in sorted(set(self.weights.values()))}
        self._check()

    def get(self, name: str) -> Tensor:
        """A tensor on the CPU, a view into the mapped file: copy it before asking for many more."""
        mappings = self._open.__dict__.setdefault("mappings", {})
        if sum(mapping.bytes_read for mapping in mappings.values()) > _REMAP_BYTES:
            mappings.clear()
        file = self.weights[name]
        if file not in mappings:
            mappings[file] = _Mapping(file)
        return mappings[file].get(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._files[self.weights[name]].dtypes[name]

    def _check(self) -> None:
        """Every tensor of the model is there, in its shape and in a floating-point type; no other is."""
        expected = set()
        for row, layer in list_parameters(self.shape):
            for name, shape in zip(row.names(layer), hf_shapes(row, self.shape), strict=True):
                self._check_tensor(name, shape)  # each in turn: a damaged config.json may speak of many layers
                expected.add(name)
        for name in sorted(self.weights.keys() - expected):
            if self.shape.tied and name == "lm_head.weight":
                if not torch.equal(self.get(name), self.get("model.embed_tokens.weight")):
                    raise UsageError(
                        f"{self.path}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                        "model.embed_tokens.weight"
                    )
            elif not name.endswith("rotary_emb.inv_freq"):  # a buffer that old releases of transformers saved
                raise UsageError(f"{self.weights[name]}: tensor {name} is not part of a {self._model()}")

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.weights:
            raise UsageError(f"{self.path}: tensor {name} is missing{self._hint(name)}")
        file = self._files[self.weights[name]]
        if name not in file.shapes:
            raise UsageError(f"{file.path}: tensor {name} is missing, though the index says it is there")
        if file.shapes[name] != shape:
            raise UsageError(
                f"{file.path}: tensor {name} has shape {list(file.shapes[name])}; config.json makes it {list(shape)}"
            )
        if file.dtypes[name] not in _DTYPE_NAMES:
            raise UsageError(
                f"{file.path}: tensor {name} is of type {file.dtypes[name]}; only float32, bfloat16 and float16 "
                "weights can be converted"
            )

    def _model(self) -> str:
        return f"{self.shape.model_type} model of {self.shape.num_layers} layers"

    def _hint(self, name: str) -> str:
        if name == "lm_head.weight":
            return ": config.json does not say tie_word_embeddings"
        return f", which a {self._model()} has"


def _find_weights(folder: Path) -> dict[str, Path]:
    for name, is_index in WEIGHTS:
        file = folder / name
        if file.is_file():
            return read_index(file) if is_index else {tensor: file for tensor in _TensorFile(file).shapes}
    raise UsageError(f"{folder}: none of {', '.join(name for name, _ in WEIGHTS)} is there")


def read_index(index: Path, *, complete: bool = True) -> dict[str, Path]:
    """Return {tensor: file} by an index of shards.

    Args:
        index: the file, such as model.safetensors.index.json.
        complete: every shard must be there.

    Raises:
        UsageError: it is no index, or names what is not a file beside it.
    """
    found = read_json(index, "an index of shards that can be read")
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index}: not an index of shards that can be read: must have a weight_map")
    for name, file in weight_map.items():
        if not is_file_name(file):
            shown = repr(file)[:100]
            raise UsageError(f"{index}: tensor {name[:100]}: {shown}: must be the name of a file beside the index")
        if complete and not (index.parent / file).is_file():
            raise UsageError(f"{index}: tensor {name[:100]} is in {file[:100]}, which is not there")
    return {name: index.parent / file for name, file in weight_map.items()}


def check_model(folder: Path) -> None:
    """For transformers, which would follow any path: every file of weights lies in the folder and can be read.

    Of a model that can be converted, every tensor is looked for too; others are transformers' to judge.

    Raises:
        UsageError: it is not so.
    """
    check_types(read_json(folder / CONFIG, "a model's configuration that can be read"), folder / CONFIG)
    for file in sorted(set(_find_weights(folder).values())):
        _TensorFile(file)
    try:
        read_config(folder)
    except UsageError:
        return
    HfFolder(folder)


class _TensorFile:
    """Shapes and types of the tensors in a file."""

    def __init__(self, path: Path):
        self.path = path
        mapping = _Mapping(path)
        self.shapes, self.dtypes = mapping.shapes(), mapping.dtypes()


class _Mapping:
    """An open, memory-mapped file of tensors, safetensors or torch's zip."""

    def __init__(self, path: Path):
        self.bytes_read = 0
        self._tensors: dict[str, Tensor] | None = None
        try:
            if path.suffix == ".safetensors":
                self._file = safe_open(path, framework="pt")
            else:
                self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged file, or a pickle that is more than tensors
            reason = one_line(error)
            raise UsageError(f"{path}: not a file of tensors that can be read: {reason}") from error
        if self._tensors is not None and not _is_state_dict(self._tensors):
            raise UsageError(f"{path}: holds something other than named tensors")
        if self._tensors is not None:  # nn.Parameters take no copy into a view
            self._tensors = {name: tensor.detach() for name, tensor in self._tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self._tensors is not None:
            return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        # A safe_open has keys() and cannot be iterated.
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def dtypes(self) -> dict[str, torch.dtype | str]:
        if self._tensors is not None:
            return {name: tensor.dtype for name, tensor in self._tensors.items()}
        names = {name: self._file.get_slice(name).get_dtype() for name in self._file.keys()}  # noqa: SIM118
        return {name: _DTYPES.get(dtype, dtype) for name, dtype in names.items()}

    def get(self, name: str) -> Tensor:
        tensor = self._tensors[name] if self._tensors is not None else self._file.get_tensor(name)
        self.bytes_read += tensor.nbytes
        return tensor


def _is_state_dict(found: Any) -> bool:
    """Names, and tensors whose elements lie in the file."""
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
        for name, t in found.items()
    )


# ---------------------------------------------------------------- writing


class Group:
    """Tensors that are written together because they come from one read.

    entries: (name, dtype, shape) of each; produce: gives them, in the same order, or views that have these
    shapes once their first axes are put together.
    """

    def __init__(
        self,
        entries: list[tuple[str, torch.dtype, tuple[int, ...]]],
        produce: Callable[[], list[Tensor]],
    ):
        self.entries, self.produce = entries, produce
        self.nbytes = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in entries)


def write_weights(
    folder: Path, groups: list[Group], *, max_shard_bytes: int, threads: int, progress: Callable[[int], None]
) -> dict[str, str]:
    """Safetensors shards, and their index if there are several.

    Only the group at hand is in memory: a shard's header is known before its tensors are.

    Returns: SHA-256 of each shard, by file name.
    """
    shards: list[list[Group]] = [[]]
    for group in groups:
        if shards[-1] and sum(g.nbytes for g in shards[-1]) + group.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(group)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    with ThreadPoolExecutor(threads) as pool:
        hashes = list(pool.map(lambda pair: _write_shard(folder / pair[0], pair[1], progress), zip(names, shards)))
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(names, shards) for group in shard for name, _, _ in group.entries
        }
        index = {"metadata": {"total_size": sum(g.nbytes for g in groups)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return dict(zip(names, hashes))


def _write_shard(path: Path, groups: list[Group], progress: Callable[[int], None]) -> str:
    """One safetensors file (format: github.com/huggingface/safetensors): header, then the bytes, in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for group in groups:
        for name, dtype, shape in group.entries:
            end = offset + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as raw:
        file = HashingFile(raw, progress)
        file.write(len(text).to_bytes(8, "little") + text)
        for group in groups:
            for (name, dtype, shape), tensor in zip(group.entries, group.produce(), strict=True):
                assert tensor.dtype == dtype and tensor.numel() == torch.Size(shape).numel(), name
                for part in _contiguous_parts(tensor):
                    file.write(part.view(torch.uint8).reshape(-1).numpy())
        raw.flush()
        os.fsync(raw.fileno())
    return file.hexdigest()


def _contiguous_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's elements in order, without a copy of it."""
    if tensor.is_contiguous():
        yield tensor
    else:
        for part in tensor:
            yield from _contiguous_parts(part)


def write_config(folder: Path, shape: ModelShape, base: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """config.json; `dtype` is that of the weights."""
    config = shape.hf_config(base)
    config.pop("dtype", None)
    # Read by every release; transformers 5 writes it as `dtype`.
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG, config)
