"""The engine that runs a Hugging Face folder with vLLM.

Tested with vLLM 0.32 on a CPU: greedy answers equal those of transformers (tests/evaluation/test_vllm.py).
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
    """A LanguageModel that runs in vLLM and only generates; see language_model.py for the arguments.

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
        if (longest := max(map(len, prompts)) + max_new_tokens) > self.max_positions:
            raise UsageError(
                f"--engine vllm: {longest} tokens of a prompt and its answer exceed the model's "
                f"max_position_embeddings {self.max_positions}. Shorten the prompts, or leave --engine out."
            )
        settings = [
            self._sampling(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=max_new_tokens,
                stop_token_ids=self._stop_ids,
                detokenize=False,
                logprobs=0,  # log-probabilities of the chosen tokens, which reveal NaN logits
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
        raise UsageError("--engine vllm: cannot measure perplexity. Leave --engine out.")


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
