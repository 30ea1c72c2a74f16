"""Position sampling as a transform over Megatron's indexed datasets.

Megatron's BlendedMegatronDatasetBuilder builds a `LongDocumentDataset` for each prefix and
split. It uses the documents that are long enough, in a new order each epoch. A sample is N
tokens of one document, with the position ids that the sampler plans for (seed, epoch, sample).
Samples are not written in advance; files stay memory-mapped.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.core.utils import log_single_rank

from megatron_cream.common.errors import UsageError
from megatron_cream.data.indexed import has_loss_mask, loss_mask_prefix
from megatron_cream.data.long_documents import cache_file, find_long_documents
from megatron_cream.data.order import permute
from megatron_cream.positions import build_sampler

logger = logging.getLogger(__name__)

_PLACE_BITS = 40
"""The data sets of a blend number their samples from multiples of this power of two, so that no two draw alike."""


def _warn(line: str) -> None:
    log_single_rank(logger, logging.WARNING, line)


@dataclass
class LongDocumentDatasetConfig(BlendedMegatronDatasetConfig):
    """Megatron's blend, split and cache settings, and the settings of the position sampler."""

    sampler: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `build_sampler`: name, window, target and the sampler's own."""

    mask_segment_starts: bool = False
    """No loss on the first token of the middle and tail blocks, where the text jumps."""

    chat_loss: Literal["answers", "all"] = "answers"
    """`all`: loss on every token of data that has a loss mask file."""

    eod_token: int | None = None
    """If set, no loss where the input is this token (`--eod-mask-loss`)."""

    vocab_size: int | None = None
    """If set, a token id of this or more raises an error here, before it can fail on the GPU."""

    mark_documents: bool = False
    """Samples have `document_starts` [n], 1 on the first token of each document; here that is the first token."""

    long_min_tokens: int | None = None
    """If set, documents with fewer tokens are not used, even if they fill a sample (`--long-min-tokens`)."""


def open_loss_mask(dataset_path: str, config: LongDocumentDatasetConfig) -> IndexedDataset | None:
    """Open the loss mask of the data at `dataset_path`; return None if every token has loss."""
    if not has_loss_mask(dataset_path):
        return None
    prefix = loss_mask_prefix(dataset_path)
    if config.chat_loss == "all":
        log_single_rank(logger, logging.INFO, f"> loss on all tokens: --chat-loss all ignores {prefix}.bin")
        return None
    log_single_rank(logger, logging.INFO, f"> loss on the tokens marked in {prefix}.bin")
    return IndexedDataset(prefix, multimodal=False, mmap=config.mmap_bin_files)


def _find_place(config: LongDocumentDatasetConfig, dataset_path: str, split: Split) -> int:
    """Return the place of a data set in the blend of its split, from 0."""
    blend = config.blend_per_split[split.value] if config.blend_per_split else config.blend
    prefixes = blend[0] if blend else []
    return prefixes.index(dataset_path) if dataset_path in prefixes else 0


class DocumentDataset(MegatronDataset):
    """Samples of the documents of one PREFIX.bin/.idx, for Megatron's dataset builder."""

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        return low_level_dataset.sequence_lengths.shape[0]

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: LongDocumentDatasetConfig) -> IndexedDataset:
        return IndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)


