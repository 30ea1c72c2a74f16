"""The data of a run: the data sets that the flags name, and the part of each that is read."""

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import get_blend_from_list
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import read_text
from megatron_cream.data.indexed import open_index
from megatron_cream.data.packing import PackingTotals, count_packed

SHORT = "--short-data-path"
SPLITS = ("train", "valid", "test")

type Share = tuple[float, float]
"""The first and the last fraction of a data set's documents."""


@dataclass(frozen=True)
class RunData:
    """The data sets of a run. Each is named by its prefix, of PREFIX.bin and PREFIX.idx.

    files: (flag, prefix) of all data sets.
    train: the data sets of long documents that the run trains on.
    held_out: the data sets that it validates on, each with its share of the documents.
    shares: the part of --split for training, validation and test; None if it is empty. [] without --split.
    least_tokens: tokens that a long document must have.
    short: the data sets of short texts, which are packed.
    short_weights: their weights; None without weights.
    window: tokens of a sample.
    """

    files: list[tuple[str, str]]
    train: list[str]
    held_out: list[tuple[str, Share]]
    shares: list[Share | None]
    least_tokens: int
    short: list[str]
    short_weights: list[float] | None
    window: int

    def count_long(self) -> tuple[int, int]:
        """Return the number of documents and of tokens of `train`."""
        indexes = [open_index(prefix) for prefix in self.train]
        return sum(len(index.lengths) for index in indexes), sum(index.tokens for index in indexes)

    def count_short(self) -> dict[str, PackingTotals]:
        """Return what one epoch of each data set of `short` has."""
        return {prefix: count_packed(prefix, self.window) for prefix in self.short}


def read(args: Namespace) -> RunData:
    """Return the data that the flags name, after `fill`. No data set is opened.

    Raises:
        UsageError: no data is named, or a list of data or --split cannot be parsed or leaves nothing to read.
    """
    lists = [(flag, *_parse_list(flag, items)) for flag, items in _lists(args)]
    files = [(flag, prefix) for flag, prefixes, _ in lists for prefix in prefixes]
    if all(flag == SHORT for flag, _ in files):
        raise UsageError(
            "--data-path is missing: give the prefix of a .bin/.idx pair (tools/preprocess_data.py writes one), "
            "or --embedded-data"
        )
    shares = _read_shares(args)
    whole, per_split = get_blend_and_blend_per_split(args)
    train, valid, _ = per_split or (whole, whole, whole)
    if not train and not args.skip_train:
        raise UsageError(_describe_missing(args, "train"))
    if not valid and args.eval_iters:
        raise UsageError(f"{_describe_missing(args, 'valid')}, or --eval-iters 0")
    share = (0.0, 1.0) if per_split else shares[1]
    short, short_weights = next((given[1:] for given in lists if given[0] == SHORT), ([], None))
    return RunData(
        files=files,
        train=list(dict.fromkeys(train[0])) if train else [],
        held_out=[(prefix, share) for prefix in valid[0]] if valid and share else [],
        shares=shares,
        least_tokens=max(
            args.target_length if args.position_sampler == "full" else args.seq_length, args.long_min_tokens or 0
        ),
        short=short,
        short_weights=short_weights,
        window=args.seq_length,
    )


def _lists(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield (flag, weights and prefixes as given) of each list of data."""
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path", "short_data_path"):
        if getattr(args, name):
            yield to_flag(name), getattr(args, name)
    if args.data_args_path:
        flag = to_flag("data_args_path")
        items = _read_file(flag, args.data_args_path).split()
        if not items:
            raise UsageError(f"{flag} {args.data_args_path}: is empty; write prefixes of .bin/.idx pairs into it")
        yield flag, items
    if args.per_split_data_args_path:
        flag = to_flag("per_split_data_args_path")
        try:
            found = json.loads(_read_file(flag, args.per_split_data_args_path))
            blends = [found[split] for split in SPLITS]
            lists = [blend.split() if isinstance(blend, str) else list(blend or []) for blend in blends]
            for split, blend, items in zip(SPLITS, blends, lists, strict=True):
                if blend is not None and not items:  # Megatron crashes on it
                    raise ValueError(f"{split} is empty; write null for no data")
            if not all(isinstance(item, str) for items in lists for item in items):
                raise ValueError("must map train, valid and test to lists of text")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            where = f"{flag} {args.per_split_data_args_path}"
            raise UsageError(f"{where}: not a valid list of data: {one_line(error)}") from error
        for items in filter(None, lists):
            yield flag, items


def _describe_missing(args: Namespace, split: str) -> str:
    """Return the message that the data of a split is missing, for flags that name each split's own."""
    if args.per_split_data_args_path:
        flag = to_flag("per_split_data_args_path")
        return f"{flag} {args.per_split_data_args_path}: names no data for {split}; name some"
    given = next(name for name in SPLITS if getattr(args, f"{name}_data_path"))
    return f"--{split}-data-path is missing: --{given}-data-path needs it; give it"


def _read_file(flag: str, path: str) -> str:
    try:
        return read_text(Path(path), "a readable list of data")
    except UsageError as error:
        raise UsageError(f"{flag} {error}") from error


def _parse_list(flag: str, items: list[str]) -> tuple[list[str], list[float] | None]:
    """Return the prefixes and the weights of a list of data; None without weights."""
    try:
        prefixes, weights = get_blend_from_list(items) or ([], None)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"{flag} {' '.join(items)}: give a weight before each prefix, or no weights") from error
    for weight in weights or []:
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"{flag} {' '.join(items)}: weight {weight}: must be a number of at least 0")
    if weights and not sum(weights):
        raise UsageError(f"{flag} {' '.join(items)}: all weights are 0")
    return prefixes, weights


def _read_shares(args: Namespace) -> list[Share | None]:
    """Return the share of the documents that each split of --split has.

    Raises:
        UsageError: --split cannot be parsed, or leaves nothing to train on or to validate on.
    """
    if args.split is None:
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
