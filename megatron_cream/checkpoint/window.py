"""Write the window of a Hugging Face folder into all files and keys that readers use.

transformers and lm-evaluation-harness read `max_position_embeddings` unchanged. vLLM takes the smallest of several
keys and SGLang the first of its own list; both multiply it by the factor of a linear scaling. So a folder with linear
scaling gets `max_position_embeddings`, the extended window, and `seq_length`, the window before scaling.
"""

import math
from pathlib import Path
from typing import Any

from megatron_cream.common.files import read_json, write_json

# Keys of config.json that some reader uses as window: vLLM 0.32 (transformers_utils/model_arch_config_convertor.py,
# derive_max_model_len_and_key), SGLang (CONTEXT_LENGTH_KEYS), lm-evaluation-harness (n_positions, n_ctx), transformers
# (the last one, for YaRN).
OTHER_KEYS = (
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
    "original_max_position_embeddings",
)
# Limits in other files of a folder: (file, object in it, key).
_LIMITS = (
    ("generation_config.json", None, "max_length"),  # generate() rejects longer prompts
    ("tokenizer_config.json", None, "model_max_length"),  # truncation=True truncates to it
    ("tokenizer_config.json", None, "max_len"),  # older name of model_max_length
    ("tokenizer.json", "truncation", "max_length"),
)


def build_keys(window: int, scaling: dict[str, Any] | None, before: int | None) -> dict[str, int]:
    """Return the config.json keys from which every reader derives `window`.

    A reader that multiplies by the factor may get up to one factor more, because `seq_length` is rounded up.

    Args:
        window: positions of the model after scaling.
        scaling: `rope_scaling` of the config; None for no scaling.
        before: positions before scaling, if known.
    """
    found = {"max_position_embeddings": window}
    if scaling is not None and scaling["rope_type"] == "linear":
        found["seq_length"] = math.ceil(window / scaling["factor"])
        if before is not None:
            found["original_max_position_embeddings"] = before
    return found


def raise_limits(folder: Path, window: int) -> None:
    """Raise the length limits in generation config and tokenizer files to `window`."""
    for name, inner, key in _LIMITS:
        file = folder / name
        whole = read_json(file, "a JSON object") if file.is_file() else None
        part = whole.get(inner) if inner and isinstance(whole, dict) else whole
        limit = part.get(key) if isinstance(part, dict) else None
        if type(limit) in (int, float) and limit < window:
            part[key] = window
            write_json(file, whole)
