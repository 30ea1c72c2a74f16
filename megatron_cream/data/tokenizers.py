"""Build Megatron's own tokenizers outside of a training run.

Preprocessing encodes text with the object that the trainer builds from the same two flags,
so the ids are the same.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cream.data.special_tokens import keep_as_text

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer")
"""Types that load a sentencepiece `.model` file; synonyms in Megatron."""

TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")
"""Values of --tokenizer-type that preprocessing accepts."""


_PROBE = "A quick brown fox,\n\n  12345 é Ж 中文 🙂\tx = [1];  end"
"""A text with spaces, line feeds, digits and non-Latin letters, which tokenizers treat differently."""

_PLAIN_CLASS = "PreTrainedTokenizerFast"
"""The class that loads a tokenizer.json as it is."""

_TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")
"""Of the files in a model's folder that a tokenizer may load."""


def check_tokenizer_files(tokenizer_type: str, tokenizer_model: Path) -> None:
    """Check the files of a tokenizer without importing Megatron.

    Raises:
        ValueError: unknown type, or `tokenizer_model` is not the file or folder that the type needs.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(f"{tokenizer_type}: expected one of {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_type in SENTENCEPIECE_TYPES and not tokenizer_model.is_file():
        raise ValueError(f"{tokenizer_model}: no such file; {tokenizer_type} takes a sentencepiece .model file")
    # transformers would look up a name that is not a folder on the network.
    if tokenizer_type == "HuggingFaceTokenizer" and not tokenizer_model.is_dir():
        raise ValueError(f"{tokenizer_model}: no such folder; {tokenizer_type} takes a folder with tokenizer.json")


def load_tokenizer(tokenizer_type: str, tokenizer_model: Path, parse_special: bool = False) -> Any:
    """Load the tokenizer of the trainer's --tokenizer-type and --tokenizer-model.

    With `parse_special`, a Hugging Face tokenizer parses special tokens that a text spells, which otherwise are text.

    Returns Megatron's MegatronTokenizerText: `tokenize(text) -> list[int]`,
    `detokenize(ids)`, `vocab_size`, `eod`, `bos` (None or -1 if there is none).

    Raises:
        ValueError: as `check_tokenizer_files`, or the files are not a tokenizer.
    """
    tokenizer_model = Path(tokenizer_model)
    check_tokenizer_files(tokenizer_type, tokenizer_model)
    # This import takes seconds, which a cached corpus or a wrong flag does not need.
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config import TokenizerConfig

    config = TokenizerConfig(tokenizer_type=tokenizer_type, tokenizer_model=str(tokenizer_model), pad_vocab_size=False)
    try:
        tokenizer = build_tokenizer(config)
        if tokenizer_type == "HuggingFaceTokenizer":
            # Otherwise transformers warns of "indexing errors" at a document longer than the model's window.
            tokenizer._tokenizer.tokenizer.model_max_length = sys.maxsize
        check_megatron_ids(tokenizer)
        if not parse_special:
            keep_as_text(tokenizer)
    except TokenIdMismatch:
        raise
    except Exception as error:  # each library raises its own types
        kind = "sentencepiece model" if tokenizer_type in SENTENCEPIECE_TYPES else "Hugging Face tokenizer folder"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{tokenizer_model}: not a {kind} ({reason})") from error
    return tokenizer


class TokenIdMismatch(ValueError):
    """transformers' token ids differ from those of the tokenizer.json. One line with the folder."""


def check_megatron_ids(tokenizer: Any) -> None:
    """Check Megatron's tokenizer as `check_token_ids` does, if it wraps one of transformers."""
    if getattr(tokenizer, "library", "") == "huggingface":
        check_token_ids(Path(tokenizer.path), tokenizer._tokenizer.tokenizer)  # Megatron's wrapper has no public access


