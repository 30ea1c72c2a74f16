"""Sliding-window perplexity of long documents, in which each token is scored exactly once.

A window of the context length slides over a document, and each token is scored in the first window that
reaches it: the first window scores all its tokens but the first, every later window its last `stride`
tokens. What others do instead is in `conventions`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_cream.common.errors import UsageError
from megatron_cream.data.documents import (
    BadDocument,
    check_files,
    extract_text,
    read_batches,
    read_documents,
)
from megatron_cream.data.input_files import find_files
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer
from megatron_cream.evaluation.tasks.sources import check_distinct_names


@dataclass(frozen=True)
class Document:
    """A tokenized text.

    name: its file, and its line or record in that file.
    tokens: token ids with the tokenizer's BOS, cut to the longest length.
    """

    name: str
    text: str
    tokens: list[int]


def iterate_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first, end) of each window over `length` tokens.

    tokens[first:end] are scored given tokens[begin:]. Each of the tokens 1 .. length - 1 is scored once, with a
    context of at least window - stride + 1 tokens (or all tokens before it) and at most `window`.

    Args:
        length: tokens of the document.
        window: maximum context of a token, in tokens.
        stride: tokens by which the window moves, 1 to window.
    """
    first, begin = 1, 0
    while first < length:
        end = min(begin + window + 1, length)
        yield begin, first, end
        first, begin = end, begin + stride


def read_texts(inputs: Sequence[Path], json_key: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the documents in files, read as in preprocessing.

    Args:
        inputs: JSON lines, text or Parquet files, or folders of them.
        json_key: key of a record's text.

    Raises:
        UsageError: a file is missing, or a document cannot be read.
    """
    try:
        files = find_files(inputs)
        check_files(files, (json_key,), chats=False)
        check_distinct_names("--dataset", files, lambda file: str(file.resolve() if isinstance(file, Path) else file))
        for batch in read_batches(files, (json_key,)):
            for name, text in read_documents(batch, partial(extract_text, key=json_key)):
                if isinstance(text, BadDocument):
                    raise UsageError(f"--dataset {name}: {text}")
                yield name, text
    except (ValueError, OSError) as error:
        raise UsageError(f"--dataset {error}") from error


def select_long_documents(
    tokenizer: ModelTokenizer, texts: Iterator[tuple[str, str]], *, minimum: int, longest: int, most: int
) -> list[Document]:
    """Return the first `most` documents of `minimum` tokens or more, cut to `longest`.

    Raises:
        UsageError: no document is long enough.
    """
    found, seen, best = [], 0, 0
    for name, text in texts:
        if len(found) == most:
            break
        seen += 1
        tokens = tokenizer.encode_prompt(text)
        best = max(best, len(tokens))
        if len(tokens) >= minimum:
            found.append(Document(name, text, tokens[:longest]))
    if not found:
        raise UsageError(
            f"--min-tokens {minimum}: none of the {seen} documents of --dataset has that many tokens; the longest has "
            f"{best}"
        )
    return found
