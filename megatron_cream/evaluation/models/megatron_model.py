"""The engine that runs a model with Megatron-Core, with training's layers and positions.

Tensor-parallel and context-parallel ranks call it together, with the same arguments, and get the same results.

Megatron's own StaticInferenceContext keeps the keys and values. All sequences in it have one length, so prompts
of different lengths are aligned at their ends. Each prompt is read alone, without a mask, into a view of the
memory that starts after its padding. Then all sequences generate together, one token at a time: each step reads the
whole memory, with the padding and the room for further tokens masked. So all steps have the same shapes, and on a GPU a
CUDA graph repeats them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_cream.checkpoint.model import Group, Weights, load_model
from megatron_cream.common import devices
from megatron_cream.evaluation.models import generation
from megatron_cream.evaluation.models.cuda_graph import GraphRunner, Runner
from megatron_cream.evaluation.models.sharded_cache import ShardedCache, ShardedText
from megatron_cream.evaluation.models.static_cache import append_at, new_context
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer
from megatron_cream.model.llama import LlamaModel

_NO_LIMIT = 1 << 40  # positions; beyond the trained ones the model runs as in transformers


class MegatronModel:
    """A LanguageModel that runs in Megatron-Core; see language_model.py for the arguments."""

    def __init__(
        self,
        weights: Weights,
        *,
        dtype: torch.dtype,
        prefill_chunk: int,
        tokenizer: ModelTokenizer,
        stop_ids: frozenset[int],
        max_positions: int,
        kv_cache_dtype: str = "auto",
        cuda_graphs: bool = True,
        group: Group | None = None,
    ):
        self._model, self._group = load_model(weights, dtype, group=group), group or Group()
        shape = replace(weights.shape, max_position_embeddings=_NO_LIMIT)
        self._model.rotary = shape.rotary(by_length=True)
        self._device = "cuda" if devices.has_cuda() else "cpu"
        self._chunk, self._stop_ids, self._kv_cache_dtype = prefill_chunk, stop_ids, kv_cache_dtype
        self.tokenizer, self.max_positions = tokenizer, max_positions
        # Several ranks would record collectives: no such graph has been tried.
        can_record = self._device == "cuda" and self._group.size == 1 and not self._model.rotary.depends_on_length
        self._cuda_graphs = cuda_graphs and can_record

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return self._model.named_parameters()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **sampling) -> list[list[int]]:
        agree = _take_from_first_rank if self._group.size > 1 else None
        options = dict(stop_ids=self._stop_ids, agree=agree)
        cache = dict(room=max_new_tokens, kv_cache_dtype=self._kv_cache_dtype)
        if self._group.context == 1:
            run = GraphRunner() if self._cuda_graphs else None
            batch = _RightAlignedBatch(self._model, self._device, self._chunk, run=run, **cache)
            return generation.generate(batch, prompts, max_new_tokens, **options, **sampling)
        answers = []
        for prompt, seed in zip(prompts, sampling["seeds"], strict=True):
            text = ShardedText(self._model, self._device, self._chunk, **cache)
            answers += generation.generate(text, [prompt], max_new_tokens, **options, **sampling | {"seeds": [seed]})
        return answers

    @torch.inference_mode()
    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        tokens = tokens.to(self._device)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        total = inputs.shape[1]
        cache = self._open_cache(len(tokens), total)
        parts = []
        for begin in range(0, total, cache.chunk):
            end = min(begin + cache.chunk, total)
            positions = torch.arange(begin, end, device=self._device).expand(len(tokens), -1)
            # With labels Megatron returns each token's loss, so logits exist for one chunk only.
            losses = cache.read(inputs[:, begin:end], positions, labels=labels[:, begin:end])
            parts.append(-losses[:, max(0, start - 1 - begin) :].float())
        return torch.cat(parts, 1).cpu()

    def _open_cache(self, batch: int, length: int) -> "ShardedCache | _WholeCache":
        if self._group.context == 1:
            return _WholeCache(self._model, self._chunk, batch, length, self._kv_cache_dtype)
        options = dict(batch=batch, length=length, kv_cache_dtype=self._kv_cache_dtype)
        return ShardedCache(self._model, self._device, self._chunk, **options)


class _WholeCache:
    """The keys and values of a batch of texts of one length.

    Texts that are read at once need none, but in FP8 they are rounded all the same.
    """

    def __init__(self, model: LlamaModel, chunk: int, batch: int, length: int, kv_cache_dtype: str):
        self._model, self.chunk = model, chunk
        kept = length > chunk or kv_cache_dtype == "fp8"
        self._context = new_context(model, batch, length, kv_cache_dtype) if kept else None

    def read(self, tokens: Tensor, positions: Tensor, **options) -> Tensor:
        """Return the model's output for the next tokens, [b, s]; `options` are the model's."""
        out = self._model(tokens, positions, None, inference_context=self._context, **options)
        if self._context is not None:
            self._context.sequence_len_offset += tokens.shape[1]
        return out


def _take_from_first_rank(tokens: Tensor) -> Tensor:
    """Return the tokens that the first rank has chosen: a GPU's sums may differ in their last bits."""
    torch.distributed.broadcast(tokens, src=0)
    return tokens


