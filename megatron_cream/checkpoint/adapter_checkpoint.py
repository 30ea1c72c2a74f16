"""Read checkpoints, those of LoRA adapters included: the adapters are merged into the base model's weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cream.checkpoint import base_weights
from megatron_cream.checkpoint.adapters import adapter_rows, adapter_shape, settings_of, trained_rows
from megatron_cream.checkpoint.mapping import Row, split
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.checkpoint.opening import Step, find_step_folder, open_step, read_newest_step
from megatron_cream.common.errors import UsageError


def open_checkpoint(
    path: Path,
    step: int | str | None = None,
    *,
    flag: str = "--checkpoint",
    checksums: bool = True,
    base: str | None = None,
) -> MegatronCheckpoint:
    """Open a checkpoint of all weights, or of adapters.

    Args:
        path: folder of all steps.
        step: the iteration or "release"; None is the newest.
        flag: the flag that gave `path`, for messages.
        checksums: as in `open_step`.
        base: where the base model of adapters is; None means where it was in training.

    Raises:
        UsageError: a file or parameter is missing or unreadable.
    """
    step = read_newest_step(path, flag) if step is None else step
    opened = open_step(find_step_folder(path, step, flag), flag, checksums=checksums)
    if getattr(opened.args, "lora_rank", 0):
        return AdapterCheckpoint(path, step, flag=flag, opened=opened, base=base)
    if base is not None:
        raise UsageError(f"--base {base}: {flag} {path} has all weights, and no adapters")
    return MegatronCheckpoint(path, step, flag=flag, opened=opened)


class AdapterCheckpoint(MegatronCheckpoint):
    """A checkpoint of adapters, with the interface of one that has all weights.

    Attributes:
        base: record of the base model.
        settings: of the adapters.

    Args:
        path, step, flag, opened: as in MegatronCheckpoint.
        base: where the base model is; None means where it was in training.
    """

    def __init__(self, path: Path, step: int | str, *, flag: str, opened: Step, base: str | None):
        super().__init__(path, step, flag=flag, opened=opened)
        record: dict[str, Any] = self.args.lora_base
        options = {"--load": "--load-hf", "--checkpoint": "--base"}
        option = options.get(flag, "--base of tools/convert_hf.py export, and evaluate the merged folder")
        self.base = base_weights.find_again(record, base, where=f"{flag} {path}", flag=option)
        self._weights = base_weights.open_base(self.base, flag=option)

    def dtype(self, row: Row, layer: int | None) -> torch.dtype:
        """Return the dtype of a parameter in the checkpoint, or in the base model."""
        return super().dtype(row, layer) if row in self._saved_rows else self._weights.dtype(row, layer)

    def read(self, row: Row, layer: int | None, out: Tensor) -> Tensor:
        """Fill `out` with a whole parameter, with its adapters merged, and return it."""
        if row in self._saved_rows:
            return super().read(row, layer, out)
        deltas = [self._read_product(name, layer) for name in row.hf]
        if not any(delta is not None for delta in deltas):
            return self._weights.read(row, layer, out)
        merged = self._weights.read(row, layer, torch.empty_like(out, dtype=torch.float32))
        for part, delta in zip(split(row, merged, self.shape), deltas, strict=True):
            if delta is not None:
                part += delta.view(part.shape)
        return out.copy_(merged)

    def read_adapter(self, row: Row, layer: int) -> Tensor:
        """Return the whole A or B of a row of `adapter_rows`, in the checkpoint's dtype."""
        kind = MegatronCheckpoint.dtype(self, row, layer)
        return super().read(row, layer, torch.empty(adapter_shape(row, self.shape, self.settings.rank), dtype=kind))

    def _read_product(self, name: str, layer: int | None) -> Tensor | None:
        """Return what the adapter of a Hugging Face weight adds to it; None if it has no adapter."""
        rows = self._adapters.get(name.removesuffix(".weight"))
        if rows is None or layer is None:
            return None
        a, b = (self.read_adapter(row, layer).float() for row in rows)
        return b @ a * self.settings.scale

    def _check(self) -> None:
        settings = settings_of(self.args)
        assert settings is not None
        self.settings = settings
        table, trained = adapter_rows(settings.targets), trained_rows(self.shape, settings.trained)
        self._adapters = {a.hf[0].removesuffix(".lora_A.weight"): (a, b) for a, b in zip(table[::2], table[1::2])}
        self._saved_rows = {*table, *trained}
        for row in table:
            self._check_shape(row, adapter_shape(row, self.shape, self.settings.rank))
        for row in trained:
            self._check_row(row)
