"""Checks of the run's data: present, complete, long enough, and within the vocabulary.

They run before a process group or a GPU is touched, and before Megatron, which trusts its input, opens a file.
"""

import json
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import get_blend_from_list

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import read_text
from megatron_cream.config.checks import short_texts
from megatron_cream.data import indexed
from megatron_cream.data.tokenizers import TokenIdMismatch, check_megatron_ids, has_eod

SAMPLED_BYTES = 64 << 20
"""Number of bytes of all data that are searched for invalid token ids before a run."""

_SPLITS = ("train", "valid", "test")
_SHORT = "--short-data-path"
_CACHED = {"-dataset_index.npy": np.int16, "-dataset_sample_index.npy": np.int64}
"""{suffix: dtype} of Megatron's cached indices of a blend: the data set of each sample, and its number there."""


def check(args: Namespace) -> None:
    """Check that all data exists, has the right size and has documents that are long enough.

    `check_whole` has the checks that must read whole files.

    Raises:
        UsageError: the first problem found.
    """
    prefixes = _prefixes(args)
    if all(name == _SHORT for name, _ in prefixes):
        raise UsageError(
            "--data-path is missing: give the prefix of a .bin/.idx pair (tools/preprocess_data.py writes one), "
            "or --embedded-data"
        )
    need = _least_tokens(args)
    for name, prefix in prefixes:
        lengths = _read_index(name, prefix, indexed.open_index).lengths
        if name == _SHORT:
            short_texts.check_lengths(name, prefix, lengths, args.seq_length)
        elif not indexed.has_long_document(lengths, need):
            raise UsageError(
                f"{name} {prefix}: none of its {len(lengths)} documents has {need} tokens, the length of a sample; "
                f"the longest has {lengths.max()}"
            )
    _split_shares(args)
    _check_cache(args.data_cache_path)


def check_whole(args: Namespace, share: tuple[int, int] = (0, 1)) -> None:
    """Check every entry of every index, 20 bytes a document.

    Args:
        args: the parsed flags.
        share: (i, n): this is reader i of n readers, and checks one n-th of each file.

    Raises:
        UsageError: a file is damaged.
    """
    for name, prefix in _prefixes(args):
        _read_index(name, prefix, indexed.check_index, share)
        _read_index(name, prefix, indexed.check_loss_mask, share)


def check_splits(args: Namespace) -> None:
    """Raise UsageError if a split that the run uses has no document that is long enough.

    Call it after `check`.
    """
    if args.split is None:
        return
    need = _least_tokens(args)
    instead = {"train": "longer documents", "valid": "another share, or --eval-iters 0", "test": "a share of 0"}
    for name, prefix in _prefixes(args):
        if name == _SHORT:  # all of it is for training
            continue
        lengths = indexed.open_index(prefix).lengths
        for split, share in zip(_SPLITS, _split_shares(args), strict=True):
            wanted = not args.skip_train if split == "train" else args.eval_iters
            if share is None or not wanted:
                continue
            part = lengths[round(share[0] * len(lengths)) : round(share[1] * len(lengths))]  # as Megatron cuts it
            if not indexed.has_long_document(part, need):
                raise UsageError(
                    f"{name} {prefix}: none of the {len(part)} documents that --split {args.split} leaves for {split} "
                    f"has {need} tokens; give {instead[split]}"
                )


def check_held_out(args: Namespace, files: list[tuple[str, tuple[float, float]]]) -> None:
    """Raise UsageError if no held-out document is as long as the longest of --eval-lengths.

    Args:
        args: the parsed flags.
        files: prefixes of the validation data, each with the (first, last) fractions of its documents.
    """
    longest = max(args.eval_lengths or [0])
    lengths = [(indexed.open_index(prefix).lengths, share) for prefix, share in files] if longest else []
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


