"""The tokenizers of evaluation: from a Hugging Face folder, a sentencepiece `.model` file or a training run."""

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.data.special_tokens import ChatTokenizer, keep_as_text
from megatron_cream.data.time_limit import TemplateTimeout, limit_rendering_time
from megatron_cream.data.tokenizers import TextEncoder, TokenIdMismatch, bos_to_prepend, check_token_ids, has_eod

_HF_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
_SENTENCEPIECE = "tokenizer.model"
_FINGERPRINT_TEXT = (
    "The special magic number of Lisbon is 4096731. Extending a window from 8,192 to 65,536 tokens:\n\n"
    "    def extend(window: int, factor: float = 8.0) -> int:  # naïve\n\treturn round(window * factor)\n"
    "Zürich, Łódź, Αθήνα, Москва, 東京, Καλημέρα κόσμε; 'quoted', \"doubly\", e-mail@example.org, 3.14e-10"
)


class ModelTokenizer(ABC):
    """Converts text to token ids and back, without special tokens unless a method says otherwise.

    A special token that a text spells is text.

    Attributes:
        bos: id that the tokenizer puts before a text, or None.
        stop_ids: token ids that end an answer.
    """

    bos: int | None
    stop_ids: frozenset[int]

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        """Return the character span (start, end) of each token of `encode(text)`.

        Raises:
            UsageError: the tokenizer does not know the spans.
        """
        raise UsageError("--key-token-model: needs a tokenizer.json of both models, to find tokens in the text")

    def encode_chat(self, text: str) -> list[int]:
        """Return the ids of a chat in which the user says `text` and the model answers next.

        Raises:
            UsageError: there is no chat template.
        """
        raise UsageError("--chat: the model's tokenizer has no chat template")

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of `text`, after the tokenizer's BOS if it has one."""
        return [*([] if self.bos is None else [self.bos]), *self.encode(text)]

    def fingerprint(self) -> str:
        """Hash the ids of a fixed text: tokenizers that read it alike have the same value."""
        ids = [self.bos, *self.encode(_FINGERPRINT_TEXT)]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def has_tokenizer(folder: Path) -> bool:
    """Return whether a Hugging Face folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in (*_HF_FILES, _SENTENCEPIECE))


def open_tokenizer(path: Path, *, flag: str) -> ModelTokenizer:
    """Open the tokenizer of a Hugging Face folder, or a sentencepiece `.model` file.

    Args:
        path: the folder or file.
        flag: flag of `path`, for messages.

    Raises:
        UsageError: `path` is neither, or cannot be read.
    """
    if path.is_dir() and any((path / name).is_file() for name in _HF_FILES):
        kind = _HfTokenizer
    elif (
        path.is_dir() and (path / _SENTENCEPIECE).is_file()
    ):  # without Hugging Face files transformers would have to guess
        kind, path = _SentencePieceTokenizer, path / _SENTENCEPIECE
    elif path.is_file() and path.suffix == ".model":
        kind = _SentencePieceTokenizer
    else:
        raise UsageError(
            f"{flag} {path}: no tokenizer there. --tokenizer takes a Hugging Face folder with one, or a "
            "sentencepiece .model file."
        )
    try:
        return kind(path)
    except TokenIdMismatch as error:
        raise UsageError(f"{flag} {error}") from error
    except Exception as error:  # each library raises its own types
        raise UsageError(
            f"{flag} {path}: the tokenizer cannot be loaded: {one_line(error, 200) or type(error).__name__}"
        ) from error


class _HfTokenizer(ModelTokenizer):
    def __init__(self, folder: Path):
        # Must be set before the library is loaded: a fork after its thread pool starts would hang.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # no warnings about texts longer than model_max_length
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        check_token_ids(folder, self._tokenizer)
        bos = self._tokenizer.bos_token_id
        self.bos = bos if bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos] else None
        eos = self._tokenizer.eos_token_id
        self.stop_ids = frozenset([] if eos is None else [eos])

    @functools.cached_property
    def _chat_tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        if not self._tokenizer.is_fast:
            return super().token_spans(text)
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
        )
        return [tuple(span) for span in encoded["offset_mapping"]]

    def encode_chat(self, text: str) -> list[int]:
        if not self._tokenizer.chat_template:
            return super().encode_chat(text)
        turns = [{"role": "user", "content": text}]
        try:
            turns, masked = self._chat_tokenizer.mask(turns) if self._tokenizer.is_fast else (turns, False)
            with limit_rendering_time():
                rendered = self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_dict=False, tokenize=not masked
                )
            return self._chat_tokenizer.encode(rendered, masked)[0] if masked else rendered
        except TemplateTimeout as error:
            raise UsageError(f"--chat: the model's chat template {error}") from None
        except Exception as error:  # jinja's exceptions, or those of the template itself
            raise UsageError(f"--chat: the model's chat template cannot be used: {one_line(error)}") from error


class _SentencePieceTokenizer(ModelTokenizer):
    def __init__(self, file: Path):
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(file))
        # Llama is trained with a BOS, which sentencepiece does not add itself.
        self.bos = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.stop_ids = frozenset([self._model.eos_id()] if self._model.eos_id() >= 0 else [])

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        size = self._model.get_piece_size()
        return self._model.decode([i for i in ids if i < size])  # larger ids only pad the model's vocabulary


class TrainingTokenizer(ModelTokenizer):
    """Megatron's tokenizer of a training run, with the BOS that preprocessing puts before a document."""

    def __init__(self, tokenizer: Any):
        keep_as_text(tokenizer)
        self._tokenizer, self._encode_text = tokenizer, TextEncoder(tokenizer)
        self.bos = bos_to_prepend(tokenizer, None)
        self.stop_ids = frozenset([tokenizer.eod] if has_eod(tokenizer) else [])

    def encode(self, text: str) -> list[int]:
        return self._encode_text(text)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.detokenize(ids)
