"""Recall by the depth of what is to be recalled, of a model in a Hugging Face folder."""

from pathlib import Path

import numpy as np
import torch

PAIRS = 16
"""Stated in a context, once each; one of them is asked for."""

OPENING = 8
"""Tokens of text that a context begins with: a model's first few serve its attention as a place to rest."""


def recall_by_depth(
    model,
    haystack: np.ndarray,
    symbols: tuple[np.ndarray, np.ndarray],
    length: int,
    depths: list[float],
    samples: int,
    seed: int = 0,
    batch_tokens: int = 1 << 17,
) -> dict[float, float]:
    """Share of contexts after which the likeliest token is the value of the key that the context ends with.

    A context is `length` tokens of held-out text with PAIRS statements in it, one of them `depth` of the
    way from start (after OPENING tokens) to end, and that one's key at the end. Chance is 1 / PAIRS for a model that
    picks any value of the context.

    Args:
        model: of transformers, on its device.
        haystack: token ids [n], text without symbols.
        symbols: token ids of the keys, and of the values.
        samples: contexts of each depth; the same for every model.

    Returns: depth -> share, in 0 to 1.
    """
    result, rows = {}, max(1, batch_tokens // length)
    for depth in depths:
        rng = np.random.default_rng((seed, length, round(1000 * depth)))
        made = [context(rng, haystack, symbols, length, depth) for _ in range(samples)]
        found = 0
        for start in range(0, samples, rows):
            tokens, answers = zip(*made[start : start + rows])
            likeliest = _likeliest(model, np.stack(tokens))
            found += int((likeliest == np.array(answers)).sum())
        result[depth] = found / samples
    return result


def context(
    rng: np.random.Generator, haystack: np.ndarray, symbols: tuple[np.ndarray, np.ndarray], length: int, depth: float
) -> tuple[np.ndarray, int]:
    """(token ids int64 [length], the answer)."""
    start = rng.integers(len(haystack) - length)
    tokens = haystack[start : start + length].astype(np.int64)
    keys, values = (rng.choice(ids, PAIRS, replace=False) for ids in symbols)
    slots = (length - OPENING) // 2 - 1  # the key that is asked for stands behind them
    gold = round(depth * (slots - 1))
    others = rng.choice(slots - 1, PAIRS - 1, replace=False)
    others += others >= gold
    places = OPENING + 2 * np.append(gold, others)
    tokens[places], tokens[places + 1] = keys, values
    tokens[-1] = keys[0]
    return tokens, int(values[0])


@torch.inference_mode()
def _likeliest(model, tokens: np.ndarray) -> np.ndarray:
    batch = torch.from_numpy(tokens).to(model.device)
    return model(batch, logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1).cpu().numpy()


def load(folder: Path):
    """The model on the GPU in bf16, or on the CPU in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation="sdpa"
    )
    return model.to("cuda" if cuda else "cpu").eval()
