"""Checks of the run's data: present, complete, long enough, and within the vocabulary.

They run before a process group or a GPU is touched, and before Megatron, which trusts its input, opens a file.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.config.checks import short_texts
from megatron_cream.config.run_data import SHORT, SPLITS, RunData
from megatron_cream.data import indexed
from megatron_cream.data.tokenizers import TokenIdMismatch, check_megatron_ids, has_eod

SAMPLED_BYTES = 64 << 20
"""Number of bytes of all data that are searched for invalid token ids before a run."""

_CACHED = {"-dataset_index.npy": np.int16, "-dataset_sample_index.npy": np.int64}
"""{suffix: dtype} of Megatron's cached indices of a blend: the data set of each sample, and its number there."""


def check(args: Namespace, data: RunData) -> None:
    """Check that all data exists, has the right size and has documents that are long enough.

    `check_whole` has the checks that must read whole files.

    Raises:
        UsageError: the first problem found.
    """
    for name, prefix in data.files:
        lengths = _read_index(name, prefix, indexed.open_index).lengths
        if name == SHORT:
            short_texts.check_lengths(name, prefix, lengths, data.window)
        elif not indexed.has_long_document(lengths, data.least_tokens):
            raise UsageError(
                f"{name} {prefix}: none of its {len(lengths)} documents has {data.least_tokens} tokens, the length of "
                f"a sample; the longest has {lengths.max()}"
            )
    _check_cache(args.data_cache_path)


def check_whole(data: RunData, share: tuple[int, int] = (0, 1)) -> None:
    """Check every entry of every index, 20 bytes a document.

    Args:
        data: the data of the run.
        share: (i, n): this is reader i of n readers, and checks one n-th of each file.

    Raises:
        UsageError: a file is damaged.
    """
    for name, prefix in data.files:
        _read_index(name, prefix, indexed.check_index, share)
        _read_index(name, prefix, indexed.check_loss_mask, share)


def check_splits(args: Namespace, data: RunData) -> None:
    """Raise UsageError if a split that the run uses has no document that is long enough.

    Call it after `check`.
    """
    instead = {"train": "longer documents", "valid": "another share, or --eval-iters 0", "test": "a share of 0"}
    for name, prefix in data.files if data.shares else []:
        if name == SHORT:  # all of it is for training
            continue
        lengths = indexed.open_index(prefix).lengths
        for split, share in zip(SPLITS, data.shares, strict=True):
            wanted = not args.skip_train if split == "train" else args.eval_iters
            if share is None or not wanted:
                continue
            part = lengths[round(share[0] * len(lengths)) : round(share[1] * len(lengths))]  # as Megatron cuts it
            if not indexed.has_long_document(part, data.least_tokens):
                raise UsageError(
                    f"{name} {prefix}: none of the {len(part)} documents that --split {args.split} leaves for {split} "
                    f"has {data.least_tokens} tokens; give {instead[split]}"
                )


def check_held_out(args: Namespace, data: RunData) -> None:
    """Raise UsageError if no held-out document is as long as the longest of --eval-lengths."""
    longest = max(args.eval_lengths or [0])
    lengths = [(indexed.open_index(prefix).lengths, share) for prefix, share in data.held_out] if longest else []
    parts = [found[round(first * len(found)) : round(last * len(found))] for found, (first, last) in lengths]
    if longest and not any(indexed.has_long_document(part, longest) for part in parts):
        raise UsageError(
            f"--eval-lengths {longest}: no held-out document is that long; give a smaller length or longer documents"
        )


def check_tokenizer(args: Namespace, found: Any) -> None:
    """Raise UsageError if the tokenizer contradicts its tokenizer.json or the flags.

    It must encode text as its tokenizer.json does, and have the tokens that the flags need.

    Args:
        args: the parsed flags.
        found: Megatron's tokenizer.
    """
    try:
        check_megatron_ids(found)
    except TokenIdMismatch as error:
        raise UsageError(f"--tokenizer-model {error}") from error
    if args.eod_mask_loss and not has_eod(found):
        where = f"--tokenizer-type {args.tokenizer_type} {args.tokenizer_model or ''}"
        raise UsageError(f"{where}: has no end-of-document token; leave --eod-mask-loss out")


def check_token_ids(args: Namespace, data: RunData) -> None:
    """Raise UsageError if the data has token ids outside the vocabulary, `args.vocab_size`.

    Call it after `check`. It reads at most SAMPLED_BYTES, spread over the files. Training checks each sample too.
    """
    for name, prefix in data.files:
        least, greatest = indexed.token_range(prefix, indexed.open_index(prefix), SAMPLED_BYTES // len(data.files))
        if not 0 <= least <= greatest < args.vocab_size:
            raise UsageError(
                f"{name} {prefix}: contains token id {least if least < 0 else greatest}, but the vocabulary of "
                f"--tokenizer-type {args.tokenizer_type} has {args.vocab_size}; give the tokenizer that the data was "
                "made with"
            )
        if indexed.has_loss_mask(prefix):
            mask = indexed.loss_mask_prefix(prefix)
            if indexed.token_range(mask, indexed.open_index(mask), SAMPLED_BYTES // len(data.files))[1] > 1:
                raise UsageError(f"{name} {prefix}: {mask}.bin is not a loss mask: it has values other than 0 and 1")


def _read_index(flag: str, prefix: str, read: Callable, *settings) -> Any:
    """Return `read(prefix, *settings)`, with its errors as UsageError that names the flag."""
    try:
        return read(prefix, *settings)
    except (ValueError, OSError) as error:
        raise UsageError(f"{flag} {prefix}: {error}") from error


def _check_cache(folder: str | None) -> None:
    """Raise UsageError for a damaged index in the cache, which Megatron maps without checks."""
    for suffix, dtype in _CACHED.items():
        for file in sorted(Path(folder).glob(f"*{suffix}")) if folder else []:
            try:
                found = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                reason = one_line(error, 100)
                raise UsageError(
                    f"--data-cache-path {folder}: {file.name} is damaged ({reason}); remove it, and it is built again"
                ) from error
            if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype != dtype:
                raise UsageError(f"--data-cache-path {folder}: {file.name} is not an index of Megatron; remove it")
