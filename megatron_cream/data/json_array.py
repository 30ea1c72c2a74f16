"""Read a JSON array element by element, from a file that may not fit into memory.

ShareGPT is published in this form: one array of chats, hundreds of megabytes long.
"""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

_CHUNK = 1 << 20
"""Bytes read at a time; more for an element that is larger."""

_LONGEST = 1 << 28
"""Maximum characters of an element; more mean that the file is malformed."""

_SPACE = " \t\n\r"


class DamagedArray(ValueError):
    """A file is not one JSON array. The message is one line without the path."""


def starts_array(stream) -> bool:
    """Return whether a stream with `peek` starts with a JSON array."""
    return stream.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def read_elements(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the JSON text of each element in order, as UTF-8.

    Raises:
        DamagedArray: the stream is not one JSON array in UTF-8. The message is one line with the
            number of the element that cannot be read.
    """
    text = _Text(stream)
    text.skip("[", "it does not start with [")
    count = 0
    while text.peek() != "]":
        if count:
            text.skip(",", f"no comma after element {count}")
        count += 1
        yield text.element(count).encode()
    text.skip("]", "")
    if text.peek():
        raise DamagedArray("not one JSON array: there is text after its end")


class _Text:
    """A window on the decoded stream that grows with the current element."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def _read_more(self) -> bool:
        """Drop consumed text and read the next chunk; return False at the end of the stream."""
        data = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise DamagedArray("not one JSON array: not UTF-8") from None
        self._at = 0
        return bool(data)

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def skip(self, character: str, problem: str) -> None:
        """Consume `character`; raise DamagedArray with `problem` if another one is next."""
        if self.peek() != character:
            raise DamagedArray(f"not one JSON array: {problem}")
        self._at += 1

    def element(self, number: int) -> str:
        """Return the JSON text of the next element, which has this number."""
        self.peek()
        while True:
            try:
                _, end = self._parse(self._text, self._at)
                # A number may continue in the next chunk: 0 may be the start of 0.5.
                complete = self._text[end - 1] in '}]"' or self._text[end : end + 1] in tuple(",]" + _SPACE)
            except RecursionError:
                raise DamagedArray(f"not one JSON array: element {number} is nested too deeply") from None
            except ValueError:
                complete = False
            if complete:
                found, self._at = self._text[self._at : end], end
                return found
            if len(self._text) - self._at > _LONGEST or not self._read_more():
                raise DamagedArray(
                    f"not one JSON array: element {number} is truncated, malformed or longer than 256 MiB"
                )
