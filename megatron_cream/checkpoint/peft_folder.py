"""Read and write adapters as PEFT does: adapter_config.json and adapter_model.safetensors.

Trained embeddings and norms are PEFT's `modules_to_save`. PEFT reads RoPE from the base model's config.json, so a
folder that is written here has a config.json of its own, with the RoPE of the run.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_cream.checkpoint import carried, output, window
from megatron_cream.checkpoint.adapter_checkpoint import AdapterCheckpoint
from megatron_cream.checkpoint.adapters import adapter_rows, adapter_shape, list_layers, trained_rows
from megatron_cream.checkpoint.convert import SPARE_BYTES
from megatron_cream.checkpoint.families import ModelShape, read_config
from megatron_cream.checkpoint.hf_folder import CONFIG, write_config
from megatron_cream.checkpoint.mapping import Row, hf_shapes, megatron_shape, split
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import read_json, write_json
from megatron_cream.model.lora_settings import TARGETS
from megatron_cream.model.rope_choice import ModelRope

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before the name of each tensor."""

_ROPE = ("rope_theta", "rope_scaling", "max_position_embeddings", "original_window")
_TIED_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": (),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": (),
    "exclude_modules": (),
    "use_qalora": (False,),
    "use_bdlora": (),
    "alora_invocation_tokens": (),
    "velora_config": (),
    "monteclora_config": (),
    "kasa_config": (),
    "arrow_config": (),
}
"""{key of adapter_config.json: supported values, besides null}."""

_KEEP_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's initialisations that leave the base model's weights as they are."""
_CONVERTIBLE = ("pissa", "corda", "olora")
"""Beginnings of those that PEFT can turn into plain LoRA."""

_README = """---
library_name: peft
{front}tags: [megatron_cream, lora, long-context]
---
# {name}

