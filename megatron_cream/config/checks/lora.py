"""Checks of the flags of LoRA."""

import importlib.util
from argparse import Namespace
from dataclasses import fields

from megatron_cream.checkpoint.start import FoundCheckpoint
from megatron_cream.common.cli import format_flag, split_names, to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.config.options import LoraConfig
from megatron_cream.model.lora_settings import NF4_BLOCK, TARGETS, TRAINED

_UNSUPPORTED = {
    "tp_comm_overlap": False,
    "delay_wgrad_compute": False,
    "use_transformer_engine_op_fuser": False,
    "defer_embedding_wgrad_compute": False,
    "optimizer_cpu_offload": False,
}
"""{flag that adapters were not tested with: its default}."""

_SAVED = ("lora_rank", "lora_alpha", "lora_targets", "lora_train", "lora_rslora", "lora_plus_ratio", "lora_base_dtype")
"""Flags that describe the adapters in a checkpoint."""

_DEFAULTS = {given.name: given.default for given in fields(LoraConfig)}

_TRANSFORMER_ENGINE = ("te", "fused", "unfused")
"""Attention backends that run in Transformer Engine's layers only."""


def check_each(args: Namespace) -> None:
    """Raise UsageError for a flag of LoRA that is wrong whatever the model is."""
    if not args.lora_rank:
        for given in fields(LoraConfig):
            value = getattr(args, given.name)
            if value != given.default:
                raise UsageError(f"{format_flag(given.name, value)}: only with --lora-rank; give its rank, such as 16")
        return
    _check_names("lora_targets", args.lora_targets, TARGETS)
    if args.lora_train != "none":
        _check_names("lora_train", args.lora_train, (*TRAINED, "none"))
        if "none" in split_names(args.lora_train):
            raise UsageError(f"--lora-train {args.lora_train}: give none alone")
    for name, default in _UNSUPPORTED.items():
        if (value := getattr(args, name, default)) != default:
            raise UsageError(f"{format_flag(name, value)}: not supported with --lora-rank")
    if args.cuda_graph_impl not in (None, "none"):  # None: not given
        raise UsageError(f"--cuda-graph-impl {args.cuda_graph_impl}: not supported with --lora-rank")
    if args.optimizer != "adam":
        raise UsageError(f"--optimizer {args.optimizer}: not supported with --lora-rank")
    if args.lora_base_dtype == "nf4" and args.fp8:
        raise UsageError(f"--fp8-format {args.fp8}: not with --lora-base-dtype nf4; leave one of them out")
    if args.lora_base_dtype == "nf4" and args.attention_backend in _TRANSFORMER_ENGINE:
        raise UsageError(
            f"--attention-backend {args.attention_backend}: not with --lora-base-dtype nf4, because Transformer "
            "Engine's layers cannot hold NF4; use auto"
        )


def check_checkpoint(args: Namespace, found: FoundCheckpoint | None) -> None:
    """Raise UsageError if the checkpoint has other adapters than the flags of LoRA describe."""
    if found is None:
        return
    saved, where = getattr(found.args, "lora_rank", 0), f"{found.flag} {found.folder.parent}"
    if saved and found.flag != "--load":
        raise UsageError(
            f"{where}: has adapters, and not all weights; merge them first, with tools/convert_hf.py export"
        )
    if args.lora_rank and not saved and found.flag == "--load":
        raise UsageError(
            f"{where}: {found.folder.name} has all weights, and no adapters. To train adapters on them, give it with "
            "--pretrained-checkpoint"
        )
    if not saved:
        return
    for name in _SAVED:
        theirs, ours = getattr(found.args, name, _DEFAULTS[name]), getattr(args, name)
        if name == "lora_alpha" and ours is None:
            continue  # `fill.set_lora` takes the saved one
        if theirs != ours:
            was = f"{where}: {found.folder.name} was saved with {to_flag(name)} {theirs}"
            raise UsageError(f"{was}, but these flags set {ours}")


def check_together(args: Namespace) -> None:
    """Raise UsageError if the model or the layout cannot have adapters; call it after `fill`."""
    if not args.lora_rank:
        return
    is_benchmark = args.embedded_data and not (args.save or args.save_hf)  # random weights are good enough
    if args.lora_base is None and not is_benchmark:
        raise UsageError(
            f"--lora-rank {args.lora_rank}: needs a model whose weights stay as they are; give --load-hf MODEL"
        )
    if args.adapter and args.save_hf is None:
        raise UsageError("--adapter: only with --save-hf FOLDER")
    tp = args.tensor_model_parallel_size
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if groups % tp:
        raise UsageError(f"--tensor-model-parallel-size {tp}: must divide --num-query-groups {groups} with --lora-rank")
    if args.lora_base_dtype == "nf4":
        if args.hidden_size % NF4_BLOCK:
            raise UsageError(
                f"--lora-base-dtype nf4: --hidden-size {args.hidden_size} must be a multiple of {NF4_BLOCK}"
            )
        if importlib.util.find_spec("torchao") is None:
            raise UsageError(
                "--lora-base-dtype nf4: needs torchao, which is not installed; pip install 'torchao>=0.18'"
            )


def _check_names(name: str, text: str, known: tuple[str, ...]) -> None:
    for each in split_names(text):
        if each not in known:
            raise UsageError(f"{to_flag(name)} {text}: {each or 'an empty name'}: choose from {', '.join(known)}")
