"""The engine that runs a Megatron checkpoint with Megatron-Core on one rank, with training's layers and positions.

Megatron's own StaticInferenceContext keeps the keys and values. All sequences in it have one length, so prompts
of different lengths are aligned at their ends. Each prompt is read alone, without a mask, into a view of the
memory that starts after its padding. Then all sequences generate together, one token at a time, with the padding
masked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.checkpoint.model import load_model
from megatron_cream.common import devices
from megatron_cream.evaluation.models import generation
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer
from megatron_cream.model.llama import LlamaModel

_NO_LIMIT = 1 << 40  # positions; beyond the trained ones the model runs as in transformers


class MegatronModel:
    """A LanguageModel that runs in Megatron-Core; see language_model.py for the arguments."""

    def __init__(
        self,
        checkpoint: MegatronCheckpoint,
        *,
        dtype: torch.dtype,
        prefill_chunk: int,
        tokenizer: ModelTokenizer,
        stop_ids: frozenset[int],
        max_positions: int,
    ):
        self._model = load_model(checkpoint, dtype)
        shape = replace(checkpoint.shape, max_position_embeddings=_NO_LIMIT)
        self._model.rotary = shape.rotary(by_length=True)
        self._device = "cuda" if devices.has_cuda() else "cpu"
        self._chunk, self._stop_ids = prefill_chunk, stop_ids
        self.tokenizer, self.max_positions = tokenizer, max_positions

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return self._model.named_parameters()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **sampling) -> list[list[int]]:
        batch = _RightAlignedBatch(self._model, self._device, self._chunk, room=max_new_tokens)
        return generation.generate(batch, prompts, max_new_tokens, stop_ids=self._stop_ids, **sampling)

    @torch.inference_mode()
    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        tokens = tokens.to(self._device)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        total = inputs.shape[1]
        context = _new_context(self._model, len(tokens), total) if total > self._chunk else None
        parts = []
        for begin in range(0, total, self._chunk):
            end = min(begin + self._chunk, total)
            positions = torch.arange(begin, end, device=self._device).expand(len(tokens), -1)
            # With labels Megatron returns each token's loss, so logits exist for one chunk only.
            losses = self._model(
                inputs[:, begin:end], positions, None, labels=labels[:, begin:end], inference_context=context
            )
            if context is not None:
                context.sequence_len_offset = end
            parts.append(-losses[:, max(0, start - 1 - begin) :].float())
        return torch.cat(parts, 1).cpu()


def _new_context(model: LlamaModel, batch: int, length: int) -> StaticInferenceContext:
    """Allocate zeros for the keys and values of `length` tokens of each sample.

    Uninitialized memory would not do: a masked value is multiplied by 0, and 0 times NaN is NaN.
    """
    config = model.config
    context = StaticInferenceContext(batch, length)
    size = (length, batch, config.num_query_groups, config.kv_channels)
    for layer in model.decoder.layers:
        weight = layer.self_attention.linear_qkv.weight
        context.key_value_memory_dict[layer.layer_number] = tuple(
            torch.zeros(size, dtype=weight.dtype, device=weight.device) for _ in range(2)
        )
    return context


class _RightAlignedBatch:
    """A CachedBatch with padding before the shorter prompts, and positions that start after it.

    Args:
        model: the model.
        device: "cuda" or "cpu".
        chunk: tokens of a prompt that are read at once.
        room: maximum tokens that can be appended.
    """

    def __init__(self, model: LlamaModel, device: str, chunk: int, room: int):
        self._model, self._device, self._chunk, self._room = model, device, chunk, room

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        self._context = _new_context(self._model, len(prompts), width + self._room)
        logits = [self._read(prompt, i, width - len(prompt)) for i, prompt in enumerate(prompts)]
        self._context.sequence_len_offset = width
        # bool [b, keys], False on padding; None if there is no padding.
        keys = torch.arange(width + self._room) >= width - lengths[:, None]
        self._mask = None if bool(keys.all()) else keys.to(self._device)
        self._positions = lengths[:, None].to(self._device)
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        end = self._context.sequence_len_offset + 1
        mask = None if self._mask is None else self._mask[:, :end]
        logits = self._forward(tokens[:, None], self._positions, mask)
        self._context.sequence_len_offset = end
        self._positions = self._positions + 1
        return logits

    def _read(self, prompt: Sequence[int], row: int, padding: int) -> Tensor:
        """Read one prompt into `row` of the cache, after `padding`; return its last logits."""
        context = self._context
        whole = context.key_value_memory_dict
        context.key_value_memory_dict = {
            layer: tuple(memory[padding:, row : row + 1] for memory in pair) for layer, pair in whole.items()
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
        return logits[:, -1]
