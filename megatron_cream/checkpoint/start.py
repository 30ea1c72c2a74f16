"""Find and check the model and the checkpoint that a run loads.

This comes before the run starts a process group, uses a GPU or writes files. Megatron checks while it loads: a
checkpoint that is truncated, of another model, or that runs code ends it with tracebacks of all ranks, after the
run's folders were created.
"""

import os
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import base_weights, hf_folder, hub, opening, output, peft_folder, schedule
from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
from megatron_cream.checkpoint.families import ModelShape, read_config
from megatron_cream.checkpoint.megatron_folder import HF
from megatron_cream.checkpoint.retention import find_complete_steps
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.distributed.rendezvous import share_errors
from megatron_cream.model.rope_choice import ModelRope

# Flags that describe the model of a checkpoint.
_SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "untie_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm", "add_bias_linear", "swiglu",
    "normalization", "layernorm_epsilon",
)  # fmt: skip
_SET_BY = {"rope_scaling_config": "rope_scaling_type", "layernorm_epsilon": "norm_epsilon"}

# Flags that must agree with the saved optimizer state, because the state includes these settings.
_OPTIMIZER = (
    "optimizer", "fp16", "bf16", "use_distributed_optimizer", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum",
    "apply_wd_to_qk_layernorm",
)  # fmt: skip
_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")  # too, if the state is saved per rank


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that a run starts from.

    flag: the flag that names it.
    folder: folder of the step.
    args: flags that it was saved with.
    step: the opened step; None for `mp_rank_XX` files.
    """

    flag: str
    folder: Path
    args: Namespace
    step: opening.Step | None


@dataclass(frozen=True)
class Origin:
    """The origin of a run's weights.

    model_folder: the Hugging Face folder, or the `hf/` of a checkpoint; None without an original model.
    shape: shape of the model in that folder.
    source: (flag, folder of the step) that Megatron will load.
    checkpoint: the opened checkpoint of `source`, if its format is one that this project writes.
    """

    model_folder: Path | None
    shape: ModelShape | None
    source: tuple[str, Path] | None
    checkpoint: FoundCheckpoint | None


def find_origin(args: Namespace) -> Origin:
    """Find the model and the checkpoint that the flags name. No tensor is read.

    Raises:
        UsageError: one of them is unreadable or unsupported.
    """
    folder, shape = find_model(args)
    found = find_checkpoint(args)
    return Origin(folder, shape, found, _open_checkpoint(args, found))


def find_model(args: Namespace) -> tuple[Path | None, ModelShape | None]:
    """Return the Hugging Face folder of the run's original model, and the model's shape."""
    folder = _find_model_folder(args)
    if folder is None:
        return None, None
    shape = read_config(folder)[1]
    return folder, shape if args.load_adapter is None else peft_folder.take_rope(shape, Path(args.load_adapter))


def _find_model_folder(args: Namespace) -> Path | None:
    if args.load_hf is not None:
        if args.pretrained_checkpoint is not None:
            raise UsageError(f"--load-hf {args.load_hf} with --pretrained-checkpoint: give one of the two")
        folder = hub.locate(args.load_hf, flag="--load-hf")
        if not (folder / hf_folder.CONFIG).exists():
            raise UsageError(
                f"--load-hf {args.load_hf}: has no {hf_folder.CONFIG}. Give the folder or the name of a Hugging Face "
                "model."
            )
        return folder
    for name in (args.load, args.pretrained_checkpoint):
        if name is not None and (Path(name) / HF / hf_folder.CONFIG).is_file():
            return Path(name) / HF
    return None


def check_save_folder(args: Namespace) -> None:
    """Check --save, and resume from a checkpoint in it if torchrun restarted this job.

    torchrun restarts its ranks (--max-restarts) with the flags of the first start. Otherwise only --load resumes.

    Raises:
        UsageError: the run would overwrite the checkpoints of an earlier one.
    """
    if args.save is None or args.skip_train:
        return
    if not (Path(args.save) / output.TRACKER).exists():
        if _is_load_equal_save(args) and args.ckpt_step is None:
            args.ckpt_step = _find_untracked_step(Path(args.save))
        return
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and not args.no_save_optim:
        args.load, args.ckpt_step, args.finetune = args.save, None, False
        args.no_load_optim = args.no_load_rng = None
    reject_other_run(args)


def reject_other_run(args: Namespace) -> None:
    """Raise UsageError if --save contains checkpoints that this run does not resume from."""
    if not _is_load_equal_save(args) and not args.skip_train and os.path.lexists(Path(args.save) / output.TRACKER):
        raise UsageError(
            f"--save {args.save}: contains the checkpoints of an earlier run. Add --load {args.save} to resume from "
            "them, or give another folder."
        )


def _is_load_equal_save(args: Namespace) -> bool:
    """Tell whether --load and --save are the same folder, as in a job that may be restarted."""
    return args.load is not None and Path(args.load).resolve() == Path(args.save).resolve()


def find_checkpoint(args: Namespace) -> tuple[str, Path] | None:
    """Return (flag, folder of the step) that Megatron will load, or None.

    Raises:
        UsageError: a folder has no checkpoint, or not the requested step.
    """
    for name in ("load", "pretrained_checkpoint"):
        if getattr(args, name) is None:
            continue
        path, given = Path(getattr(args, name)), to_flag(name)
        has_tracker = (path / output.TRACKER).exists()
        if has_tracker or (name == "load" and args.ckpt_step is not None):
            step = opening.read_newest_step(path, given) if has_tracker else None
            if step == "release" and args.ckpt_step is not None:
                raise UsageError(f"--ckpt-step {args.ckpt_step}: {given} {path} is a converted model without steps")
            step = step if args.ckpt_step is None else args.ckpt_step
            return given, opening.find_step_folder(path, step, given)
        if name != "load" or args.save is None or not _is_load_equal_save(args):
            why = f"contains no checkpoint: it has no {output.TRACKER}" if path.is_dir() else "no such folder"
            if path.is_dir() and re.fullmatch(r"iter_\d{7}", path.absolute().name):
                why += f". Give {given} {path.absolute().parent} --ckpt-step {int(path.absolute().name[5:])}"
            raise UsageError(f"{given} {path}: {why}")
        _reject_lost_tracker(path)
    return None


def _find_untracked_step(path: Path) -> int | None:
    """Return the step of a folder's only complete checkpoint if the tracker is missing.

    None otherwise. The manifest of checksums is written just before the tracker. So a run resumes that was killed
    between the two, or that lost its tracker.
    """
    complete = {} if os.path.lexists(path / output.TRACKER) else find_complete_steps(path)
    steps = [step for step, folder in complete.items() if (folder / output.MANIFEST).is_file()]
    return steps[0] if len(steps) == len(complete) == 1 else None


def _reject_lost_tracker(path: Path) -> None:
    """Raise UsageError if the folder has several complete checkpoints but no tracker.

    A single one is allowed: a run that was killed in its first save has no tracker yet.
    """
    complete = [folder.name for _, folder in sorted(find_complete_steps(path).items())]
    if len(complete) > 1 or (path / output.TRACKER).is_symlink():
        raise UsageError(
            f"--load {path}: {output.TRACKER} is missing. Training would overwrite "
            f"{', '.join(complete) or 'its checkpoints'}. Use --ckpt-step to resume from one of them, or give another "
            "folder."
        )


def count_steps(args: Namespace) -> int:
    """Return the number of steps of the whole run; 0 if neither --train-iters nor --train-samples is given."""
    return args.train_iters or (args.train_samples or 0) // args.global_batch_size


def find_resumed_step(args: Namespace) -> int | None:
    """Return the step of --load that the run resumes from; None if it starts from step 0."""
    found = None if args.finetune else find_checkpoint(args)
    return None if found is None or found[0] != "--load" or found[1].name == "release" else _parse_step(found[1])


def finished_message(args: Namespace) -> str | None:
    """Return a message if the checkpoint of --load is at the run's last step, else None."""
    steps, step = count_steps(args), None if args.skip_train else find_resumed_step(args)
    if step is None or not steps or step < steps:
        return None
    return f"step {step} of {steps} is in {args.load}: nothing is left to train"


