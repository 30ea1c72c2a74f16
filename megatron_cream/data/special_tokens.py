"""Keep special tokens that a user's text spells, such as `<s>` in HTML, from becoming control tokens.

Hugging Face tokenizers parse them by default; sentencepiece does not. A text is encoded with
`split_special_tokens`. In a chat, the special tokens of the template stay control tokens, and those
in a message are text. transformers' own `sanitize_control_tokens` returns no offsets.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from megatron_cream.data.documents import BadDocument

_IN_MESSAGES, _IN_TEMPLATE = 0xF0000, 0x100000
"""First code points of the stand-ins, in Unicode's private planes. A stand-in repeats one character as often as its
special token has characters, so that offsets stay the same."""


def keep_as_text(tokenizer: Any) -> None:
    """Make Megatron's tokenizer encode special tokens in texts as text."""
    if getattr(tokenizer, "library", "") == "huggingface":
        tokenizer._tokenizer.tokenizer.split_special_tokens = True  # Megatron's wrapper has no public access


def is_kept_as_text(tokenizer: Any) -> bool:
    """Return whether `keep_as_text` changed this tokenizer."""
    return getattr(tokenizer, "library", "") == "huggingface" and tokenizer._tokenizer.tokenizer.split_special_tokens


class ChatTokenizer:
    """Encoder of rendered chats that parses special tokens of the template, but not those of the messages.

    Args:
        tokenizer: a fast tokenizer of transformers.
        parse_messages: also parse special tokens of messages.
    """

    def __init__(self, tokenizer: Any, parse_messages: bool = False):
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = {token.content: (id, token) for id, token in sorted(added.items()) if token.special}
        # The longest first, as tokenizers matches them.
        self._special = dict(sorted(special.items(), key=lambda item: -len(item[0])))
        self._numbers = {content: number for number, content in enumerate(self._special)}
        self._pattern = None
        if special and not parse_messages:
            self._pattern = re.compile("|".join(map(re.escape, self._special)))

    def mask(self, chat: Any) -> tuple[Any, bool]:
        """Return the messages with stand-ins for special tokens in all their texts, and whether there are any.

        Args:
            chat: messages, or any other lists, objects and texts that a template reads.

        Raises:
            BadDocument: the messages have special tokens and characters of the stand-ins.
        """
        texts = list(_iterate_texts(chat))
        if self._pattern is None or not any(map(self._pattern.search, texts)):
            return chat, False
        if any(char >= chr(_IN_MESSAGES) for text in texts for char in text):
            raise BadDocument("chat with special tokens and private-use characters")
        return _map_texts(chat, lambda text: self._replace(text, _IN_MESSAGES)), True

    def encode(self, text: str, masked: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return (ids, offsets in `text`) of a chat that was rendered from `mask(messages)`.

        Raises:
            BadDocument: the template cut a stand-in.
        """
        if not masked:
            encoded = self._tokenizer(
                text,
                add_special_tokens=False,
                return_offsets_mapping=True,
                split_special_tokens=False,
                verbose=False,
            )
            return encoded["input_ids"], encoded["offset_mapping"]
        text = self._replace(text, _IN_TEMPLATE)
        for number, content in enumerate(self._special):
            text = text.replace(_stand_in(_IN_MESSAGES, number, content), content)
        if any(chr(_IN_MESSAGES) <= char < chr(_IN_TEMPLATE) for char in text):
            raise BadDocument("chat whose special tokens the chat template cuts")
        tokenizer, ids = self._backend
        encoded = tokenizer.encode(text, add_special_tokens=False)
        return [ids.get(id, id) for id in encoded.ids], encoded.offsets

    def _replace(self, text: str, base: int) -> str:
        """Replace the special tokens of `text` by their stand-ins."""
        return self._pattern.sub(lambda match: _stand_in(base, self._numbers[match[0]], match[0]), text)

    @functools.cached_property
    def _backend(self) -> tuple[Any, dict[int, int]]:
        """A copy of the tokenizer that parses the stand-ins alone, and {id of a stand-in: id of its special token}."""
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        ids = {}
        for number, (content, (id, token)) in enumerate(self._special.items()):
            stand_in = _stand_in(_IN_TEMPLATE, number, content)
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            copy.add_tokens([AddedToken(stand_in, special=False, **flags)])
            ids[copy.token_to_id(stand_in)] = id
        return copy, ids


def _stand_in(base: int, number: int, content: str) -> str:
    return chr(base + number) * len(content)


def _iterate_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _iterate_texts(part)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of lists and objects with each text changed; an object's keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(part, change) for key, part in value.items()}
    return [_map_texts(part, change) for part in value] if isinstance(value, list) else value
