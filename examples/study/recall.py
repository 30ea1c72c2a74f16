"""Recall of a model in a Hugging Face folder, by the depth of the pair that it must recall."""

from pathlib import Path

import numpy as np
import torch

PAIRS = 16
"""Pairs in a context, each stated once; the context asks for one of them."""

OPENING = 8
"""Tokens of plain text at the start of a context, because models use the first few as attention sinks."""


def recall_by_depth(
    model,
    haystack: np.ndarray,
    symbols: tuple[np.ndarray, np.ndarray],
    length: int,
    depths: list[float],
    samples: int,
    seed: int = 0,
    batch_tokens: int = 1 << 17,
) -> dict[float, tuple[float, float]]:
    """Return the share of contexts for which the model recalls the value, and the value's mean loss, for each depth.

    A context is `length` tokens of held-out text that states PAIRS pairs. One of them stands at `depth` (0: start,
    after OPENING tokens; 1: end), and the context ends with the key of that one. The value is recalled if it is the
    likeliest next token. A model that picks any value of the context scores 1 / PAIRS.

    Args:
        model: a transformers model, on its device.
        haystack: token ids [n], text without symbols.
        symbols: token ids of the keys, and of the values.
        samples: contexts for each depth; the same for every model.

    Returns: depth -> share, 0 to 1, and loss, in nats.
    """
    result, rows = {}, max(1, batch_tokens // length)
    for depth in depths:
        rng = np.random.default_rng((seed, length, round(1000 * depth)))
        made = [context(rng, haystack, symbols, length, depth) for _ in range(samples)]
        found, losses = 0, 0.0
        for start in range(0, samples, rows):
            tokens, answers = zip(*made[start : start + rows])
            log_likelihoods = _log_likelihoods(model, np.stack(tokens))
            values = torch.tensor(answers)
            found += int((log_likelihoods.argmax(-1) == values).sum())
            losses -= float(log_likelihoods.gather(1, values[:, None]).sum())
        result[depth] = found / samples, losses / samples
    return result


def context(
    rng: np.random.Generator, haystack: np.ndarray, symbols: tuple[np.ndarray, np.ndarray], length: int, depth: float
) -> tuple[np.ndarray, int]:
    """Return the token ids of one context, int64 [length], and the token id of its answer."""
    start = rng.integers(len(haystack) - length)
    tokens = haystack[start : start + length].astype(np.int64)
    keys, values = (rng.choice(ids, PAIRS, replace=False) for ids in symbols)
    slots = (length - OPENING) // 2 - 1  # the final key comes after the slots
    gold = round(depth * (slots - 1))
    others = rng.choice(slots - 1, PAIRS - 1, replace=False)
    others += others >= gold
    places = OPENING + 2 * np.append(gold, others)
    tokens[places], tokens[places + 1] = keys, values
    tokens[-1] = keys[0]
    return tokens, int(values[0])


@torch.inference_mode()
def _log_likelihoods(model, tokens: np.ndarray) -> torch.Tensor:
    """Return the log likelihoods of the token after each context, float32 [contexts, vocabulary]."""
    batch = torch.from_numpy(tokens).to(model.device)
    return model(batch, logits_to_keep=1, use_cache=False).logits[:, -1].float().log_softmax(-1).cpu()


def load(folder: Path):
    """Load the model: on the GPU in bf16, or on the CPU in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation="sdpa"
    )
    return model.to("cuda" if cuda else "cpu").eval()