def _open_checkpoint(args: Namespace, found: tuple[str, Path] | None) -> FoundCheckpoint | None:
    """Open the checkpoint that will be loaded, without reading a tensor.

    None if there is none, or if its format is one that this project does not write.

    Raises:
        UsageError: the checkpoint is incomplete, damaged, or not plain data.
    """
    if found is None or args.ckpt_format not in ("torch", "torch_dist"):
        return None
    given, folder = found
    checksums = args.checkpoint_checksums or args.verify_integrity
    if opening.is_classic(folder):
        layout = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
        return FoundCheckpoint(given, folder, opening.open_classic(folder, given, layout, checksums=checksums), None)
    step = opening.open_step(folder, given, checksums=checksums)
    return FoundCheckpoint(given, folder, step.args, step)


def is_resume(args: Namespace, found: FoundCheckpoint | None) -> bool:
    """Tell whether the run resumes a training, instead of only starting from its weights."""
    return found is not None and found.flag == "--load" and found.folder.name != "release" and not args.finetune


def read_saved_rope(found: FoundCheckpoint | None) -> ModelRope | None:
    """Return the rotary embedding that a checkpoint was trained with.

    None if this project did not save it, and for a converted model, whose config.json has more details.
    """
    saved = found and found.args
    if saved is None or found.folder.name == "release" or not hasattr(saved, "rope_scaling_config"):
        return None
    scaling, positions = saved.rope_scaling_config, saved.target_length
    original = getattr(saved, "rope_window", None)
    if original is None and scaling and "original_max_position_embeddings" not in scaling:
        original = round(positions / scaling["factor"])  # saved by an older release without rope_window
    return ModelRope(theta=float(saved.rotary_base), scaling=scaling, positions=positions, original=original)


