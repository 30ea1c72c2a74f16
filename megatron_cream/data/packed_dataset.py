"""Samples of whole short documents, or chats, for Megatron's dataset builder."""

import numpy as np

from megatron_cream.common.errors import UsageError
from megatron_cream.data.dataset import DocumentDataset, LongDocumentDatasetConfig, check_token_ids, open_loss_mask
from megatron_cream.data.packing import MIN_TOKENS, Packing


class PackedDocumentDataset(DocumentDataset):
    """Samples of `config.sequence_length` tokens, each of whole documents that are no longer than that.

    `__getitem__` returns the items of a `LongDocumentDataset` sample, with `position_ids` from 0 in each document,
    and int64 `document_starts` [n], 1 on the first token of each document. Attention must stay within a document:
    `model.packed_attention.Documents` reads the boundaries. Padding at the end is one more document. `loss_mask` is 0
    on the last token of each document, on padding, and where the data's loss mask or `eod_token` says so.

    Sample i is a pure function of the data, the seed and i, see `Packing`.

    Raises:
        UsageError: samples are requested of a split that has no document short enough.
    """

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config: LongDocumentDatasetConfig):
        begin, end = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
        super().__init__(dataset, dataset_path, range(begin, end), num_samples, index_split, config)
        self._begin = begin
        self.packing = Packing(dataset.sequence_lengths[begin:end], config.sequence_length)
        self._loss_mask = open_loss_mask(dataset_path, config)
        if num_samples != 0 and not self.packing.samples:  # None: of a blend without weights
            raise UsageError(
                f"--short-data-path {dataset_path}: none of its {end - begin} documents has from {MIN_TOKENS} to "
                f"{config.sequence_length} tokens (--seq-length); give longer ones in --data-path"
            )

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # Settings that change the samples; they name the blend's cached index.
        return ["random_seed", "sequence_length", "split", "split_matrix"]

    def __len__(self) -> int:
        return self.packing.samples if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        n = self.config.sequence_length
        names = ("tokens", "labels", "position_ids", "document_starts")
        sample = {name: np.zeros(n, dtype=np.int64) for name in names}
        sample["loss_mask"] = np.zeros(n, dtype=np.float32)
        numbers = [self._begin + i for i in self.packing.sample_documents(int(index), self.config.random_seed)]
        at = 0
        for document in numbers:
            tokens = self.dataset.get(document).astype(np.int64)
            check_token_ids(tokens, document, self.dataset_path, self.config.vocab_size)
            part = slice(at, at + len(tokens))
            sample["tokens"][part] = tokens
            sample["labels"][part] = np.append(tokens[1:], 0)
            sample["position_ids"][part] = np.arange(len(tokens))
            sample["loss_mask"][part] = self._weigh(document, tokens)
            sample["document_starts"][at] = 1
            at += len(tokens)
        if at < n:
            sample["document_starts"][at] = 1
            sample["position_ids"][at:] = np.arange(n - at)
        return sample | {"sample": np.int64(index), "document": np.int64(numbers[0])}

    def _weigh(self, document: int, tokens: np.ndarray) -> np.ndarray:
        """Return the loss mask of a whole document, float32 [its tokens]."""
        mask = np.ones(len(tokens), dtype=np.float32)
        if self._loss_mask is not None:
            mask[:-1] = self._loss_mask.get(document)[1:]  # of the labels
        mask[-1] = 0.0
        if self.config.eod_token is not None:
            mask[tokens == self.config.eod_token] = 0.0
        return mask
