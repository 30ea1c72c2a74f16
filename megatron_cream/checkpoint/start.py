"""What a run will load, looked at before a process group, a GPU or a file of the run's own is touched.

Megatron finds out as it goes: a checkpoint that is cut, of another model, or made to run code ends it in
tracebacks of all ranks, after the run's folders were made.
"""

import os
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import hf_folder, hub, opening, output, schedule
from megatron_cream.checkpoint.families import ModelShape, read_config
from megatron_cream.checkpoint.megatron_folder import HF, MegatronCheckpoint
from megatron_cream.checkpoint.retention import find_complete_steps
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.distributed.rendezvous import check_on_all_ranks
from megatron_cream.model.rope_choice import ModelRope

# What a checkpoint's weights were trained as.
_SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "untie_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm", "add_bias_linear", "swiglu",
    "normalization", "layernorm_epsilon",
)  # fmt: skip
_SET_BY = {"rope_scaling_config": "rope_scaling_type", "layernorm_epsilon": "norm_epsilon"}

# What the saved state of an optimizer goes with: its kind and its own settings, which come from the checkpoint.
_OPTIMIZER = (
    "optimizer", "fp16", "bf16", "use_distributed_optimizer", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum",
    "apply_wd_to_qk_layernorm",
)  # fmt: skip
_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")  # and this, saved as it lies on the ranks


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that a run starts from.

    flag: that names it.
    folder: of the step.
    args: the flags that it was saved with.
    step: None for `mp_rank_XX` files.
    """

    flag: str
    folder: Path
    args: Namespace
    step: opening.Step | None


@dataclass(frozen=True)
class Origin:
    """Where a run's weights come from.

    model_folder: the Hugging Face folder, or the `hf/` of a checkpoint; None for a model from nowhere.
    shape: of the model in it.
    source: (flag, folder of the step) that Megatron will load.
    checkpoint: that one opened, if its format is one that this project writes.
    """

    model_folder: Path | None
    shape: ModelShape | None
    source: tuple[str, Path] | None
    checkpoint: FoundCheckpoint | None


def find_origin(args: Namespace) -> Origin:
    """Find the model and the checkpoint that the flags name. No tensor is read.

    Raises:
        UsageError: one of them cannot be read or carried.
    """
    folder, shape = find_model(args)
    found = find_checkpoint(args)
    return Origin(folder, shape, found, _open_checkpoint(args, found))


def find_model(args: Namespace) -> tuple[Path | None, ModelShape | None]:
    """Return the Hugging Face folder of the model that the run starts from, and the model's shape."""
    folder = _find_model_folder(args)
    return folder, None if folder is None else read_config(folder)[1]


def _find_model_folder(args: Namespace) -> Path | None:
    if args.load_hf is not None:
        if args.pretrained_checkpoint is not None:
            raise UsageError(f"--load-hf {args.load_hf} with --pretrained-checkpoint: give one of the two")
        folder = hub.locate(args.load_hf, flag="--load-hf")
        if not (folder / hf_folder.CONFIG).exists():
            raise UsageError(
                f"--load-hf {args.load_hf}: has no {hf_folder.CONFIG}; give a Hugging Face model's folder, or its name"
            )
        return folder
    for name in (args.load, args.pretrained_checkpoint):
        if name is not None and (Path(name) / HF / hf_folder.CONFIG).is_file():
            return Path(name) / HF
    return None