def check_model(args: Namespace, found: FoundCheckpoint | None) -> None:
    """Check that the flags describe the saved model.

    A resumed run needs the same rotary embedding too.

    Raises:
        UsageError: a flag differs from the saved one, or the checkpoint lacks a parameter.
    """
    if found is None:
        return
    resumed = is_resume(args, found)
    for name in (*_SHAPE, *(["rotary_base", "rope_scaling_config"] if resumed else [])):
        saved, ours = _get_value(found.args, name), _get_value(args, name)
        if saved != ours and hasattr(found.args, name) and (saved is not None or name == "rope_scaling_config"):
            raise UsageError(
                f"{found.flag} {found.folder.parent}: {found.folder.name} was saved with "
                f"{to_flag(_SET_BY.get(name, name))} {saved}, but these flags set {ours}"
            )
    if resumed:
        _check_optimizer(args, found)
        if found.step and not args.no_load_optim:
            schedule.check_schedule(args, found.step.common, f"{found.flag} {found.folder.parent}", found.folder.name)
    if found.step and _is_own_model(found.args):
        base = base_weights.folder_of(args.lora_base) if found.flag == "--load" else None
        open_checkpoint(found.folder.parent, _parse_step(found.folder), flag=found.flag, checksums=False, base=base)


def _check_optimizer(args: Namespace, found: FoundCheckpoint) -> None:
    """Raise UsageError if this run's optimizer cannot load the saved state."""
    if args.no_load_optim or found.step is None:
        return
    where, saved = f"{found.flag} {found.folder.parent}", found.args
    if getattr(saved, "no_save_optim", False):
        raise UsageError(
            f"{where}: {found.folder.name} was saved with --no-save-optim. To resume with the weights only, add "
            "--no-load-optim."
        )
    theirs, ours = getattr(saved, "decoupled_lr", None), args.decoupled_lr
    if (theirs is None) != (ours is None):
        raise UsageError(
            f"{where}: {found.folder.name} was saved with --decoupled-lr {theirs}, but these flags set {ours}. "
            "To resume with the weights only, add --no-load-optim."
        )
    gathered = getattr(saved, "dist_ckpt_optim_fully_reshardable", False)
    tied = getattr(saved, "use_distributed_optimizer", False) and not gathered
    for name in (*_OPTIMIZER, *(_LAYOUT if tied else ())):
        theirs, ours = getattr(saved, name, None), getattr(args, name)
        if theirs is None or theirs == ours or (name == "use_distributed_optimizer" and theirs and gathered):
            continue
        raise UsageError(
            f"{where}: {found.folder.name} was saved with {to_flag(name)} {theirs}, but these flags set {ours}. "
            "To resume with the weights only, add --no-load-optim."
        )


