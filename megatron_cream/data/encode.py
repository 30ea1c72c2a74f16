"""Encode batches of raw documents as token ids, in a worker process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from megatron_cream.common.errors import one_line
from megatron_cream.data.chat import Llama2Chat, TemplateChat
from megatron_cream.data.chat_records import CHAT_KEYS, Chat, extract_chat
from megatron_cream.data.documents import BadDocument, Batch, Position, extract_text, read_documents
from megatron_cream.data.indexed import token_type
from megatron_cream.data.tokenizers import TextEncoder, bos_to_prepend, has_eod


@dataclass(frozen=True)
class Encoded:
    """The encoded documents of one batch."""

    end: Position
    """Where the next batch begins."""

    documents: list[np.ndarray] = field(default_factory=list)
    """Token ids [n] of each document."""

    masks: list[np.ndarray] = field(default_factory=list)
    """For chats, uint8 [n] for each document: 1 for the assistant's tokens."""

    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(reason, place) of each dropped document."""

    cuts: list[tuple[str, str]] = field(default_factory=list)
    """(what was left out, place) of each chat in `documents` that was not used in full."""


class Encoder:
    """A function from Batch to Encoded.

    Workers inherit it by fork, as tokenizers may not be picklable.

    Args:
        json_key: key of a record's text or turns; None: `text`, or CHAT_KEYS.
        chat_format: one of CHAT_FORMATS if documents are chats; it sets BOS and EOS itself.
        chat_template: see `chat.TemplateChat`.
        append_eod, prepend_bos: for text, see `tokenizers.bos_to_prepend`.
        min_tokens: shorter documents are dropped; a text's BOS and EOD do not count.
        strict: raise at the first document that cannot be read.

    Raises:
        ValueError: the tokenizer lacks a token or a template that the settings need.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        json_key: str | None,
        chat_format: str | None,
        chat_template: str | None = None,
        append_eod: bool,
        prepend_bos: bool | None,
        min_tokens: int,
        strict: bool,
    ):
        self.chats = chat_format is not None
        self.keys = (json_key,) if json_key else CHAT_KEYS if self.chats else ("text",)
        self.dtype = token_type(tokenizer.vocab_size)
        self._vocab_size = tokenizer.vocab_size
        self._min_tokens, self._strict = min_tokens, strict
        self._extract: Callable[[dict], Any]
        if self.chats:
            plain = chat_format == "llama2"
            self._extract = partial(extract_chat, keys=self.keys, plain=plain)
            self._encode_chat = Llama2Chat(tokenizer) if plain else TemplateChat(tokenizer, chat_template)
        else:
            self._extract = partial(extract_text, key=self.keys[0])
            bos = bos_to_prepend(tokenizer, prepend_bos)
            self._start = [] if bos is None else [bos]
            self._end = [_eod(tokenizer)] if append_eod else []
            self._encode_text = TextEncoder(tokenizer)

    def __call__(self, batch: Batch) -> Encoded:
        encoded = Encoded(batch.end)
        for where, document in read_documents(batch, self._extract):
            try:
                if isinstance(document, BadDocument):
                    raise document
                self._add(encoded, where, document)
            except BadDocument as error:
                detail = f" ({error.detail})" if error.detail else ""
                if self._strict and not isinstance(error, _TooShort):
                    raise BadDocument(f"{where}: {error}{detail}") from None
                encoded.dropped.append((str(error), f"{where}{detail}"))
        return encoded

    def _add(self, encoded: Encoded, where: str, document: Any) -> None:
        try:
            ids, mask = self._encode(document)
        except BadDocument:
            raise
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}") from error
        except Exception as error:
            error.add_note(f"while tokenizing {where}")
            raise
        if len(ids) < self._min_tokens:
            raise _TooShort(f"shorter than {self._min_tokens} tokens")
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise ValueError(f"{where}: token id {max(ids)}, but the tokenizer's vocab_size is {self._vocab_size}")
        if mask is not None:
            encoded.masks.append(mask)
        else:
            ids = [*self._start, *ids, *self._end]
        encoded.documents.append(np.array(ids, dtype=self.dtype))
        if isinstance(document, Chat):
            unread = self._encode_chat.unread_fields(document.messages, document.tools)
            encoded.cuts.extend((cut, where) for cut in (*document.cuts, *unread))

    def _encode(self, document: Any) -> tuple[list[int], np.ndarray | None]:
        if isinstance(document, Chat):
            return self._encode_chat(document.messages, document.tools, document.without_loss)
        ids = self._encode_text(document)
        # A text that was rendered from a chat, and is parsed, may spell the BOS and EOD that `_add` puts around it.
        if self._start and ids[:1] == self._start:
            ids = ids[1:]
        if self._end and ids[-1:] == self._end:
            ids = ids[:-1]
        return ids, None


class _TooShort(BadDocument):
    pass


def _eod(tokenizer: Any) -> int:
    if not has_eod(tokenizer):
        raise ValueError("the tokenizer has no end-of-document token: do not append one (--no-append-eod)")
    return tokenizer.eod
