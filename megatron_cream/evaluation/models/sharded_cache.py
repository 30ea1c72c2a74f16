"""Keys and values of one long text, split over context-parallel ranks.

All ranks read the same tokens. Of each chunk one rank keeps the keys and values, in turn, and so for each generated
token. Linear layers are computed on every rank; memory and attention are divided.
"""

from collections.abc import Sequence

import torch
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_cream.evaluation.models.static_cache import new_context
from megatron_cream.model.key_shards import KeyShard
from megatron_cream.model.llama import LlamaModel

_CHUNKS_PER_RANK = 4
"""Chunks of a text that each rank keeps at least: the last one may be short."""


class ShardedCache:
    """The keys and values of a batch of texts of one length.

    Args:
        model: the model, on the ranks of a context-parallel group.
        device: "cuda" or "cpu".
        chunk: most tokens that are read at once.
        batch: number of texts.
        length: tokens of each text.
        room: further tokens that may follow, one at a time.
        kv_cache_dtype: one of KV_CACHE_DTYPES.
    """

    def __init__(
        self,
        model: LlamaModel,
        device: str,
        chunk: int,
        *,
        batch: int,
        length: int,
        room: int = 0,
        kv_cache_dtype: str = "auto",
    ):
        group = model.pg_collection.cp
        self.chunk = min(chunk, -(-length // (_CHUNKS_PER_RANK * group.size())))
        chunks = -(-length // self.chunk)
        kept = -(-chunks // group.size()) * self.chunk + -(-room // group.size())
        # Megatron also writes the keys that another rank keeps, behind its own, where the next ones replace them.
        self._context = new_context(model, batch, kept + self.chunk, kv_cache_dtype)
        self._model, self._device, self._turn = model, device, 0
        self._shard = KeyShard(group)
        for layer in model.decoder.layers:
            layer.self_attention.core_attention.key_shard = self._shard

    def read(self, tokens: Tensor, positions: Tensor, **options) -> Tensor:
        """Return the model's output for the next tokens, [b, s]; `options` are the model's."""
        self._shard.owns_last = self._turn % self._shard.group.size() == self._shard.group.rank()
        out = self._model(tokens, positions, None, inference_context=self._context, **options)
        self._context.sequence_len_offset += tokens.shape[1] if self._shard.owns_last else 0
        self._turn += 1
        return out


class ShardedText:
    """A CachedBatch of one prompt, whose keys and values are split over context-parallel ranks.

    Args:
        model: the model.
        device: "cuda" or "cpu".
        chunk: most tokens that are read at once.
        room: maximum tokens that can be appended.
        kv_cache_dtype: one of KV_CACHE_DTYPES.
    """

    def __init__(self, model: LlamaModel, device: str, chunk: int, room: int, kv_cache_dtype: str = "auto"):
        self._model, self._device, self._chunk, self._room = model, device, chunk, room
        self._kv_cache_dtype = kv_cache_dtype

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        (prompt,) = prompts
        options = dict(batch=1, length=len(prompt), room=self._room, kv_cache_dtype=self._kv_cache_dtype)
        self._cache, self._read = ShardedCache(self._model, self._device, self._chunk, **options), 0
        for begin in range(0, len(prompt), self._cache.chunk):
            logits = self.step(torch.tensor(prompt[begin : begin + self._cache.chunk], device=self._device))
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(self._read, self._read + len(tokens), device=self._device)
        self._read += len(tokens)
        with InferenceMode.active():  # returns the logits of the last token only
            logits = self._cache.read(tokens[None], positions[None], runtime_gather_output=True)
        return logits[:, -1, : self._model.real_vocab_size]
