"""Checks of the numbers in the flags, before other values are computed from them.

Megatron checks few of its flags' values: it trains with a learning rate of NaN, and divides by a negative interval.
"""

import math
from argparse import Namespace
from typing import Any

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError

_POSITIVE = {
    "train_iters", "train_samples", "log_interval", "eval_interval", "save_interval", "save_retain_interval",
    "exit_interval", "exit_duration_in_mins", "distributed_timeout_minutes", "ffn_hidden_size", "kv_channels",
    "vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings", "lr", "lr_decay_iters",
    "lr_decay_samples", "norm_epsilon", "adam_eps", "init_method_std", "seed", "num_dataset_builder_threads",
    "dist_ckpt_workers", "tensorboard_log_interval", "recompute_num_layers", "ckpt_step", "most_recent_k",
    "save_hook_minutes", "lora_alpha", "lora_plus_ratio",
}  # fmt: skip
"""Variables that must be above 0. All others may be 0."""

_BELOW_ONE = {
    "attention_dropout", "hidden_dropout", "lora_dropout", "adam_beta1", "adam_beta2", "sgd_momentum",
    "lr_warmup_fraction",
}  # fmt: skip
"""Variables that must be below 1."""

_MAXIMUM = {
    "num_layers": 10_000, "hidden_size": 1 << 20, "ffn_hidden_size": 1 << 24, "num_attention_heads": 1 << 16,
    "num_query_groups": 1 << 16, "kv_channels": 1 << 16, "vocab_size": 1 << 26, "seq_length": 1 << 30,
    "target_length": 1 << 40, "original_max_position_embeddings": 1 << 40, "max_position_embeddings": 1 << 40,
    "eval_lengths": 1 << 30, "micro_batch_size": 1 << 20, "global_batch_size": 1 << 24, "train_iters": 1 << 40,
    "train_samples": 1 << 48, "seed": (1 << 31) - 1, "num_workers": 1 << 10, "eval_iters": 1 << 40,
    "make_vocab_size_divisible_by": 1 << 20, "distributed_timeout_minutes": 1 << 20,
    "timeout_minutes": 1 << 20,
    "signal_exit_code": 255, "lora_rank": 1 << 16,
}  # fmt: skip
"""{variable: largest accepted value}, far beyond any model. A larger value is a typing error, which would otherwise
end in an attempt to allocate that much memory."""

_MAY_BE_NEGATIVE = {
    "null_tokenizer_pad_id", "inference_batch_times_seqlen_threshold", "inference_dynamic_batching_num_cuda_graphs",
    "moe_router_force_biased", "moe_paged_stash_buffer_size_factor_cuda", "moe_paged_stash_buffer_size_factor_cpu",
    "rl_default_top_k", "glu_linear_offset", "window_size", "rank", "local_rank", "async_ckpt_cpu_priority",
}  # fmt: skip


def check(args: Namespace, defaults: dict[str, Any]) -> None:
    """Check every number that is not a default.

    Raises:
        UsageError: a number is not finite, negative, 0 where it must be positive, or too large.
    """
    for name, value in vars(args).items():
        if value == defaults.get(name):
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(name, number)


def _check_number(name: str, value: int | float) -> None:
    shown = f"{to_flag(name)} {value}"
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{shown}: must be a finite number")
    if name in _POSITIVE and value <= 0:
        raise UsageError(f"{shown}: must be above 0")
    if value < 0 and name not in _MAY_BE_NEGATIVE:
        raise UsageError(f"{shown}: must not be negative")
    if name in _BELOW_ONE and value >= 1:
        raise UsageError(f"{shown}: must be below 1")
    if value > _MAXIMUM.get(name, value):
        raise UsageError(f"{shown}: must be at most {_MAXIMUM[name]}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UsageError(f"{shown}: must fit into 64 bits")


def check_learning_rates(args: Namespace) -> None:
    """Raise UsageError for a missing learning rate, or for a contradictory schedule."""
    if args.skip_train:
        return
    if args.lr is None:
        raise UsageError("--lr is missing: give the learning rate, 2e-5 in the paper")
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(args, name) or 0.0
        if value > args.lr:
            raise UsageError(f"{to_flag(name)} {value}: must be at most --lr {args.lr}")
    steps = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_iters and steps and args.lr_warmup_iters >= steps:
        limit = "--lr-decay-iters" if args.lr_decay_iters else "--train-iters"
        raise UsageError(f"--lr-warmup-iters {args.lr_warmup_iters}: must be below {limit} {steps}")
    samples = args.lr_decay_samples or args.train_samples
    if args.lr_warmup_samples and samples and args.lr_warmup_samples >= samples:
        raise UsageError(f"--lr-warmup-samples {args.lr_warmup_samples}: must be below {samples}, the end of the decay")
