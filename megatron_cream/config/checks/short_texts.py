"""Checks of the flags that mix packed short texts into the training data, and of these texts."""

from argparse import Namespace

import numpy as np

from megatron_cream.common.errors import UsageError
from megatron_cream.data.packing import MIN_TOKENS


def check(args: Namespace) -> None:
    """Raise UsageError if the flags contradict each other or the layout, after `fill`."""
    share, prefixes = args.short_share, args.short_data_path
    if share is not None and not 0 <= share < 1:
        raise UsageError(f"--short-share {share}: must be at least 0 and below 1, such as 0.3")
    if share and not prefixes:
        raise UsageError(f"--short-share {share}: needs --short-data-path with the short texts")
    if prefixes and share is None:
        flag = f"--short-data-path {' '.join(prefixes)}"
        raise UsageError(f"{flag}: give its share of the samples, such as --short-share 0.3")
    least = args.long_min_tokens
    if least is not None and least < args.seq_length:
        raise UsageError(
            f"--long-min-tokens {least}: must be at least --seq-length {args.seq_length}, the length of a sample; "
            "leave it out for that"
        )
    if share:
        _check_attention(args)


def _check_attention(args: Namespace) -> None:
    flag, name = f"--short-share {args.short_share}", args.attention["name"]
    if name == "local":
        raise UsageError(f"{flag}: not with --attention-backend local, which cannot keep documents apart; use auto")
    if name == "te" and args.context_parallel_size > 1:
        raise UsageError(
            f"{flag}: not with Transformer Engine's attention and --context-parallel-size "
            f"{args.context_parallel_size}; use --attention-backend flash or sdpa"
        )
    if args.cuda_graph_impl not in (None, "none"):  # None: not given
        raise UsageError(
            f"{flag}: not with --cuda-graph-impl {args.cuda_graph_impl}, which would replay the documents of the first "
            "sample; leave one of them out"
        )


def check_lengths(flag: str, prefix: str, lengths: np.ndarray, window: int) -> None:
    """Raise UsageError if no document of the data can be packed into `window` tokens."""
    if not ((lengths >= MIN_TOKENS) & (lengths <= window)).any():
        raise UsageError(
            f"{flag} {prefix}: none of its {len(lengths)} documents has from {MIN_TOKENS} to {window} tokens "
            "(--seq-length); give longer ones in --data-path"
        )