A LoRA adapter (rank {rank}) for a window of {positions} positions. It was trained with the RoPE of the `config.json` in
this folder.
{export}
PEFT reads RoPE from the base model, so give it this configuration:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{base}", config=config, dtype="auto")
model = PeftModel.from_pretrained(model, "{name}")
```
"""


def export_adapter(
    source: AdapterCheckpoint, target: Path, *, flag: str = "--hf-path", overwrite: bool = False
) -> None:
    """Write the adapters of a checkpoint to a new folder that PEFT loads.

    Args:
        source: the checkpoint.
        target: the folder to write.
        flag: the flag that gave `target`, for messages.
        overwrite: replace an earlier conversion in `target`.

    Raises:
        UsageError: nothing was written; the message says why.
    """
    tensors = collect_tensors(source)
    needs = sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES
    with output.new_folder(target, flag=flag, overwrite=overwrite, needs_bytes=needs) as folder:
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, build_config(source, tensors))
        if source.hf_folder:
            carried.copy_files(source.hf_folder, folder)
            if source.is_stretched:
                window.raise_limits(folder, source.shape.max_position_embeddings)
        write_config(folder, source.shape, source.config, next(iter(tensors.values())).dtype)
        text = write_readme(target.name, source.base, source.settings.rank, source.shape.max_position_embeddings)
        (folder / "README.md").write_text(text)
        output.write_manifest(folder, {})


def write_readme(name: str, base: dict[str, Any], rank: int, positions: int) -> str:
    """Return the README.md of an adapter, which shows how to load it.

    Args:
        name: of the adapter's folder.
        base: record of the base model; transformers loads a Megatron checkpoint after its export only.
        rank: of the adapter.
        positions: the window.
    """
    model, front, export = base["name"], f"base_model: {base['name']}\n", ""
    if base["step"] is not None:
        step = "" if base["step"] == "release" else f" --ckpt-step {base['step']}"
        command = f"python tools/convert_hf.py export --checkpoint {shlex.quote(model)}{step} --hf-path BASE"
        export = f"\nThe base model is a Megatron checkpoint. Export it first:\n\n```bash\n{command}\n```\n"
        model, front = "BASE", ""
    return _README.format(base=model, front=front, export=export, name=name, rank=rank, positions=positions)


def collect_tensors(source: AdapterCheckpoint) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by PEFT's names."""
    shape, found = source.shape, {}
    for row, layer in list_layers(adapter_rows(source.settings.targets), shape.num_layers):
        found[PREFIX + row.names(layer)[0]] = source.read_adapter(row, layer)
    for row, layer in list_layers(trained_rows(shape, source.settings.trained), shape.num_layers):
        size = megatron_shape(row, shape, shape.vocab_size)
        whole = source.read(row, layer, torch.empty(size, dtype=source.dtype(row, layer)))
        parts = zip(row.names(layer), split(row, whole, shape), hf_shapes(row, shape), strict=True)
        found |= {PREFIX + name: part.reshape(size).contiguous() for name, part, size in parts}
    if shape.tied and "embeddings" in source.settings.trained:
        found[PREFIX + _TIED_HEAD] = found[PREFIX + _EMBEDDING].clone()
    return found


def build_config(source: AdapterCheckpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the contents of adapter_config.json."""
    settings = source.settings
    saved = [name.removesuffix(".weight").rpartition(".")[2] for name in tensors if ".lora_" not in name]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base["name"] if source.base["step"] is None else None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilized,
        "target_modules": list(settings.targets),
        "modules_to_save": list(dict.fromkeys(saved)) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    if source.shape.tied and "embeddings" in settings.trained:
        config["ensure_weight_tying"] = True
    return config


class PeftFolder:
    """An adapter that PEFT or this project wrote.

    Attributes:
        path: the folder.
        rank, alpha, targets, rank_stabilized: as in LoraSettings.
        shapes: {name without PEFT's prefix: shape} of the tensors.

    Raises:
        UsageError: the folder is unreadable, or has a kind of adapter that is not supported.
    """

    def __init__(self, path: Path, *, flag: str = "--load-adapter"):
        self.path, self._where = path, f"{flag} {path}"
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (path / name).is_file():
                raise UsageError(f"{self._where}: has no {name}. Give a folder that PEFT saved.")
        config = read_json(path / ADAPTER_CONFIG, "a readable adapter configuration")
        self._read_config(config if isinstance(config, dict) else {})
        self._file, self.shapes = self._open_weights()

    def _read_config(self, config: dict[str, Any]) -> None:
        for name, allowed in _PLAIN.items():
            if config.get(name) not in (None, *allowed):
                raise UsageError(f"{self._where}: {name} {config[name]}: not supported; only plain LoRA is")
        if (start := config.get("init_lora_weights")) not in _KEEP_BASE:
            advice = "Merge it by PEFT's merge_and_unload, and give the merged model as --load-hf"
            if str(start).startswith(_CONVERTIBLE):
                advice = "Save it by PEFT's save_pretrained with path_initial_model_for_weight_conversion"
            raise UsageError(
                f"{self._where}: init_lora_weights {start}: this initialisation changes the base model's weights. "
                f"{advice}"
            )
        targets, rank, alpha = config.get("target_modules"), config.get("r"), config.get("lora_alpha")
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
            raise UsageError(f"{self._where}: {ADAPTER_CONFIG} must have numbers for r and lora_alpha")
        if not isinstance(targets, list) or not targets or not set(map(str, targets)) <= set(TARGETS):
            raise UsageError(f"{self._where}: target_modules {targets}: must be a list of {', '.join(TARGETS)}")
        self.rank, self.alpha, self.rank_stabilized = rank, float(alpha), bool(config.get("use_rslora"))
        self.targets = tuple(name for name in TARGETS if name in targets)

    def _open_weights(self) -> tuple[Any, dict[str, tuple[int, ...]]]:
        try:
            file = safe_open(self.path / ADAPTER_WEIGHTS, framework="pt")
            names = list(file.keys())
        except Exception as error:  # a damaged file raises errors of many types
            raise UsageError(f"{self._where}: {ADAPTER_WEIGHTS} cannot be read: {one_line(error)}") from error
        if other := [name for name in names if not name.startswith(PREFIX)]:
            raise UsageError(f"{self._where}: tensor {other[0]}: its name must begin with {PREFIX}")
        return file, {name.removeprefix(PREFIX): tuple(file.get_slice(name).get_shape()) for name in names}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its name without PEFT's prefix."""
        return self._file.get_tensor(PREFIX + name)

    def check(self, shape: ModelShape, trained: Sequence[str]) -> None:
        """Check that the tensors are those of an adapter for this model.

        Args:
            shape: the base model's shape.
            trained: what trains beside the adapter, of the model's own weights.

        Raises:
            UsageError: a tensor is missing, unknown, of another shape, or one that would not train.
        """
        needed = {
            row.names(layer)[0]: adapter_shape(row, shape, self.rank)
            for row, layer in list_layers(adapter_rows(self.targets), shape.num_layers)
        }
        allowed = dict(needed)
        for row, layer in list_layers(trained_rows(shape, trained), shape.num_layers):
            allowed |= dict(zip(row.names(layer), hf_shapes(row, shape), strict=True))
        if shape.tied and _TIED_HEAD in self.shapes and _EMBEDDING in allowed:
            if _EMBEDDING not in self.shapes or not torch.equal(self.tensor(_TIED_HEAD), self.tensor(_EMBEDDING)):
                raise UsageError(f"{self._where}: {_TIED_HEAD} differs from the embedding, to which the model ties it")
            allowed[_TIED_HEAD] = allowed[_EMBEDDING]
        for name in sorted(needed.keys() | self.shapes.keys()):
            if name not in self.shapes:
                raise UsageError(f"{self._where}: tensor {name} is missing")
            if name not in allowed:
                parts = ",".join(trained) or "none"
                raise UsageError(f"{self._where}: has {name}, which does not train with --lora-train {parts}")
            if self.shapes[name] != allowed[name]:
                saved = list(self.shapes[name])
                raise UsageError(f"{self._where}: {name} has shape {saved}; the model needs {list(allowed[name])}")

    def get(self, row: Row, layer: int) -> Tensor:
        """Return A or B of a row of `adapter_rows`."""
        return self.tensor(row.names(layer)[0])

    def replace(self, read: Callable, shape: ModelShape) -> Callable:
        """Return a function like `read` of a base model, whose weights are replaced by those of the adapter."""

        def read_trained(row: Row, layer: int | None, out: Tensor) -> Tensor:
            whole = read(row, layer, out)
            for name, part in zip(row.names(layer), split(row, whole, shape), strict=True):
                if name in self.shapes:
                    part.copy_(self.tensor(name).view(part.shape))
            return whole

        return read_trained


def read_rope(folder: Path | None) -> ModelRope | None:
    """Return the RoPE of an adapter's config.json, if there is an adapter that has one."""
    return read_config(folder)[1].rope() if folder is not None and (folder / CONFIG).is_file() else None


def take_rope(shape: ModelShape, folder: Path) -> ModelShape:
    """Return a base model's shape with the RoPE of an adapter's config.json, if it has one.

    Raises:
        UsageError: the adapter is for another model.
    """
    if not (folder / CONFIG).is_file():
        return shape
    other = read_config(folder)[1]
    found = replace(shape, **{name: getattr(other, name) for name in _ROPE})
    if found != other:
        raise UsageError(f"--load-adapter {folder}: its {CONFIG} is of another model than the base model's")
    return found
