"""The tokenizer a model is evaluated with: of a Hugging Face folder, a sentencepiece `.model`, or a training run."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.data.time_limit import TemplateTimeout, limit_rendering_time
from megatron_cream.data.tokenizers import TokenIdMismatch, bos_to_prepend, check_token_ids, has_eod, text_ids

_HF_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
_SENTENCEPIECE = "tokenizer.model"


class ModelTokenizer(ABC):
    """Text to ids and back, without special tokens unless it is said.

    Attributes:
        bos: what the tokenizer itself puts before a text, or None.
        stop_ids: tokens that end an answer.
    """

    bos: int | None
    stop_ids: frozenset[int]

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        """For each token of `encode(text)` the characters (start, end) that it stands for.

        Raises:
            UsageError: the tokenizer does not tell.
        """
        raise UsageError(
            "--key-token-model: needs a tokenizer.json of both models, which tells where in a text a token lies"
        )

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a chat in which a user has said `text` and the model is to answer.

        Raises:
            UsageError: there is no chat template.
        """
        raise UsageError("--chat: the model's tokenizer has no chat template")

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text as the model is to read it: the tokenizer's BOS first, where it has one."""
        return [*([] if self.bos is None else [self.bos]), *self.encode(text)]


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in (*_HF_FILES, _SENTENCEPIECE))


def open_tokenizer(path: Path, *, flag: str) -> ModelTokenizer:
    """Open the tokenizer of a Hugging Face folder, or a sentencepiece `.model` file.

    Args:
        path: of the folder or file.
        flag: what the user gave `path` with, for messages.

    Raises:
        UsageError: it is neither, or cannot be read.
    """
    if path.is_dir() and any((path / name).is_file() for name in _HF_FILES):
        kind = _HfTokenizer
    elif path.is_dir() and (path / _SENTENCEPIECE).is_file():  # alone: transformers would have to guess
        kind, path = _SentencePieceTokenizer, path / _SENTENCEPIECE
    elif path.is_file() and path.suffix == ".model":
        kind = _SentencePieceTokenizer
    else:
        raise UsageError(
            f"{flag} {path}: no tokenizer there; --tokenizer takes a Hugging Face folder with one, or a "
            "sentencepiece .model file"
        )
    try:
        return kind(path)
    except TokenIdMismatch as error:
        raise UsageError(f"{flag} {error}") from error
    except Exception as error:  # each library raises its own kinds
        raise UsageError(
            f"{flag} {path}: the tokenizer cannot be loaded: {one_line(error, 200) or type(error).__name__}"
        ) from error


class _HfTokenizer(ModelTokenizer):
    def __init__(self, folder: Path):
        # Set before the library is loaded: a pool of threads forked later would hang.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # that a text is longer than the tokenizer's model_max_length
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        check_token_ids(folder, self._tokenizer)
        bos = self._tokenizer.bos_token_id
        self.bos = bos if bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos] else None
        eos = self._tokenizer.eos_token_id
        self.stop_ids = frozenset([] if eos is None else [eos])

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        if not self._tokenizer.is_fast:
            return super().token_spans(text)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [tuple(span) for span in encoded["offset_mapping"]]

    def encode_chat(self, text: str) -> list[int]:
        if not self._tokenizer.chat_template:
            return super().encode_chat(text)
        turns = [{"role": "user", "content": text}]
        try:
            with limit_rendering_time():
                return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except TemplateTimeout as error:
            raise UsageError(f"--chat: the model's chat template {error}") from None
        except Exception as error:  # jinja's, or what the template itself raises
            raise UsageError(f"--chat: the model's chat template cannot be used: {one_line(error)}") from error


class _SentencePieceTokenizer(ModelTokenizer):
    def __init__(self, file: Path):
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(file))
        # As Llama is trained: sentencepiece has a BOS and leaves it to its user to put it.
        self.bos = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.stop_ids = frozenset([self._model.eos_id()] if self._model.eos_id() >= 0 else [])

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        size = self._model.get_piece_size()
        return self._model.decode([i for i in ids if i < size])  # ids beyond pad the model's vocabulary


class TrainingTokenizer(ModelTokenizer):
    """Megatron's tokenizer of a run, with the BOS that the preprocessing puts before a document."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.bos = bos_to_prepend(tokenizer, None)
        self.stop_ids = frozenset([tokenizer.eod] if has_eod(tokenizer) else [])

    def encode(self, text: str) -> list[int]:
        return text_ids(self._tokenizer, text)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.detokenize(ids)