def check_save_folder(args: Namespace) -> None:
    """A --save that holds a checkpoint already: go on from it if torchrun restarted this job, else --load must.

    torchrun starts its ranks again (--max-restarts) with the flags of the first start.

    Raises:
        UsageError: the run would write over an earlier one's checkpoints.
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
    """Raise UsageError where --save holds checkpoints that this run does not go on from."""
    if not _is_load_equal_save(args) and not args.skip_train and os.path.lexists(Path(args.save) / output.TRACKER):
        raise UsageError(
            f"--save {args.save}: holds the checkpoints of an earlier run: add --load {args.save} to go on from "
            "there, or give another folder"
        )


def _is_load_equal_save(args: Namespace) -> bool:
    """Whether --load is what --save makes: how a job is written that may be started again."""
    return args.load is not None and Path(args.load).resolve() == Path(args.save).resolve()


def find_checkpoint(args: Namespace) -> tuple[str, Path] | None:
    """(flag, folder of the step) that Megatron will load, or None if it starts from nothing or Hugging Face weights.

    Raises:
        UsageError: a folder that holds no checkpoint, or not the step that was asked for.
    """
    for name in ("load", "pretrained_checkpoint"):
        if getattr(args, name) is None:
            continue
        path, given = Path(getattr(args, name)), to_flag(name)
        has_tracker = (path / output.TRACKER).exists()
        if has_tracker or (name == "load" and args.ckpt_step is not None):
            step = opening.read_newest_step(path, given) if has_tracker else None
            if step == "release" and args.ckpt_step is not None:
                raise UsageError(f"--ckpt-step {args.ckpt_step}: {given} {path} holds a release, which has no steps")
            step = step if args.ckpt_step is None else args.ckpt_step
            return given, opening.find_step_folder(path, step, given)
        if name != "load" or args.save is None or not _is_load_equal_save(args):
            why = f"holds no checkpoint: it has no {output.TRACKER}" if path.is_dir() else "no such folder"
            if path.is_dir() and re.fullmatch(r"iter_\d{7}", path.absolute().name):
                why += f". Give {given} {path.absolute().parent} --ckpt-step {int(path.absolute().name[5:])}"
            raise UsageError(f"{given} {path}: {why}")
        _reject_lost_tracker(path)
    return None


def _find_untracked_step(path: Path) -> int | None:
    """The step of a folder's only checkpoint, if that is whole by its checksums, which come last but for the tracker.

    A run that was killed between the two goes on from there, and so does one that lost its tracker.
    """
    whole = {} if os.path.lexists(path / output.TRACKER) else find_complete_steps(path)
    steps = [step for step, folder in whole.items() if (folder / output.MANIFEST).is_file()]
    return steps[0] if len(steps) == len(whole) == 1 else None


def _reject_lost_tracker(path: Path) -> None:
    """The first checkpoint of a run that was killed may be there without one; no second comes before the tracker."""
    whole = [folder.name for _, folder in sorted(find_complete_steps(path).items())]
    if len(whole) > 1 or (path / output.TRACKER).is_symlink():
        raise UsageError(
            f"--load {path}: {output.TRACKER} is missing beside {', '.join(whole) or 'nothing'}, which training would "
            "write over: --ckpt-step goes on from one of them; or give another folder"
        )


def finished_message(args: Namespace) -> str | None:
    """A line on a run that --load finds at its end already, as of a job that was queued again; None of any other."""
    steps = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    found = None if args.skip_train or args.finetune else find_checkpoint(args)
    if found is None or found[0] != "--load" or found[1].name == "release" or not steps:
        return None
    step = _parse_step(found[1])
    return f"step {step} of {steps} is in {args.load}: nothing is left to train" if step >= steps else None


def _open_checkpoint(args: Namespace, found: tuple[str, Path] | None) -> FoundCheckpoint | None:
    """What will be loaded, if it is whole and its metadata and flags are plain data. No tensor is read.

    Of a format that this project does not write nothing is known here; None.

    Raises:
        UsageError: one line that begins with the flag.
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
    """Return whether the run continues the training that saved the checkpoint, and does not start from its weights."""
    return found is not None and found.flag == "--load" and found.folder.name != "release" and not args.finetune


def read_saved_rope(found: FoundCheckpoint | None) -> ModelRope | None:
    """Return the rotary embedding that a checkpoint of this project was trained with; None for any other.

    A release is a converted model, whose config.json says more.
    """
    saved = found and found.args
    if saved is None or found.folder.name == "release" or not hasattr(saved, "rope_scaling_config"):
        return None
    scaling, positions = saved.rope_scaling_config, saved.target_length
    original = getattr(saved, "rope_window", None)
    if original is None and scaling and "original_max_position_embeddings" not in scaling:
        original = round(positions / scaling["factor"])  # saved by a release that did not note it
    return ModelRope(theta=float(saved.rotary_base), scaling=scaling, positions=positions, original=original)


def check_model(args: Namespace, found: FoundCheckpoint | None) -> None:
    """Do the flags make the model that was saved? A run that goes on must have its rotary embedding too.

    Raises:
        UsageError: a flag does not.
    """
    if found is None:
        return
    goes_on = is_resume(args, found)
    for name in (*_SHAPE, *(["rotary_base", "rope_scaling_config"] if goes_on else [])):
        saved, ours = _get_value(found.args, name), _get_value(args, name)
        if saved != ours and hasattr(found.args, name) and (saved is not None or name == "rope_scaling_config"):
            raise UsageError(
                f"{found.flag} {found.folder.parent}: {found.folder.name} was saved with "
                f"{to_flag(_SET_BY.get(name, name))} {saved}, and these flags make it {ours}"
            )
    if goes_on:
        _check_optimizer(args, found)
        if found.step and not args.no_load_optim:
            schedule.check_schedule(args, found.step.common, f"{found.flag} {found.folder.parent}", found.folder.name)
    if found.step and _is_own_model(found.args):
        MegatronCheckpoint(found.folder.parent, _parse_step(found.folder), flag=found.flag, checksums=False)  # done


