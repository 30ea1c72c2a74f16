"""A Hugging Face folder, run by vLLM where that is installed.

Run with vLLM 0.32 on a CPU: greedy answers are transformers' (tests/evaluation/test_vllm.py).
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.models.generation import NonFiniteLogits
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer


class VllmModel:
    """A LanguageModel for generation; see language_model.py for the arguments.

    Raises:
        UsageError: vLLM is not installed.
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
    ):
        vllm = import_vllm()
        self._sampling = vllm.SamplingParams
        self._stop_ids = sorted(stop_ids)
        self.tokenizer, self.max_positions = tokenizer, max_positions
        self._engine = vllm.LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            skip_tokenizer_init=True,  # prompts and answers are ids
            enable_chunked_prefill=True,
            max_num_batched_tokens=prefill_chunk,
        )

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return ()  # they lie in vLLM's own processes

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> list[list[int]]:
        if (longest := max(map(len, prompts)) + max_new_tokens) > self.max_positions:
            raise UsageError(
                f"--engine vllm: {longest} tokens, of a prompt and its answer, are beyond the model's "
                f"max_position_embeddings {self.max_positions}; shorten the prompts, or leave --engine out"
            )
        settings = [
            self._sampling(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=max_new_tokens,
                stop_token_ids=self._stop_ids,
                detokenize=False,
                logprobs=0,  # of the chosen tokens, by which NaN logits show
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self._engine.generate(requests, settings, use_tqdm=False)
        for answer in answers:
            if not math.isfinite(answer.outputs[0].cumulative_logprob or 0.0):
                raise NonFiniteLogits
        ids = [list(answer.outputs[0].token_ids) for answer in answers]
        return [answer[:-1] if answer and answer[-1] in self._stop_ids else answer for answer in ids]

    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        raise UsageError("--engine vllm: generates only; leave it out for perplexity")


def import_vllm():
    """The module vllm.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import vllm
    except ImportError as error:
        raise UsageError(
            "--engine vllm: vLLM is not installed here: pip install vllm, or leave --engine out"
        ) from error
    return vllm
