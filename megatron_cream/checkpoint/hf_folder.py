"""Read a Hugging Face model folder tensor by tensor, and write one as sharded safetensors."""

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
# In the order in which transformers looks for them: (file, is_index).
WEIGHTS = (
    ("model.safetensors", False),
    ("model.safetensors.index.json", True),
    ("pytorch_model.bin", False),
    ("pytorch_model.bin.index.json", True),
)
# Safetensors' names of the supported dtypes.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# A thread remaps its files after reading this much, because pages read through a mapping count as memory of the
# process while the mapping exists.
_REMAP_BYTES = 32 << 20


class HfFolder:
    """A Hugging Face folder whose tensors are read on demand.

    Attributes:
        path: the folder.
        config: contents of config.json.
        shape: the model's shape, from config.json.
        weights: {name: file} of every tensor.

    Raises:
        UsageError: a tensor is missing, unexpected, or of the wrong shape; the message names it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.shape = read_config(path)
        self.weights = _find_weights(path)
        self._open = threading.local()  # mappings of each thread
        self._files = {file: _TensorFile(file) for file in sorted(set(self.weights.values()))}
        self._check()

    def get(self, name: str) -> Tensor:
        """Return a tensor on the CPU, a view into the mapped file.

        Copy it before reading many more.
        """
        mappings = self._open.__dict__.setdefault("mappings", {})
        if sum(mapping.bytes_read for mapping in mappings.values()) > _REMAP_BYTES:
            mappings.clear()
        file = self.weights[name]
        if file not in mappings:
            mappings[file] = _Mapping(file)
        return mappings[file].get(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._files[self.weights[name]].dtypes[name]

    def _check(self) -> None:
        """Raise UsageError unless the folder has exactly the model's tensors.

        Their shapes must be right, and their dtypes floating-point.
        """
        expected = set()
        for row, layer in list_parameters(self.shape):
            for name, shape in zip(row.names(layer), hf_shapes(row, self.shape), strict=True):
                self._check_tensor(name, shape)  # fail at the first: a damaged config.json may claim many layers
                expected.add(name)
        for name in sorted(self.weights.keys() - expected):
            if self.shape.tied and name == "lm_head.weight":
                if not torch.equal(self.get(name), self.get("model.embed_tokens.weight")):
                    raise UsageError(
                        f"{self.path}: config.json sets tie_word_embeddings, but lm_head.weight differs from "
                        "model.embed_tokens.weight"
                    )
            elif not name.endswith("rotary_emb.inv_freq"):  # a buffer that old releases of transformers saved
                raise UsageError(f"{self.weights[name]}: tensor {name} is not part of a {self._model()}")

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.weights:
            raise UsageError(f"{self.path}: tensor {name} is missing{self._hint(name)}")
        file = self._files[self.weights[name]]
        if name not in file.shapes:
            raise UsageError(f"{file.path}: tensor {name} is missing, although the index lists it")
        if file.shapes[name] != shape:
            raise UsageError(
                f"{file.path}: tensor {name} has shape {list(file.shapes[name])}; config.json requires {list(shape)}"
            )
        if file.dtypes[name] not in _DTYPE_NAMES:
            raise UsageError(
                f"{file.path}: tensor {name} has dtype {file.dtypes[name]}; only float32, bfloat16 and float16 "
                "weights can be converted"
            )

    def _model(self) -> str:
        return f"{self.shape.model_type} model of {self.shape.num_layers} layers"

    def _hint(self, name: str) -> str:
        if name == "lm_head.weight":
            return ": config.json does not set tie_word_embeddings"
        longer = next((other for other in self.weights if other.endswith(f".{name}")), None)
        if longer:
            return f"; there is {longer}: save the model without its wrapper (torch.compile's or PEFT's)"
        return f"; a {self._model()} needs it"


def _find_weights(folder: Path) -> dict[str, Path]:
    for name, is_index in WEIGHTS:
        file = folder / name
        if file.is_file():
            return read_index(file) if is_index else {tensor: file for tensor in _TensorFile(file).shapes}
    raise UsageError(f"{folder}: has no weights; expected one of {', '.join(name for name, _ in WEIGHTS)}")


def read_index(index: Path, *, complete: bool = True) -> dict[str, Path]:
    """Return {tensor: file} from an index of shards.

    Args:
        index: index file, such as model.safetensors.index.json.
        complete: require every shard to exist.

    Raises:
        UsageError: the index is unreadable, or names a file outside its folder or a missing one.
    """
    found = read_json(index, "a readable index of shards")
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index}: not a readable index of shards: must have a weight_map")
    for name, file in weight_map.items():
        if not is_file_name(file):
            shown = repr(file)[:100]
            raise UsageError(f"{index}: tensor {name[:100]}: {shown}: must be the name of a file beside the index")
        if complete and not (index.parent / file).is_file():
            raise UsageError(f"{index}: tensor {name[:100]} is in {file[:100]}, which does not exist")
    return {name: index.parent / file for name, file in weight_map.items()}


def check_model(folder: Path) -> None:
    """Check the weight files before transformers loads them.

    Every file must be readable and inside the folder. transformers itself would follow any path in an index. If the
    model's family is supported, the tensors are checked too.

    Raises:
        UsageError: a file is missing, unreadable or outside the folder, or a tensor is wrong.
    """
    check_types(read_json(folder / CONFIG, "a readable model configuration"), folder / CONFIG)
    for file in sorted(set(_find_weights(folder).values())):
        _TensorFile(file)
    try:
        read_config(folder)
    except UsageError:
        return
    HfFolder(folder)


class _TensorFile:
    """Shapes and dtypes of the tensors in a file."""

    def __init__(self, path: Path):
        self.path = path
        mapping = _Mapping(path)
        self.shapes, self.dtypes = mapping.shapes(), mapping.dtypes()


class _Mapping:
    """An open, memory-mapped file of tensors, in safetensors or torch's zip format."""

    def __init__(self, path: Path):
        self.bytes_read = 0
        self._tensors: dict[str, Tensor] | None = None
        try:
            if path.suffix == ".safetensors":
                self._file = safe_open(path, framework="pt")
            else:
                self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged file, or a pickle with other objects than tensors
            reason = one_line(error)
            raise UsageError(f"{path}: not a readable file of tensors: {reason}") from error
        if self._tensors is not None and not _is_state_dict(self._tensors):
            raise UsageError(f"{path}: contains something other than named tensors")
        if self._tensors is not None:  # copying into a view of an nn.Parameter fails
            self._tensors = {name: tensor.detach() for name, tensor in self._tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self._tensors is not None:
            return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        # safe_open has keys() but is not iterable.
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
    """Tell whether `found` maps names to dense tensors on the CPU."""
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
        for name, t in found.items()
    )


# ---------------------------------------------------------------- writing


class Group:
    """Tensors that are written together because one read produces them.

    entries: (name, dtype, shape) of each.
    produce: returns the tensors in the same order; they may be views that need their first axes merged
        to have these shapes.
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
    """Write safetensors shards, and their index if there are several.

    Each thread has only one group in memory, because a shard's header follows from the shapes alone.

    Args:
        folder: folder to write into.
        groups: tensors to write, in order.
        max_shard_bytes: largest size of a shard with several groups.
        threads: number of shards written at the same time.
        progress: called with the number of bytes written.

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
    """Write one safetensors file: header, then the bytes in order.

    Format: github.com/huggingface/safetensors.
    """
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
    """Yield contiguous parts of the tensor in the order of its elements, without copying."""
    if tensor.is_contiguous():
        yield tensor
    else:
        for part in tensor:
            yield from _contiguous_parts(part)


def write_config(folder: Path, shape: ModelShape, base: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """Write config.json for a model whose weights have `dtype`."""
    config = shape.hf_config(base)
    config.pop("dtype", None)
    # Every release reads torch_dtype; transformers 5 writes it as `dtype`.
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG, config)