def _check_optimizer(args: Namespace, found: FoundCheckpoint) -> None:
    """Raise UsageError where this run's optimizer has no place for the saved state."""
    if args.no_load_optim or found.step is None:
        return
    where, saved = f"{found.flag} {found.folder.parent}", found.args
    if getattr(saved, "no_save_optim", False):
        raise UsageError(
            f"{where}: {found.folder.name} was saved with --no-save-optim: add --no-load-optim to resume with the "
            "weights alone"
        )
    theirs, ours = getattr(saved, "decoupled_lr", None), args.decoupled_lr
    if (theirs is None) != (ours is None):
        raise UsageError(
            f"{where}: {found.folder.name} was saved with --decoupled-lr {theirs}, and these flags make it {ours}: "
            "add --no-load-optim to resume with the weights alone"
        )
    gathered = getattr(saved, "dist_ckpt_optim_fully_reshardable", False)
    tied = getattr(saved, "use_distributed_optimizer", False) and not gathered
    for name in (*_OPTIMIZER, *(_LAYOUT if tied else ())):
        theirs, ours = getattr(saved, name, None), getattr(args, name)
        if theirs is None or theirs == ours or (name == "use_distributed_optimizer" and theirs and gathered):
            continue
        raise UsageError(
            f"{where}: {found.folder.name} was saved with {to_flag(name)} {theirs}, and these flags make it {ours}: "
            "add --no-load-optim to resume with the weights alone"
        )


def adopt_schedule(args: Namespace, found: FoundCheckpoint | None) -> None:
    """Take the saved schedule of learning rate and weight decay for this run's, if that is what its flags ask for."""
    wanted = args.use_checkpoint_opt_param_scheduler and not args.no_load_optim
    if wanted and is_resume(args, found) and found.step:
        schedule.adopt_saved(args, found.args)


def _is_own_model(saved: Namespace) -> bool:
    """Whether a checkpoint has the names and shapes that this project's models have: a Llama's, trained here."""
    llama = {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False}
    same = all(getattr(saved, name, None) == value for name, value in llama.items())
    return same and hasattr(saved, "rope_scaling_config")


def _parse_step(folder: Path) -> int | str:
    return folder.name if folder.name == "release" else int(folder.name.removeprefix("iter_"))


def _get_value(args: Namespace, name: str) -> Any:
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return getattr(args, "num_attention_heads", None)
    return getattr(args, name, None)


_DATA = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
_SAMPLES = (
    "seed", "split", "dataloader_type", "seq_length", "position_sampler", "position_mix", "target_length",
    "cream_sigma", "cream_variant", "cream_relativity", "cream_middle", "pose_chunks",
)  # fmt: skip


def resume_warning(args: Namespace, found: FoundCheckpoint | None) -> str:
    """Return a line for each thing that a resumed run does differently, which is allowed and seldom meant.

    Data that only lie in another folder now are the same.
    """
    if not is_resume(args, found):
        return ""
    notes, changed = [], []
    if args.no_load_optim and not args.skip_train:
        notes.append("note: --no-load-optim: the optimizer and the schedule of the learning rate start anew")
    for name in (*_SAMPLES, *(() if args.embedded_data else _DATA)):
        saved, ours = getattr(found.args, name, None), getattr(args, name)
        if hasattr(found.args, name) and _format_value(saved) != _format_value(ours):
            changed.append(f"{to_flag(name)} {_format_value(saved)}, now {_format_value(ours)}")
    if changed:
        told = f"note: {found.flag} {found.folder.parent}: {found.folder.name} was saved with "
        notes.append(f"{told}{'; '.join(changed)}: other samples come than would have")
    return "\n".join(notes)


def _format_value(value: Any) -> str:
    items = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(Path(item).name if isinstance(item, str) else str(item) for item in items)


def check_content(args: Namespace, origin: Origin) -> None:
    """What takes reading: checksums, where there are some, and the pickles of every rank. Each rank reads a share.

    All ranks must call it, and all raise the same.

    Raises:
        UsageError: one line that names the file.
    """
    share, found = (args.rank, args.world_size), origin.checkpoint

    def check_sums() -> None:
        folder = found.folder if found else args.model_folder if args.load_hf else None
        if found and args.verify_integrity and not (folder / output.MANIFEST).is_file():
            raise UsageError(f"--verify-integrity: {found.flag} {folder} was saved without {output.MANIFEST}")
        wanted = folder is not None and (args.checkpoint_checksums or args.verify_integrity)
        if wanted and (faults := output.check_manifest(folder, share=share)):
            raise UsageError(f"{found.flag if found else '--load-hf'} {faults[0]}")

    def check_pickles() -> None:
        if found and found.step:
            opening.check_pickles(found.step, found.flag, keys=found.step.pickled_keys()[share[0] :: share[1]])

    check_on_all_ranks(check_sums, *share)
    check_on_all_ranks(check_pickles, *share)  # of files whose sums other ranks may have read
