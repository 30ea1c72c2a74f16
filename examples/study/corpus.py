"""Training data of the study: real text, and documents that state and repeat key-value pairs.

The text is the Python sources of the installed torch: long documents that every machine running
this has. A statement is a key followed by its value, two symbols that occur in no text. A document
of D pairs is text with statements of these pairs at random places, so that every key except a
pair's first occurrence predicts its value.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_cream.data.embedded import source_files, split_files, train_tokenizer
from megatron_cream.data.indexed import paths, write_index

SYMBOLS = 256
"""Number of keys, and of values."""

VOCABULARY = 2048 + 2 * SYMBOLS
PAIRS = (2, 4, 8, 16, 32, 128)
"""Numbers of distinct pairs in a document; each number has its own file of documents."""

GAPS = (6, 32)
"""Mean tokens from one statement to the next; each document draws its own log-uniformly from this range."""

_TOKENIZER_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Corpus:
    """Paths and symbols of a prepared corpus."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    @property
    def valid(self) -> Path:
        return self.folder / "valid"

    def pairs(self, count: int) -> Path:
        return self.folder / f"pairs_{count}"

    def held_out(self) -> np.ndarray:
        """Return the concatenated held-out documents, uint16 [n]."""
        return np.fromfile(paths(self.valid)[0], np.uint16)

    def symbols(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of the keys and of the values."""
        words = sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer))
        ids = [np.array([words.piece_to_id(name) for name in names]) for names in _symbol_names()]
        return ids[0], ids[1]


def prepare(folder: Path, *, length: int, documents: int, source: Path | None = None) -> Corpus:
    """Return the corpus in `folder`; make it first if it is incomplete.

    Args:
        length: tokens of a document with pairs.
        documents: number of documents for each entry of PAIRS.
        source: folder of Python files; None is the installed torch.
    """
    corpus, complete = Corpus(folder), folder / "corpus.json"
    if complete.is_file():
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    source = source or Path(find_spec("torch").origin).parent
    files = source_files(source)
    train, valid = ([file.read_text("utf-8", errors="ignore") for file in part] for part in split_files(source, files))
    corpus.tokenizer.write_bytes(
        train_tokenizer(_some(train), VOCABULARY, [n for names in _symbol_names() for n in names])
    )
    words = sentencepiece.SentencePieceProcessor(model_file=str(corpus.tokenizer))
    numbers = {}
    for prefix, texts in ((corpus.text, train), (corpus.valid, valid)):
        encoded = words.encode(texts, add_bos=True, add_eos=True, num_threads=-1)
        numbers[prefix.name] = _write(prefix, [np.array(ids, np.uint16) for ids in encoded])
    stream, symbols = np.fromfile(paths(corpus.text)[0], np.uint16), corpus.symbols()
    for count in PAIRS:
        rng = np.random.default_rng(count)
        some = (pair_document(rng, stream, symbols, length, count) for _ in range(documents))
        numbers[corpus.pairs(count).name] = _write(corpus.pairs(count), list(some))
    # Written last, because its presence marks the corpus as complete.
    complete.write_text(json.dumps({"source": source.name, "files": len(files), "tokens": numbers}, indent=1) + "\n")
    return corpus


def pair_document(
    rng: np.random.Generator, stream: np.ndarray, symbols: tuple[np.ndarray, np.ndarray], length: int, count: int
) -> np.ndarray:
    """Return text from `stream`, uint16 [length], with statements of `count` pairs at random places."""
    start = rng.integers(len(stream) - length)
    document = stream[start : start + length].copy()
    keys, values = (rng.choice(ids, count, replace=False) for ids in symbols)
    gap = np.exp(rng.uniform(*np.log(GAPS)))
    places = 2 * rng.choice(length // 2, round(length / gap), replace=False)
    stated = rng.integers(count, size=len(places))
    document[places], document[places + 1] = keys[stated], values[stated]
    return document


def _symbol_names() -> tuple[list[str], list[str]]:
    return [f"<k{i}>" for i in range(SYMBOLS)], [f"<v{i}>" for i in range(SYMBOLS)]


def _some(texts: Sequence[str]) -> list[str]:
    """Return every n-th text, enough characters in all to train a tokenizer on."""
    share = max(1, sum(map(len, texts)) // _TOKENIZER_CHARACTERS)
    return list(texts[::share])


def _write(prefix: Path, documents: list[np.ndarray]) -> int:
    bin_path, idx_path = paths(prefix)
    with bin_path.open("wb") as file:
        for document in documents:
            document.tofile(file)
    lengths = np.array([len(document) for document in documents], np.int32)
    write_index(idx_path, lengths, np.uint16)
    return int(lengths.sum())