class LongDocumentDataset(DocumentDataset):
    """Samples of `sampler.sequence_length` tokens with planned position ids.

    `__getitem__` returns int64 arrays [n]: `tokens`, `labels` (the next token within the
    sample), `position_ids`; int64 `sample` and `document`, which identify the sample; and float32
    `loss_mask` [n], 0 on the last token, which has no label, and where the configuration masks.
    If the data has a loss mask file (see `indexed.loss_mask_prefix`), only labels that it marks
    have loss, unless `chat_loss` is `all`. A sample without marked labels has no weight, as
    Megatron averages over a global batch's tokens.

    Sample i is in epoch i // len(documents), at place i % len(documents) of that epoch's order;
    it does not depend on ranks, workers or batch sizes. The data sets of a blend draw positions of their own, each by
    its place in the blend.

    Raises:
        UsageError: samples are requested of a split that has no document long enough.
    """

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config):
        # `indices` lists consecutive document numbers; a range takes no memory.
        begin, end = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
        indices = range(begin, end)
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.sampler = build_sampler(**config.sampler, seed=config.random_seed)
        minimum = max(self.sampler.sequence_length, config.long_min_tokens or 0)
        file = cache_file(dataset_path, begin, end, minimum, config.path_to_cache)
        self.documents = find_long_documents(dataset.sequence_lengths, begin, end, minimum, file, _warn)
        log_single_rank(
            logger,
            logging.INFO,
            f"> {index_split.name}: {len(self.documents)} of {len(indices)} documents of {dataset_path} have "
            f"{minimum} tokens or more",
        )
        self.loss_mask = open_loss_mask(dataset_path, config)
        self._first_sample = _find_place(config, dataset_path, index_split) << _PLACE_BITS
        if num_samples != 0 and not len(self.documents):
            advice = "give longer documents, or set eval-iters 0 to skip validation and test"
            if num_samples is None:  # of a blend without weights
                advice = "leave it out, or give a weight before each prefix and set eval-iters 0"
            raise UsageError(
                f"{index_split.name} split of {dataset_path}: none of its {len(indices)} documents has "
                f"{minimum} tokens; {advice}"
            )

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # Settings that change the samples; they name the blend's cached index.
        return ["random_seed", "sequence_length", "split", "split_matrix", "sampler"]

    def __len__(self) -> int:
        # One more than requested: Megatron's sampler fails if a resumed run has consumed all samples.
        return len(self.documents) if self.num_samples is None else self.num_samples + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(index), len(self.documents))
        sample = permute(place, len(self.documents), (self.config.random_seed, epoch))
        if self.index_split is not Split.train:
            epoch = 0  # every evaluation sees the same held-out samples
        document = int(self.documents[sample])
        length = int(self.dataset.sequence_lengths[document])
        plan = self.sampler.plan(epoch=epoch, sample=self._first_sample + sample, document_length=length)
        tokens = self._read(self.dataset, document, plan.token_indices)
        check_token_ids(tokens, document, self.dataset_path, self.config.vocab_size)

        loss_mask = np.ones(len(tokens), dtype=np.float32)
        loss_mask[-1] = 0.0
        if self.loss_mask is not None:
            loss_mask[:-1] = self._read(self.loss_mask, document, plan.token_indices)[1:]  # of the labels
        if self.config.mask_segment_starts:
            starts = np.cumsum([size for _, size in plan.segments])[:-1]
            loss_mask[starts - 1] = 0.0
        if self.config.eod_token is not None:
            loss_mask[tokens == self.config.eod_token] = 0.0
        found = {
            "tokens": tokens,
            "labels": np.append(tokens[1:], 0),
            "loss_mask": loss_mask,
            "position_ids": plan.position_ids,
            "sample": np.int64(index),
            "document": np.int64(document),
        }
        if self.config.mark_documents:
            found["document_starts"] = np.eye(1, len(tokens), dtype=np.int64)[0]
        return found

    @staticmethod
    def _read(dataset: IndexedDataset, document: int, token_indices: np.ndarray) -> np.ndarray:
        """Read a document's values at `token_indices`, int64 [n], one read per contiguous run."""
        breaks = np.flatnonzero(np.diff(token_indices) != 1) + 1
        runs = np.split(token_indices, breaks)
        reads = [dataset.get(document, offset=int(run[0]), length=len(run)) for run in runs]
        return np.concatenate(reads).astype(np.int64)


def check_token_ids(tokens: np.ndarray, document: int, prefix: str, vocab_size: int | None) -> None:
    """Raise ValueError if a document has token ids outside the vocabulary."""
    if vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"{prefix}.bin: document {document} contains token ids {tokens.min()} to {tokens.max()}, "
            f"but the vocabulary has {vocab_size}"
        )
