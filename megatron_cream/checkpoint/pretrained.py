"""Start a run from a Hugging Face folder (--load-hf) and export to one (--save-hf).

The original model's shape, tokenizer and generation config are kept in the `hf/` folder of a checkpoint that was
converted from a Hugging Face folder, or trained from such a checkpoint.
"""

import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import base_weights, carried, hf_folder, output
from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
from megatron_cream.checkpoint.adapters import fill_adapters
from megatron_cream.checkpoint.convert import export_hf
from megatron_cream.checkpoint.megatron_folder import HF
from megatron_cream.checkpoint.model import fill_model
from megatron_cream.checkpoint.peft_folder import PeftFolder, export_adapter
from megatron_cream.checkpoint.start import Origin
from megatron_cream.common.progress_bar import TransferBar


def check_model_folder(origin: Origin, *, warn: bool) -> None:
    """Check the folder of the run's original model, if there is one.

    Args:
        origin: where the run starts from.
        warn: print warnings; False if another rank prints them.

    Raises:
        UsageError: a file is unreadable or missing.
    """
    folder, shape = origin.model_folder, origin.shape
    if folder is None or shape is None:
        return
    if origin.flags.load_hf is not None:
        hf_folder.HfFolder(folder)
    carried.check_files(folder, vocabulary=shape.vocab_size, warn=warn)


def intermediate_folder(target: Path) -> Path:
    """Return the folder for checkpoints before the export, if the user gives no --save."""
    return target.with_name(f".{target.name}.checkpoint")


def uses_intermediate_folder(args: Namespace) -> bool:
    """Return whether --save is the intermediate folder of --save-hf."""
    return args.save_hf is not None and Path(args.save) == intermediate_folder(Path(args.save_hf).absolute())


@dataclass(frozen=True)
class InitialWeights:
    """The weights that fill a model before training, in Megatron's `pre_wrap_hooks`.

    folder: the Hugging Face folder of all weights; not read if there is a base model.
    base: the record of the base model of adapters, or None.
    adapter: the folder of the adapters to start from, or None.
    """

    folder: Path | None
    base: dict[str, Any] | None
    adapter: Path | None

    def fill(self, chunks: list) -> list:
        """Fill Megatron's model chunks, and return them."""
        if self.base is not None:
            base = base_weights.open_base(self.base, flag="--load-hf")
        else:
            assert self.folder is not None
            base = base_weights.open_folder(self.folder)
        adapter = None if self.adapter is None else PeftFolder(self.adapter)
        for chunk in chunks:
            fill_model(chunk, base.shape, adapter.replace(base.read, base.shape) if adapter else base.read)
            if adapter:
                fill_adapters(chunk, adapter.targets, base.shape.num_layers, adapter.get)
        return chunks


def copy_model_files(args: Namespace, *, is_new: bool = False) -> None:
    """Copy the original model's config, tokenizer and generation config to `hf/` of --save.

    Without an original model, copy only the tokenizer.

    Args:
        args: Megatron's.
        is_new: no run has saved in --save, so that `hf/` is from a start that ended before its first save, maybe with
            another model.
    """
    if args.save is None or args.rank != 0:
        return
    target, tokenizer = Path(args.save) / HF, Path(args.tokenizer_model or "")
    if args.model_folder is not None and target.exists() and target.samefile(args.model_folder):
        return
    target.mkdir(parents=True, exist_ok=True)
    if is_new:
        _remove_copied(target, keep_tokenizer=target.resolve() in (tokenizer.resolve(), *tokenizer.resolve().parents))
    if args.model_folder is not None:
        carried.copy_files(args.model_folder, target, hf_folder.CONFIG)  # last: it marks the folder as complete
    elif tokenizer.suffix == ".model" and tokenizer.is_file():
        shutil.copyfile(tokenizer, target / "tokenizer.model")
    elif tokenizer.is_dir() and args.tokenizer_type == "HuggingFaceTokenizer":
        carried.copy_files(tokenizer, target)
    output.write_manifest(target, {})


def _remove_copied(folder: Path, *, keep_tokenizer: bool) -> None:
    """Remove the files that `copy_model_files` copied to `folder`, as its manifest lists them."""
    for name in sorted(output.read_manifest(folder), key=lambda name: name != hf_folder.CONFIG):
        if name == hf_folder.CONFIG or (carried.is_carried(name) and not keep_tokenizer):
            (folder / name).unlink(missing_ok=True)


def save_hf(args: Namespace) -> None:
    """Export the newest checkpoint of a finished run to --save-hf, on the first rank."""
    if args.save_hf is None or args.rank != 0:
        return
    target = Path(args.save_hf).absolute()
    # Its record of the base model may be from before that model moved: a finished run is exported without a step.
    source = open_checkpoint(Path(args.save), base=base_weights.folder_of(args.lora_base))
    if args.adapter:
        export_adapter(source, target, flag="--save-hf")
    else:
        with TransferBar("exported") as progress:
            export_hf(source, target, flag="--save-hf", with_card=True, progress=progress)
    kind, how = ("adapter", "; its README.md shows how to load it with PEFT") if args.adapter else ("model", "")
    print(f"{args.save_hf}: {kind} for {args.target_length} positions{how}", flush=True)
    if uses_intermediate_folder(args):
        shutil.rmtree(args.save)