def check_token_ids(args: Namespace) -> None:
    """Raise UsageError if the data has token ids outside the vocabulary, `args.vocab_size`.

    Call it after `check`. It reads at most SAMPLED_BYTES, spread over the files. Training checks each sample too.
    """
    prefixes = _prefixes(args)
    for name, prefix in prefixes:
        least, greatest = indexed.token_range(prefix, indexed.open_index(prefix), SAMPLED_BYTES // len(prefixes))
        if not 0 <= least <= greatest < args.vocab_size:
            raise UsageError(
                f"{name} {prefix}: contains token id {least if least < 0 else greatest}, but the vocabulary of "
                f"--tokenizer-type {args.tokenizer_type} has {args.vocab_size}; give the tokenizer that the data was "
                "made with"
            )
        if indexed.has_loss_mask(prefix):
            mask = indexed.loss_mask_prefix(prefix)
            if indexed.token_range(mask, indexed.open_index(mask), SAMPLED_BYTES // len(prefixes))[1] > 1:
                raise UsageError(f"{name} {prefix}: {mask}.bin is not a loss mask: it has values other than 0 and 1")


def _split_shares(args: Namespace) -> list[tuple[float, float] | None]:
    """Return the (first, last) fractions of the documents that each split of --split has.

    An empty split is None.

    Raises:
        UsageError: --split cannot be parsed, or leaves nothing to train on or to validate on.
    """
    if args.split is None:
        if args.train_data_path and not args.valid_data_path and args.eval_iters:
            raise UsageError("--valid-data-path is missing: --train-data-path needs it; give it, or --eval-iters 0")
        return []
    try:
        if not re.fullmatch(r"[.0-9]+([,/ ]+[.0-9]+){0,2}", args.split.strip()):  # Megatron reads -2 as 2
            raise ValueError
        with np.errstate(invalid="raise"):  # shares that are all 0 give 0 / 0
            shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    except (AssertionError, ValueError, ArithmeticError) as error:
        raise UsageError(f"--split {args.split}: expected three numbers, such as 969,30,1") from error
    if shares[0] is None and not args.skip_train:
        raise UsageError(f"--split {args.split}: leaves nothing to train on; give its first part a share")
    if shares[1] is None and args.eval_iters:
        raise UsageError(
            f"--split {args.split}: leaves nothing to validate on; give its second part a share, or --eval-iters 0"
        )
    return shares


def _least_tokens(args: Namespace) -> int:
    """Return how many tokens a document of the long data must have."""
    window = args.target_length if args.position_sampler == "full" else args.seq_length
    return max(window, args.long_min_tokens or 0)


def _prefixes(args: Namespace) -> list[tuple[str, str]]:
    """Return (flag, prefix) of all data, without the weights of blends."""
    return [(name, prefix) for name, blend in _blends(args) for prefix in _blend_prefixes(name, blend)]


def _blends(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield (flag, weights and prefixes as given) of each list of data."""
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path", "short_data_path"):
        if getattr(args, name):
            yield to_flag(name), getattr(args, name)
    if args.data_args_path:
        flag = to_flag("data_args_path")
        yield flag, _read_list(flag, args.data_args_path).split()
    if args.per_split_data_args_path:
        flag = to_flag("per_split_data_args_path")
        try:
            found = json.loads(_read_list(flag, args.per_split_data_args_path))
            blends = [found[split] for split in _SPLITS]
            lists = [blend.split() if isinstance(blend, str) else list(blend or []) for blend in blends]
            if not all(isinstance(item, str) for items in lists for item in items):
                raise ValueError("must map train, valid and test to lists of text")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            where = f"{flag} {args.per_split_data_args_path}"
            raise UsageError(f"{where}: not a valid list of data: {one_line(error)}") from error
        for items in filter(None, lists):
            yield flag, items


def _read_list(flag: str, path: str) -> str:
    try:
        return read_text(Path(path), "a readable list of data")
    except UsageError as error:
        raise UsageError(f"{flag} {error}") from error


def _blend_prefixes(flag: str, blend: list[str]) -> list[str]:
    try:
        prefixes, weights = get_blend_from_list(blend) or ([], None)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"{flag} {' '.join(blend)}: give a weight before each prefix, or no weights") from error
    for weight in weights or []:
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"{flag} {' '.join(blend)}: weight {weight}: must be a number of at least 0")
    if weights and not sum(weights):
        raise UsageError(f"{flag} {' '.join(blend)}: all weights are 0")
    return prefixes


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
