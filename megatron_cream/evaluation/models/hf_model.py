"""The engine that runs a Hugging Face folder with transformers."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError, is_out_of_memory, one_line
from megatron_cream.evaluation.models import generation
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer

_ROWS = 1024  # rows of logits that are converted to float32 at a time


class HfModel:
    """A LanguageModel that runs in transformers; see language_model.py for the arguments.

    Raises:
        UsageError: the weights cannot be read, or some are missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        prefill_chunk: int,
        tokenizer: ModelTokenizer,
        stop_ids: frozenset[int],
        max_positions: int,
        kv_cache_dtype: str = "auto",
    ):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # missing weights are reported below
        device = "cuda" if devices.has_cuda() else "cpu"
        check_cache_dtype(folder, kv_cache_dtype)
        with _report_load_errors(folder):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, trust_remote_code=False
            )
        # transformers initializes such weights with random numbers.
        wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if wrong:
            raise UsageError(f"--model {folder}: weight {wrong[0]} is missing or has another shape")
        self._model = model.to(device).eval()
        self._chunk, self._stop_ids, self._kv_cache_dtype = prefill_chunk, stop_ids, kv_cache_dtype
        self.tokenizer, self.max_positions = tokenizer, max_positions

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return self._model.named_parameters()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **sampling) -> list[list[int]]:
        _forget_longest_text(self._model)
        cache = _new_cache(self._model.config, max(map(len, prompts)) + max_new_tokens, self._kv_cache_dtype)
        batch = _LeftPaddedBatch(self._model, self._chunk, cache)
        return generation.generate(batch, prompts, max_new_tokens, stop_ids=self._stop_ids, **sampling)

    @torch.inference_mode()
    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        _forget_longest_text(self._model)
        tokens = tokens.to(self._model.device)
        inputs = tokens[:, :-1]  # the prediction after the last token is not scored
        total = inputs.shape[1]
        cached = total > self._chunk or self._kv_cache_dtype == "fp8"
        cache = _new_cache(self._model.config, total, self._kv_cache_dtype) if cached else None
        parts = []
        for begin in range(0, total, self._chunk):
            end = min(begin + self._chunk, total)
            scored = max(begin, start - 1)  # the first input of this chunk whose prediction is scored
            positions = torch.arange(begin, end, device=tokens.device).expand(len(tokens), -1)
            logits = self._model(
                inputs[:, begin:end],
                attention_mask=torch.ones(len(tokens), end, dtype=torch.long, device=tokens.device),
                position_ids=positions,
                use_cache=cache is not None,
                logits_to_keep=max(1, end - scored),
                **{_cache_argument(self._model): cache},
            ).logits
            if scored < end:
                parts.append(_pick_log_probs(logits, tokens[:, scored + 1 : end + 1]))
        return torch.cat(parts, 1).cpu()


def check_cache_dtype(folder: Path, kv_cache_dtype: str) -> None:
    """Raise UsageError if the folder's model cannot keep its keys and values in this dtype; reads no weights."""
    if kv_cache_dtype == "fp8":
        from transformers import AutoConfig

        with _report_load_errors(folder):
            _new_cache(AutoConfig.from_pretrained(folder, trust_remote_code=False), 0, kv_cache_dtype)


@contextlib.contextmanager
def _report_load_errors(folder: Path) -> Iterator[None]:
    """Turn errors of transformers in the block into UsageError, except for too little memory."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # for example a damaged file, or an architecture that is unknown or has no sdpa
        if is_out_of_memory(error):
            raise
        raise UsageError(f"--model {folder}: transformers cannot load it: {one_line(error)}") from error


def _pick_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log-probabilities [b, n] of labels [b, n] from logits [b, n, vocabulary]."""
    parts = []
    for begin in range(0, labels.shape[1], _ROWS):
        rows = logits[:, begin : begin + _ROWS].float()
        chosen = rows.gather(-1, labels[:, begin : begin + _ROWS, None]).squeeze(-1)
        parts.append(chosen - rows.logsumexp(-1))
    return torch.cat(parts, 1)


def _cache_argument(model) -> str:
    """Return the name of the cache among the model's arguments; newer releases of transformers rename it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _forget_longest_text(model: torch.nn.Module) -> None:
    """Give `dynamic` its first frequencies: transformers keeps those of the longest text beyond the window."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and hasattr(module, "max_seq_len_cached"):
            module.register_buffer("inv_freq", module.original_inv_freq.to(model.device), persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len


def _new_cache(config, length: int, kv_cache_dtype: str):
    """Make a cache of transformers for texts of at most `length` tokens."""
    if kv_cache_dtype == "fp8":
        from megatron_cream.evaluation.models.hf_fp8_cache import new_fp8_cache

        return new_fp8_cache(config, length)
    from transformers import DynamicCache

    return DynamicCache(config=config)


class _LeftPaddedBatch:
    """A CachedBatch with masked padding before the shorter prompts, and positions that start after it."""

    def __init__(self, model, chunk: int, cache):
        self._model, self._chunk = model, chunk
        self._cache, self._cache_argument = cache, _cache_argument(model)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, prompts))
        device = self._model.device
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        self._mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._lengths = self._mask.sum(-1)
        for begin in range(0, width, self._chunk):
            end = min(begin + self._chunk, width)
            logits = self._forward(tokens[:, begin:end], positions[:, begin:end], self._mask[:, :end])
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        positions, self._lengths = self._lengths, self._lengths + 1
        return self._forward(tokens[:, None], positions[:, None], self._mask)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        result = self._model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._cache},
        )
        return result.logits[:, -1]
