"""The elements of a JSON array, one at a time, from a file that need not fit into memory.

ShareGPT is given out in this form: one array of chats, hundreds of megabytes long.
"""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

_CHUNK = 1 << 20
"""Bytes read at a time, and at least as many as an element that is not yet whole."""

_LONGEST = 1 << 28
"""Characters of an element: where more do not make one, the file is malformed."""

_SPACE = " \t\n\r"


class DamagedArray(ValueError):
    """What is read is not one JSON array. The message is one line, without the path."""


def starts_array(stream) -> bool:
    """Whether a stream that can be peeked at holds a JSON array."""
    return stream.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def read_elements(stream: BinaryIO) -> Iterator[bytes]:
    """The JSON text of each element, in order.

    Raises:
        DamagedArray: what is read is not one JSON array in UTF-8. One line, with the number of
            the element that could not be read.
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
    """A window on the decoded stream that grows where an element needs it."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def _more(self) -> bool:
        data = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise DamagedArray("not one JSON array: not UTF-8") from None
        self._at = 0
        return bool(data)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, character: str, otherwise: str) -> None:
        if self.peek() != character:
            raise DamagedArray(f"not one JSON array: {otherwise}")
        self._at += 1

    def element(self, number: int) -> str:
        self.peek()
        while True:
            try:
                _, end = self._parse(self._text, self._at)
                # A number may go on in the next chunk: 0 is one, and so is 0.5.
                whole = self._text[end - 1] in '}]"' or self._text[end : end + 1] in tuple(",]" + _SPACE)
            except RecursionError:
                raise DamagedArray(f"not one JSON array: element {number} is nested too deeply") from None
            except ValueError:
                whole = False
            if whole:
                found, self._at = self._text[self._at : end], end
                return found
            if len(self._text) - self._at > _LONGEST or not self._more():
                raise DamagedArray(f"not one JSON array: element {number} is cut, malformed or longer than 256 MiB")
