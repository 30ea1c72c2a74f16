"""Megatron's own tokenizers, built outside of a training run.

There is no tokenizer of ours: text is encoded by the object that the trainer builds from
the same two flags, so the ids agree by construction.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer")
"""Synonyms for Megatron: a sentencepiece `.model` file."""

TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")
"""Values of --tokenizer-type that text is preprocessed with."""


_PROBE = "A quick brown fox,\n\n  12345 é Ж 中文 🙂\tx = [1];  end"
"""Spaces, line feeds, digits, letters beyond Latin: what tokenizers treat each in its own way."""


def check_tokenizer_files(tokenizer_type: str, tokenizer_model: Path) -> None:
    """Cheap checks of what a tokenizer is loaded from, without importing Megatron.

    Raises:
        ValueError: unknown type, or `tokenizer_model` is not what the type loads.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(f"{tokenizer_type}: expected one of {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_type in SENTENCEPIECE_TYPES and not tokenizer_model.is_file():
        raise ValueError(f"{tokenizer_model}: no such file; {tokenizer_type} takes a sentencepiece .model file")
    # A name that is no folder would send transformers to the network.
    if tokenizer_type == "HuggingFaceTokenizer" and not tokenizer_model.is_dir():
        raise ValueError(f"{tokenizer_model}: no such folder; {tokenizer_type} takes a folder with tokenizer.json")


def load_tokenizer(tokenizer_type: str, tokenizer_model: Path) -> Any:
    """The tokenizer of the trainer's --tokenizer-type and --tokenizer-model.

    Returns Megatron's MegatronTokenizerText: `tokenize(text) -> list[int]`,
    `detokenize(ids)`, `vocab_size`, `eod`, `bos` (None or -1 where there is none).

    Raises:
        ValueError: as `check_tokenizer_files`, or the files hold no tokenizer.
    """
    tokenizer_model = Path(tokenizer_model)
    check_tokenizer_files(tokenizer_type, tokenizer_model)
    # Imported here, as it takes seconds: a cached corpus or a wrong flag should not wait.
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config import TokenizerConfig

    config = TokenizerConfig(tokenizer_type=tokenizer_type, tokenizer_model=str(tokenizer_model), pad_vocab_size=False)
    try:
        tokenizer = build_tokenizer(config)
        if tokenizer_type == "HuggingFaceTokenizer":
            # transformers warns of "indexing errors" at a document longer than the model's window.
            tokenizer._tokenizer.tokenizer.model_max_length = sys.maxsize
        check_megatron_ids(tokenizer, tokenizer_model)
    except OtherIds:
        raise
    except Exception as error:  # each library raises its own kinds
        kind = "sentencepiece model" if tokenizer_type in SENTENCEPIECE_TYPES else "Hugging Face tokenizer folder"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{tokenizer_model}: not a {kind} ({reason})") from error
    return tokenizer


class OtherIds(ValueError):
    """transformers gives other ids than the tokenizer.json that it was made from. One line, with the folder."""


def check_megatron_ids(tokenizer: Any, folder: str | Path) -> None:
    """As `check_same_ids`, of Megatron's tokenizer; nothing where it is not of transformers."""
    if getattr(tokenizer, "library", "") == "huggingface":
        check_same_ids(Path(folder), tokenizer._tokenizer.tokenizer)  # Megatron's wrapper does not show it


def check_same_ids(folder: Path, tokenizer: Any) -> None:
    """Compare transformers' tokenizer with the folder's tokenizer.json on a text.

    transformers builds some classes of tokenizers anew, and not always alike: 5.3 drops all spaces with a byte-level
    tokenizer whose class is LlamaTokenizerFast, such as DeepSeek-R1-Distill-Llama's.

    Raises:
        OtherIds: their ids differ beyond the first, which a space put before the text may change.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    import tokenizers
    import transformers

    raw = tokenizers.Tokenizer.from_file(str(file))
    raw.no_truncation()
    raw.no_padding()
    theirs, own = tokenizer(_PROBE, add_special_tokens=False)["input_ids"], raw.encode(_PROBE, add_special_tokens=False)
    if theirs[1:] == own.ids[1:]:
        return
    place = next((i for i, (a, b) in enumerate(zip(theirs, own.ids)) if i and a != b), 1)
    shown = [" ".join(map(str, ids[place : place + 4])) for ids in (theirs, own.ids)]
    raise OtherIds(
        f"{folder}: transformers {transformers.__version__} does not read text as its tokenizer.json does: "
        f"{_PROBE[:13]!r} becomes {tokenizer.decode(theirs)[:13]!r}, and ids from place {place} on are {shown[0]}, "
        f'not {shown[1]}. Set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json, or install '
        "another transformers"
    )


def has_eod(tokenizer: Any) -> bool:
    """Whether a tokenizer of Megatron's has an end-of-document token."""
    return tokenizer.eod is not None and tokenizer.eod >= 0


def tokenizer_id(tokenizer_type: str, tokenizer_model: Path) -> str:
    """The type, and a digest of the files that it is loaded from: other ids, another digest.

    Of a folder, weights and other data are left out.
    """
    path = Path(tokenizer_model)
    wanted = (".json", ".jinja", ".model", ".txt", ".py")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in wanted)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:".encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"{tokenizer_type}:{digest.hexdigest()}"


def bos_to_prepend(tokenizer: Any, prepend_bos: bool | None) -> int | None:
    """The id that starts each document, or None.

    `prepend_bos` None follows the model family: a sentencepiece tokenizer that has a BOS
    starts documents with it, as Llama was trained; a Hugging Face tokenizer is asked
    whether it adds one itself.

    Raises:
        ValueError: `prepend_bos` is True and the tokenizer has no BOS.
    """
    bos = tokenizer.bos
    if bos is None or bos < 0:
        if prepend_bos:
            raise ValueError("the tokenizer has no BOS token to prepend (--no-prepend-bos)")
        return None
    if prepend_bos is None:
        prepend_bos = getattr(tokenizer, "library", "") != "huggingface" or tokenizer.tokenize("a")[:1] == [bos]
    return bos if prepend_bos else None


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone: a Hugging Face tokenizer may add a BOS and an EOD of its own."""
    ids = list(tokenizer.tokenize(text))
    if ids[:1] == [tokenizer.bos]:
        ids = ids[1:]
    if ids[-1:] == [tokenizer.eod]:
        ids = ids[:-1]
    return ids
