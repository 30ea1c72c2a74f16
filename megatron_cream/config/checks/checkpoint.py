"""Checks of the flags against the checkpoint that a run starts from."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import base_weights
from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
from megatron_cream.checkpoint.start import FoundCheckpoint, Origin, parse_step
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError

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

# Flags that decide the samples.
_DATA = ("short_data_path", "data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
_SAMPLES = (
    "seed", "split", "dataloader_type", "seq_length", "position_sampler", "position_mix", "target_length",
    "cream_sigma", "cream_variant", "cream_relativity", "cream_middle", "pose_chunks",
    "chat_loss", "short_share", "long_min_tokens",
)  # fmt: skip


def check_model(args: Namespace, origin: Origin) -> None:
    """Check that the flags describe the saved model.

    A resumed run needs the same rotary embedding too.

    Raises:
        UsageError: a flag differs from the saved one, or the checkpoint lacks a parameter.
    """
    found, resumed = origin.checkpoint, origin.resumed
    if found is None:
        return
    for name in (*_SHAPE, *(["rotary_base", "rope_scaling_config"] if resumed else [])):
        saved, ours = _get_value(found.args, name), _get_value(args, name)
        if saved != ours and hasattr(found.args, name) and (saved is not None or name == "rope_scaling_config"):
            raise UsageError(
                f"{found.flag} {found.folder.parent}: {found.folder.name} was saved with "
                f"{to_flag(_SET_BY.get(name, name))} {saved}, but these flags set {ours}"
                f"{_advise_rope(name, found.args)}"
            )
    if resumed:
        _check_optimizer(args, found)
        if found.step and not args.no_load_optim:
            _check_schedule(args, found.step.common, f"{found.flag} {found.folder.parent}", found.folder.name)
    if found.step and _is_own_model(found.args):
        base = base_weights.folder_of(args.lora_base) if found.flag == "--load" else None
        step = parse_step(found.folder)
        open_checkpoint(found.folder.parent, step, flag=found.flag, checksums=False, base=base)


def _advise_rope(name: str, saved: Namespace) -> str:
    """Return the flags of the saved rotary embedding, if it is what differs and flags can give it."""
    scaling = getattr(saved, "rope_scaling_config", None)
    kind = scaling["rope_type"] if scaling else "none"
    if name not in ("rotary_base", "rope_scaling_config") or kind not in ("none", "linear", "ntk", "yarn"):
        return ""
    factor = f" --rope-scaling-factor {scaling['factor']:g}" if scaling else ""
    return f". To resume, give --rope-scaling-type {kind}{factor} --rotary-base {saved.rotary_base:g}"


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


def _is_own_model(saved: Namespace) -> bool:
    """Tell whether the flags in a checkpoint are those of a Llama that this project trained."""
    llama = {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False}
    same = all(getattr(saved, name, None) == value for name, value in llama.items())
    return same and hasattr(saved, "rope_scaling_config")


def _get_value(args: Namespace, name: str) -> Any:
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return getattr(args, "num_attention_heads", None)
    return getattr(args, name, None)


def _check_schedule(args: Namespace, common: dict[str, Any], checkpoint: str, step: str) -> None:
    """Compare the schedule of these flags with the saved one.

    Args:
        args: Megatron's flags of this run.
        common: Megatron's state beside the tensors.
        checkpoint: flag and folder, for messages.
        step: name of the step folder.

    Raises:
        UsageError: they differ, and no flag chooses one.
    """
    saved = common.get("opt_param_scheduler")
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler or not isinstance(saved, dict):
        return
    for (key, name), value in _schedule_of_flags(args).items():
        if key in saved and saved[key] != value:
            raise UsageError(
                f"{checkpoint}: {to_flag(name)}: {step} was saved with {key} {saved[key]}, but these flags "
                f"set {value}. Give the saved value, or --override-opt-param-scheduler for the schedule of these "
                "flags, or --use-checkpoint-opt-param-scheduler for the saved one."
            )


def _schedule_of_flags(args: Namespace) -> dict[tuple[str, str], Any]:
    """Return {(Megatron's key in a checkpoint, name of the flag): value}."""
    found = {
        ("max_lr", "lr"): args.lr,
        ("min_lr", "min_lr"): args.min_lr,
        ("lr_decay_style", "lr_decay_style"): args.lr_decay_style,
        ("start_wd", "weight_decay"): args.start_weight_decay,
        ("end_wd", "weight_decay"): args.end_weight_decay,
        ("wd_incr_style", "weight_decay_incr_style"): args.weight_decay_incr_style,
    }
    kind, samples = ("iters", args.global_batch_size) if args.train_iters else ("samples", 1)
    total = getattr(args, f"train_{kind}")
    if not total or not samples:
        return found
    decay = getattr(args, f"lr_decay_{kind}") or total
    found["lr_decay_steps", f"lr_decay_{kind}"] = decay * samples
    found["wd_incr_steps", f"train_{kind}"] = total * samples
    if args.lr_warmup_fraction is None:
        found["lr_warmup_steps", f"lr_warmup_{kind}"] = getattr(args, f"lr_warmup_{kind}") * samples
    else:
        found["lr_warmup_steps", "lr_warmup_fraction"] = args.lr_warmup_fraction * (decay * samples)
    return found


def resume_warning(args: Namespace, origin: Origin) -> str:
    """Return notes on allowed but usually unintended differences of a resumed run, or "".

    Data that only moved to another folder count as the same.
    """
    if (found := origin.resumed) is None:
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