class _RightAlignedBatch:
    """A CachedBatch with padding before the shorter prompts, and positions that start after it.

    Args:
        model: the model.
        device: "cuda" or "cpu".
        chunk: tokens of a prompt that are read at once.
        room: maximum tokens that can be appended.
        kv_cache_dtype: one of KV_CACHE_DTYPES.
        run: runs each step; None just calls it.
    """

    def __init__(
        self,
        model: LlamaModel,
        device: str,
        chunk: int,
        room: int,
        kv_cache_dtype: str = "auto",
        run: Runner | None = None,
    ):
        self._model, self._device, self._chunk, self._room = model, device, chunk, room
        self._kv_cache_dtype, self._run = kv_cache_dtype, run

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        self._context = new_context(self._model, len(prompts), width + self._room, self._kv_cache_dtype)
        logits = [self._read(prompt, i, width - len(prompt)) for i, prompt in enumerate(prompts)]
        self._context.sequence_len_offset = width  # of all steps: they take their place from `_place`
        self._tokens = torch.empty(len(prompts), 1, dtype=torch.int64, device=self._device)
        self._positions = lengths[:, None].to(self._device)
        self._padding = (width - lengths)[:, None].to(self._device)
        self._keys = torch.arange(width + self._room, device=self._device)
        self._place = torch.tensor([width], device=self._device)
        append_at(self._context, self._place)
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens[:, None])
        return self._run(self._append) if self._run else self._append()

    def _append(self) -> Tensor:
        """Append `_tokens`. All that changes between steps is in tensors, and no shape does: see GraphRunner."""
        mask = (self._keys >= self._padding) & (self._keys <= self._place)
        logits = self._forward(self._tokens, self._positions, mask)
        self._place.add_(1)
        self._positions.add_(1)
        return logits

    def _read(self, prompt: Sequence[int], row: int, padding: int) -> Tensor:
        """Read one prompt into `row` of the cache, after `padding`; return its last logits."""
        context = self._context
        whole = context.key_value_memory_dict
        context.key_value_memory_dict = {
            layer: tuple(memory.narrow(0, padding, memory.size(0) - padding).narrow(1, row, 1) for memory in pair)
            for layer, pair in whole.items()
        }
        tokens = torch.tensor([prompt], device=self._device)
        context.sequence_len_offset = 0
        for begin in range(0, len(prompt), self._chunk):
            end = min(begin + self._chunk, len(prompt))
            positions = torch.arange(begin, end, device=self._device)[None]
            logits = self._forward(tokens[:, begin:end], positions, None)
            context.sequence_len_offset = end
        context.key_value_memory_dict = whole
        return logits

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        with InferenceMode.active():  # returns the logits of the last token only
            logits = self._model(tokens, positions, mask, inference_context=self._context, runtime_gather_output=True)
        return logits[:, -1, : self._model.real_vocab_size]