def adopt_schedule(args: Namespace, found: FoundCheckpoint | None) -> None:
    """Use the saved schedule of learning rate and weight decay if the flags ask for it."""
    wanted = args.use_checkpoint_opt_param_scheduler and not args.no_load_optim
    if wanted and is_resume(args, found) and found.step:
        schedule.adopt_saved(args, found.args)


def _is_own_model(saved: Namespace) -> bool:
    """Tell whether the flags in a checkpoint are those of a Llama that this project trained."""
    llama = {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False}
    same = all(getattr(saved, name, None) == value for name, value in llama.items())
    return same and hasattr(saved, "rope_scaling_config")


def _parse_step(folder: Path) -> int | str:
    return folder.name if folder.name == "release" else int(folder.name.removeprefix("iter_"))


def _get_value(args: Namespace, name: str) -> Any:
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return getattr(args, "num_attention_heads", None)
    return getattr(args, name, None)


_DATA = ("short_data_path", "data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
_SAMPLES = (
    "seed", "split", "dataloader_type", "seq_length", "position_sampler", "position_mix", "target_length",
    "cream_sigma", "cream_variant", "cream_relativity", "cream_middle", "pose_chunks",
    "chat_loss", "short_share", "long_min_tokens",
)  # fmt: skip


def resume_warning(args: Namespace, found: FoundCheckpoint | None) -> str:
    """Return notes on allowed but usually unintended differences of a resumed run, or "".

    Data that only moved to another folder count as the same.
    """
    if not is_resume(args, found):
        return ""
    notes, changed = [], []
    if args.no_load_optim and not args.skip_train:
        notes.append("note: --no-load-optim: the optimizer and the learning-rate schedule start from the beginning")
    for name in (*_SAMPLES, *(() if args.embedded_data else _DATA)):
        saved, ours = getattr(found.args, name, None), getattr(args, name)
        if hasattr(found.args, name) and _format_value(saved) != _format_value(ours):
            changed.append(f"{to_flag(name)} {_format_value(saved)}, now {_format_value(ours)}")
    if changed:
        saved_with = f"note: {found.flag} {found.folder.parent}: {found.folder.name} was saved with "
        notes.append(f"{saved_with}{'; '.join(changed)}: the order or content of the samples changes")
    return "\n".join(notes)


def _format_value(value: Any) -> str:
    items = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(Path(item).name if isinstance(item, str) else str(item) for item in items)


def check_content(args: Namespace, origin: Origin) -> None:
    """Check the checksums, if there are any, and the pickles of a checkpoint.

    Each rank reads a share. All ranks must call it, and all raise the same error.

    Raises:
        UsageError: a file is damaged, missing or not plain data; the message names it.
    """
    share, found = (args.rank, args.world_size), origin.checkpoint
    folder = found.folder if found else args.model_folder if args.load_hf else None
    with share_errors():
        if found and args.verify_integrity and not (folder / output.MANIFEST).is_file():
            raise UsageError(f"--verify-integrity: {found.flag} {folder} was saved without {output.MANIFEST}")
        wanted = folder is not None and (args.checkpoint_checksums or args.verify_integrity)
        if wanted and (faults := output.check_manifest(folder, share=share)):
            raise UsageError(f"{found.flag if found else '--load-hf'} {faults[0]}")
    with share_errors():  # separate, because other ranks may have verified a file's checksum
        if found and found.step:
            opening.check_pickles(found.step, found.flag, keys=found.step.pickled_keys()[share[0] :: share[1]])
