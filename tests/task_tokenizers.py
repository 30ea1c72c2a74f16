"""Real tokenizers, trained in seconds, for the tests of the evaluation tasks."""

import sysconfig
from functools import cache
from pathlib import Path

import sentencepiece
from tokenizers import ByteLevelBPETokenizer

from megatron_cream.data.embedded import source_files, train_tokenizer

NAMES = ("sentencepiece", "byte-level")


class SentencePiece:
    def __init__(self, texts: list[str]):
        self._model = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(texts, 1000))

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class ByteLevel:
    """A fast tokenizer of Hugging Face, like GPT-2's; encoding adds a space before the first word."""

    def __init__(self, texts: list[str]):
        self._model = ByteLevelBPETokenizer(add_prefix_space=True)
        self._model.train_from_iterator(texts, vocab_size=2000, show_progress=False)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


@cache
def tokenizer(name: str) -> SentencePiece | ByteLevel:
    files = source_files(Path(sysconfig.get_path("stdlib")))[:40]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return {"sentencepiece": SentencePiece, "byte-level": ByteLevel}[name](texts)