def check_token_ids(folder: Path, tokenizer: Any) -> None:
    """Check that transformers' tokenizer gives the ids of the folder's tokenizer.json, or else of its tokenizer.model.

    transformers rebuilds some tokenizer classes, not always with the same result: 5.3 drops all spaces for a
    byte-level tokenizer whose class is LlamaTokenizerFast, such as DeepSeek-R1-Distill-Llama's; 5.24 splits two spaces
    before a word otherwise than sentencepiece, where LlamaTokenizer has a tokenizer.model alone, such as Vicuna's.

    Raises:
        TokenIdMismatch: ids differ after the first one, which an added leading space may change.
    """
    file = next((file for name in ("tokenizer.json", "tokenizer.model") if (file := folder / name).is_file()), None)
    if file is None:
        return
    expected, decode = _encode_with_file(file)
    actual = _encode_probe(tokenizer)
    if actual[1:] == expected[1:]:
        return
    import transformers

    place = next((i for i, (a, b) in enumerate(zip(actual, expected)) if i and a != b), 1)
    shown = [" ".join(map(str, ids[place : place + 4])) for ids in (actual, expected)]
    if _encode_probe(_load_with_class(folder, _PLAIN_CLASS))[1:] == expected[1:]:
        advice = (
            f'Set "tokenizer_class": "{_PLAIN_CLASS}" in its tokenizer_config.json, or install another transformers'
        )
    else:
        advice = (
            f"It builds a {type(tokenizer).__name__} whatever tokenizer_class says. If the model was trained with it, "
            "save it: transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise TokenIdMismatch(
        f"{folder}: transformers {transformers.__version__} tokenizes text differently from its {file.name}: "
        f"{decode(expected[place : place + 4])!r} becomes {shown[0]}, not {shown[1]}. {advice}"
    )


def _encode_with_file(file: Path) -> tuple[list[int], Callable[[list[int]], str]]:
    """Return the probe's ids by the library that wrote a tokenizer file, and its function from ids to text."""
    if file.name == "tokenizer.model":
        import sentencepiece

        raw = sentencepiece.SentencePieceProcessor(model_file=str(file))
        return raw.encode(_PROBE), raw.decode
    import tokenizers

    raw = tokenizers.Tokenizer.from_file(str(file))
    raw.no_truncation()
    raw.no_padding()
    return raw.encode(_PROBE, add_special_tokens=False).ids, raw.decode


def _encode_probe(tokenizer: Any) -> list[int]:
    return tokenizer(_PROBE, add_special_tokens=False)["input_ids"]


def _load_with_class(folder: Path, name: str) -> Any:
    """Return the tokenizer that transformers would build with another tokenizer_class; the folder stays as it is."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in _TOKENIZER_SUFFIXES:
                shutil.copy(file, copy)
        config = Path(copy) / "tokenizer_config.json"
        found = json.loads(config.read_text()) if config.exists() else {}
        config.write_text(json.dumps(found | {"tokenizer_class": name}))
        return AutoTokenizer.from_pretrained(copy)


def has_eod(tokenizer: Any) -> bool:
    """Return whether a tokenizer of Megatron's has an end-of-document token."""
    return tokenizer.eod is not None and tokenizer.eod >= 0


def tokenizer_id(tokenizer_type: str, tokenizer_model: Path) -> str:
    """Return a tokenizer's type and a digest of its files.

    In a folder, only files that a tokenizer may load are included, not weights.
    """
    path = Path(tokenizer_model)
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _TOKENIZER_SUFFIXES)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:".encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"{tokenizer_type}:{digest.hexdigest()}"


def bos_to_prepend(tokenizer: Any, prepend_bos: bool | None) -> int | None:
    """Return the id to put before each document, or None.

    With `prepend_bos` None, a sentencepiece tokenizer's BOS is used, as Llama was trained; a
    Hugging Face tokenizer's BOS is used if that tokenizer adds it to a text by itself.

    Raises:
        ValueError: `prepend_bos` is True and the tokenizer has no BOS.
    """
    bos = tokenizer.bos
    if bos is None or bos < 0:
        if prepend_bos:
            raise ValueError("the tokenizer has no BOS token to prepend (--no-prepend-bos)")
        return None
    if prepend_bos is None:
        prepend_bos = not _is_hugging_face(tokenizer) or _find_added(tokenizer)[0]
    return bos if prepend_bos else None


def _is_hugging_face(tokenizer: Any) -> bool:
    return getattr(tokenizer, "library", "") == "huggingface"


def _find_added(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether a tokenizer adds BOS and EOD to any text by itself; Megatron's sentencepiece adds none."""
    ids = list(tokenizer.tokenize("a")) if _is_hugging_face(tokenizer) else []
    return ids[:1] == [tokenizer.bos], ids[-1:] == [tokenizer.eod]


class TextEncoder:
    """A function from a text to its ids, without the BOS and EOD that the tokenizer adds to any text by itself.

    Those that the text spells stay, where the tokenizer parses them.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._adds_bos, self._adds_eod = _find_added(tokenizer)

    def __call__(self, text: str) -> list[int]:
        ids = list(self._tokenizer.tokenize(text))
        if self._adds_bos and ids[:1] == [self._tokenizer.bos]:
            ids = ids[1:]
        if self._adds_eod and ids[-1:] == [self._tokenizer.eod]:
            ids = ids[:-1]
        return ids
