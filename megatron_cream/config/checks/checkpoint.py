"""Checks of the flags against the checkpoint that a run starts from."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import base_weights, opening, start
from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
from megatron_cream.checkpoint.start import FoundCheckpoint, Origin, parse_step
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.config.checks import schedule
from megatron_cream.model.rotary import build_rope_scaling

# Flags that describe the model of a checkpoint.
_SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "untie_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm", "add_bias_linear", "swiglu",
    "normalization", "layernorm_epsilon",
)  # fmt: skip
_ROPE = ("rotary_base", "rope_scaling_config")
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
    _check_megatron_rope(args, found, resumed is not None)
    for name in (*_SHAPE, *(_ROPE if resumed else ())):
        saved, ours = _get_value(found.args, name), _get_value(args, name)
        if saved != ours and hasattr(found.args, name) and (saved is not None or name == "rope_scaling_config"):
            raise UsageError(
                f"{found.flag} {found.folder.parent}: {found.folder.name} was saved with "
                f"{to_flag(_SET_BY.get(name, name))} {saved}, but these flags set {ours}"
                f"{_advise_rope(args, found) if name in _ROPE else ''}"
            )
    if resumed:
        _check_optimizer(args, found)
        if not args.no_load_optim:
            schedule.check(args, found)
    if found.step and _is_own_model(found.args):
        base = base_weights.folder_of(args.lora_base) if found.flag == "--load" else None
        step = parse_step(found.folder)
        open_checkpoint(found.folder.parent, step, flag=found.flag, checksums=False, base=base)


def _check_megatron_rope(args: Namespace, found: FoundCheckpoint, is_resumed: bool) -> None:
    """Raise UsageError if Megatron-LM trained the model with a rotary embedding that this run would not use."""
    saved, where = found.args, f"{found.flag} {found.folder.parent}: {found.folder.name} was saved with"
    percent = getattr(saved, "rotary_percent", None)
    if percent not in (None, 1.0):
        raise UsageError(f"{where} --rotary-percent {percent}: only models with 1.0, as Llama's, are supported")
    if getattr(saved, "rotary_interleaved", False):
        raise UsageError(f"{where} --rotary-interleaved: only models without it, as Llama's, are supported")
    if not getattr(saved, "use_rope_scaling", False):
        return
    factor = getattr(saved, "rope_scaling_factor", None) or 8.0  # Megatron's default; its window is fixed
    is_chosen = args.rope_scaling_type is not None or args.rope_scaling_config is not None
    if args.rope_scaling_config != build_rope_scaling("llama3", factor, 8192) if is_resumed else not is_chosen:
        raise UsageError(
            f"{where} --use-rope-scaling. Give --rope-scaling-type llama3 --rope-scaling-factor "
            f"{_format_exactly(factor)} --original-max-position-embeddings 8192"
        )


def _advise_rope(args: Namespace, found: FoundCheckpoint) -> str:
    """Return the flags that give the saved rotary embedding, or "" if no flag does.

    If the target differs, they may be the saved target alone.
    """
    saved = start.read_saved_rope(found)
    if saved is None:
        return ""
    scaling = saved.scaling or {"rope_type": "none"}
    kind, factor = scaling["rope_type"], scaling.get("factor")
    original = scaling.get("original_max_position_embeddings", saved.original)
    given = args.original_max_position_embeddings
    theta = _format_exactly(saved.theta)
    window = f" --original-max-position-embeddings {original}" if original and given not in (None, original) else ""
    kinds = f"{kind} --rope-scaling-factor {_format_exactly(factor)}" if factor else kind
    is_flag = kind in ("none", "linear", "ntk", "yarn")
    if args.target_length == saved.positions:
        return f". To resume, give --rope-scaling-type {kinds} --rotary-base {theta}{window}" if is_flag else ""
    rest = window if args.rotary_base == saved.theta else f" --rotary-base {theta}{window}"
    if args.rope_scaling_type not in (None, kind) or args.rope_scaling_factor not in (None, factor):
        if not is_flag:
            return ""
        rest = f" --rope-scaling-type {kinds}{rest}"
    if args.target_length < saved.positions or args.lora_rank:  # no other run can start from adapters alone
        return f". To resume, give --target-length {saved.positions}{rest}"
    return (
        f". To resume, give --target-length {saved.positions}{rest}. For a longer extension from these weights, give "
        f"--pretrained-checkpoint {found.folder.parent} in place of --load{' and --load-hf' if args.load_hf else ''}, "
        "and another --save folder"
    )


def _format_exactly(value: float) -> str:
    """Return a number so that it is read as the same number: a factor of 4 / 3 needs all its digits."""
    return str(int(value)) if value == int(value) else repr(value)


def _check_optimizer(args: Namespace, found: FoundCheckpoint) -> None:
    """Raise UsageError if this run's optimizer cannot load the saved state."""
    if args.no_load_optim:
        return
    if found.step is None:
        _check_newest(args, found)
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


def _check_newest(args: Namespace, found: FoundCheckpoint) -> None:
    """Raise UsageError if Megatron would load the optimizer's `mp_rank_XX` files of another step than the weights."""
    step, folder = parse_step(found.folder), found.folder.parent
    if args.use_distributed_optimizer and (newest := opening.read_newest_step(folder, found.flag)) != step:
        raise UsageError(
            f"--ckpt-step {step}: from mp_rank_XX files the distributed optimizer resumes only at step {newest}, the "
            f"newest of {found.flag} {folder}. To resume with the weights only, add --no-load-optim."
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


def resume_warning(args: Namespace, origin: Origin) -> str:
    """Return notes on allowed but usually unintended differences of a resumed run, or "".

    Data that only moved to another folder count as the same.
    """
    if (found := origin.resumed) is None:
        return ""
    notes, changed = list(filter(None, [schedule.warn_of_minimum_rate(args, found)])), []
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
