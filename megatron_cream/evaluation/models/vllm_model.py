"""The engine that runs a Hugging Face folder with vLLM.

Tested with vLLM 0.32 on a CPU: greedy answers equal those of transformers (tests/evaluation/test_vllm.py).
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.evaluation.models.generation import NonFiniteLogits
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer


@dataclass(frozen=True)
class VllmSettings:
    """Settings of vLLM's engine, which change its memory and speed.

    max_model_len: maximum tokens of a prompt and its answer; None is the model's max_position_embeddings. vLLM's own
        default multiplies it by the factor of a linear scaling, also where it already includes that factor.
    tensor_parallel_size: GPUs over which the model is split.
    gpu_memory_utilization: share of each GPU's memory for weights, keys and values; None is vLLM's default.
    enforce_eager: run without compilation and CUDA graphs: starts faster, answers more slowly.
    max_num_seqs: maximum prompts at once; None is vLLM's default.
    kv_cache_dtype: dtype of keys and values; auto is the model's, or what its folder was calibrated for.
    """

    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    max_num_seqs: int | None = None
    kv_cache_dtype: str = "auto"

    def engine_arguments(self, max_positions: int, prefill_chunk: int | None) -> dict[str, Any]:
        """Return the arguments of vllm.LLM.

        Args:
            max_positions: the model's max_position_embeddings; 2**40 if its configuration names none.
            prefill_chunk: maximum tokens per step; longer prompts are read in chunks. None is vLLM's default.
        """
        length = self.max_model_len or (max_positions if max_positions < 1 << 40 else None)
        given = {
            "max_model_len": length,
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": self.enforce_eager,
            "max_num_seqs": min(filter(None, (self.max_num_seqs, prefill_chunk)), default=None),  # vLLM requires it
            "max_num_batched_tokens": prefill_chunk,
            "enable_chunked_prefill": True,
            "kv_cache_dtype": None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype,
        }
        return {name: value for name, value in given.items() if value is not None}


class VllmModel:
    """A LanguageModel that runs in vLLM and only generates; see language_model.py for the arguments.

    Raises:
        UsageError: vLLM is not installed, or does not start with these settings.
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
        settings: VllmSettings,
    ):
        vllm = import_vllm()
        self._sampling = vllm.SamplingParams
        self._stop_ids = sorted(stop_ids)
        self.tokenizer, self.max_positions = tokenizer, max_positions
        with prepare_start():
            self._engine = vllm.LLM(
                model=str(folder),
                dtype=str(dtype).removeprefix("torch."),
                skip_tokenizer_init=True,  # prompts and answers are ids
                **settings.engine_arguments(max_positions, prefill_chunk),
            )
        self._max_model_len = self._engine.llm_engine.model_config.max_model_len

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return ()  # the weights are in vLLM's own processes

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> list[list[int]]:
        # The last token of an answer has no position.
        if (longest := max(map(len, prompts)) + max_new_tokens - 1) > self._max_model_len:
            raise too_long(longest, self._max_model_len)
        settings = [
            self._sampling(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=min(max_new_tokens, self._max_model_len - len(prompt)),
                stop_token_ids=self._stop_ids,
                detokenize=False,
                logprobs=0,  # log-probabilities of the chosen tokens, which reveal NaN logits
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self._engine.generate(requests, settings, use_tqdm=False)
        if not all(map(_has_finite_log_probs, answers)):
            raise NonFiniteLogits
        ids = [list(answer.outputs[0].token_ids) for answer in answers]
        return [answer[:-1] if answer and answer[-1] in self._stop_ids else answer for answer in ids]

    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        raise UsageError("--engine vllm: cannot measure perplexity. Leave --engine out.")


def is_finite(engine: Any, prompt: Sequence[int]) -> bool:
    """Return whether the first answer of a vllm.LLM has a finite log-probability."""
    settings = import_vllm().SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, detokenize=False)
    return all(
        map(_has_finite_log_probs, engine.generate([{"prompt_token_ids": list(prompt)}], settings, use_tqdm=False))
    )


def _has_finite_log_probs(answer: Any) -> bool:
    return math.isfinite(answer.outputs[0].cumulative_logprob or 0.0)


def too_long(tokens: int, most: int) -> UsageError:
    """Return the error for a prompt and its answer that vLLM would reject."""
    return UsageError(
        f"--engine vllm: {tokens} tokens of a prompt and its answer are more than the {most} positions that vLLM has "
        "for them (max_position_embeddings or --max-model-len). Shorten the prompts, or leave --engine out."
    )


@contextlib.contextmanager
def prepare_start() -> Iterator[None]:
    """Let vLLM start in the block with the length that it is given; turn its errors into a UsageError."""
    # The length was checked against the model's window, which vLLM may take for shorter. An answer's last token has no
    # position, and may be one beyond.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, OSError) as error:  # a ValidationError is a ValueError
        raise UsageError(
            f"--engine vllm: vLLM does not start: {one_line(error)}. Its lines above say why. If memory is short, try "
            "a smaller --max-model-len, a larger --gpu-memory-utilization or --tensor-parallel-size"
        ) from error


def import_vllm():
    """Import and return the module vllm.

    Raises:
        UsageError: vLLM is not installed.
    """
    try:
        import vllm
    except ImportError as error:
        raise UsageError(
            "--engine vllm: vLLM is not installed here. Run `pip install vllm`, or leave --engine out."
        ) from error
    return vllm
