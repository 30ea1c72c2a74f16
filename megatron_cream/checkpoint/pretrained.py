"""Start a run from a Hugging Face folder (--load-hf) and export to one (--save-hf).

The original model's shape, tokenizer and generation config are kept in the `hf/` folder of a checkpoint that was
converted from a Hugging Face folder, or trained from such a checkpoint.
"""

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_cream.checkpoint import base_weights, carried, hf_folder, output
from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
from megatron_cream.checkpoint.adapters import fill_adapters
from megatron_cream.checkpoint.convert import export_hf
from megatron_cream.checkpoint.megatron_folder import HF
from megatron_cream.checkpoint.model import fill_model
from megatron_cream.checkpoint.peft_folder import PeftFolder, export_adapter
from megatron_cream.common.errors import UsageError
from megatron_cream.common.progress_bar import TransferBar

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def check_hf_folders(args: Namespace) -> None:
    """Check the folders of --load-hf and --save-hf.

    Raises:
        UsageError: --load-hf is unreadable, or --save-hf must not be written.
    """
    if args.load_hf is not None:
        hf_folder.HfFolder(args.model_folder)
    if args.model_folder is not None:
        carried.check_files(args.model_folder, vocabulary=args.vocab_size, warn=args.rank == 0)
    if args.save_hf is not None:
        target = Path(args.save_hf).absolute()
        output.check_target(target, flag="--save-hf", overwrite=False)
        if uses_intermediate_folder(args):
            _reject_finished(args, target)
        _check_outside_save(args, target)


def _check_outside_save(args: Namespace, target: Path) -> None:
    """Raise UsageError if --save-hf is a folder where --save keeps its files."""
    save, target = Path(args.save).resolve(), target.resolve()
    below = target.relative_to(save).parts[0] if save in target.parents else ""
    if target == save or target in save.parents or below in (HF, "runs", "best") or below.startswith("iter_"):
        raise UsageError(f"--save-hf {args.save_hf}: --save {args.save} keeps its files there; give a folder beside it")


def _reject_finished(args: Namespace, target: Path) -> None:
    """Raise UsageError if an earlier run finished, but its checkpoint was not exported."""
    tracker = intermediate_folder(target) / output.TRACKER
    step = tracker.read_text().strip() if tracker.is_file() else ""
    if step.isdigit() and args.train_iters and int(step) >= args.train_iters:
        raise UsageError(
            f"--save-hf {args.save_hf}: step {step} of an earlier run is in {tracker.parent}. Export it with python "
            f"tools/convert_hf.py export --checkpoint {tracker.parent} --hf-path {args.save_hf}, or delete it."
        )


def intermediate_folder(target: Path) -> Path:
    """Return the folder for checkpoints before the export, if the user gives no --save."""
    return target.with_name(f".{target.name}.checkpoint")


def uses_intermediate_folder(args: Namespace) -> bool:
    """Tell whether --save is the intermediate folder of --save-hf."""
    return args.save_hf is not None and Path(args.save) == intermediate_folder(Path(args.save_hf).absolute())


def build_weights_hook(args: Namespace) -> Callable[[list], list] | None:
    """Return a hook for Megatron's `pre_wrap_hooks` that fills the model with weights.

    They are those of --load-hf, or of the base model of adapters. None if Megatron loads all weights from a
    checkpoint, or none.
    """
    is_resumed = args.load is not None and (Path(args.load) / output.TRACKER).is_file()
    if args.lora_base is None and (args.load_hf is None or is_resumed):
        return None

    def load(chunks: list) -> list:
        if args.lora_base is None:
            base = base_weights.open_folder(args.model_folder)
        else:
            base = base_weights.open_base(args.lora_base, flag="--load-hf")
        adapter = None if args.load_adapter is None or is_resumed else PeftFolder(Path(args.load_adapter))
        for chunk in chunks:
            fill_model(chunk, base.shape, adapter.replace(base.read, base.shape) if adapter else base.read)
            if adapter:
                fill_adapters(chunk, adapter.targets, base.shape.num_layers, adapter.get)
        return chunks

    return load


def copy_model_files(args: Namespace) -> None:
    """Copy the original model's config, tokenizer and generation config to `hf/` of --save.

    Without an original model, copy only the tokenizer.
    """
    if args.save is None or args.rank != 0:
        return
    target, tokenizer = Path(args.save) / HF, Path(args.tokenizer_model or "")
    if args.model_folder is not None and target.exists() and target.samefile(args.model_folder):
        return
    target.mkdir(parents=True, exist_ok=True)
    if args.model_folder is not None:
        carried.copy_files(args.model_folder, target, hf_folder.CONFIG)  # last: it marks the folder as complete
    elif tokenizer.suffix == ".model" and tokenizer.is_file():
        shutil.copyfile(tokenizer, target / "tokenizer.model")
    elif tokenizer.is_dir() and args.tokenizer_type == "HuggingFaceTokenizer":
        carried.copy_files(tokenizer, target)
    output.write_manifest(target, {})


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
    kind = "adapter" if args.adapter else "model"
    print(f"{args.save_hf}: {kind} for {args.target_length} positions", flush=True)
    if uses_intermediate_folder(args):
        shutil.rmtree(args.save)
