"""Text documents and chats to Megatron's indexed dataset: PREFIX.bin and PREFIX.idx.

The files are those of Megatron's own tool, less the suffix that it adds to the prefix:
`preprocess(..., output_prefix)` writes what `--data-path output_prefix` reads. Each
document is one sequence: BOS, the text's tokens, EOD; a chat as its format has it, with a
mask of the assistant's tokens beside it. The bytes written depend on the inputs and the
tokenizer, not on the number of workers, nor on how often the run was killed.
"""

import contextlib
import hashlib
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.common.progress_bar import ProgressBar
from megatron_cream.data.documents import check_files, find_files, read_batches
from megatron_cream.data.encode import Encoder
from megatron_cream.data.partial import State, check_output, open_partial
from megatron_cream.data.workers import map_in_order

FORMAT_VERSION = 2
"""Raise it when the same inputs and settings would give other bytes: unfinished runs are not mixed."""


@dataclass
class PreprocessReport:
    """What a run wrote and what it left out."""

    lengths: np.ndarray
    """int32 [documents]: tokens of each document as written, BOS and EOD included."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> how many documents were left out for it."""

    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> `file` or `file:line` of the first of them, in input order."""

    loss_tokens: int | None = None
    """Of chats: tokens that the loss counts on."""

    seconds: float = 0.0
    """Wall-clock time of reading, tokenizing and writing."""

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def documents_of_at_least(self, tokens: int) -> int:
        return int((self.lengths >= tokens).sum())


def preprocess(
    inputs: Iterable[Path],
    output_prefix: Path,
    tokenizer: Any,
    *,
    json_key: str | None = None,
    glob: str | None = None,
    chat_format: str | None = None,
    append_eod: bool = True,
    prepend_bos: bool | None = None,
    min_document_tokens: int = 1,
    workers: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    progress: bool = True,
    tokenizer_id: str | None = None,
) -> PreprocessReport:
    """Tokenize `inputs` (see `documents.find_files`) into OUTPUT_PREFIX.bin and .idx.

    The output appears when it is complete, or not at all.

    Args:
        inputs: files and folders.
        output_prefix: path of the output without its suffix.
        tokenizer: has `tokenize(text) -> list[int]`, `vocab_size`, `eod` and `bos`, as
            `tokenizers.load_tokenizer` gives.
        json_key: where the text of a record stands, or the turns of a chat; None: `text`, or
            `chat.CHAT_KEYS`.
        glob: which files of a folder are documents; None: those of a known suffix.
        chat_format: one of `chat.CHAT_FORMATS`: documents are chats, and OUTPUT_PREFIX_loss_mask
            is written too. BOS and EOS are the format's own.
        append_eod: end each document with the tokenizer's EOD.
        prepend_bos: None follows the tokenizer, see `tokenizers.bos_to_prepend`.
        min_document_tokens: shorter documents are dropped; BOS and EOD do not count.
        workers: processes that tokenize. More than one needs `fork`: call it before the
            process starts threads or uses CUDA.
        overwrite: replace an output that is there, and an unfinished run of other settings.
        strict: raise at the first document that cannot be read, instead of counting it.
        progress: show a progress bar.
        tokenizer_id: what tells the tokenizer from others, see `tokenizers.tokenizer_id`. With it,
            the next run of equal inputs and settings resumes one that was killed or interrupted;
            without it, nothing is kept.

    Raises:
        FileExistsError: output is there and `overwrite` is not set.
        ValueError: wrong inputs, no document left, with `strict` a bad document, or an
            unfinished run of other inputs or settings, and `overwrite` is not set.
        BlockingIOError: another process is writing this output.
    """
    started = time.perf_counter()
    output_prefix = Path(output_prefix)
    check_output(output_prefix, overwrite)
    files = find_files(inputs, glob, output_prefix)
    encode = Encoder(
        tokenizer,
        json_key=json_key,
        chat_format=chat_format,
        append_eod=append_eod,
        prepend_bos=prepend_bos,
        min_tokens=min_document_tokens,
        strict=strict,
    )
    check_files(files, encode.keys, encode.chats)
    settings = {
        "version": FORMAT_VERSION,
        "input": _digest(files),
        "tokenizer": tokenizer_id or uuid.uuid4().hex,  # equal to no other
        "json-key": encode.keys,
        "chat-format": chat_format,
        "append-eod": append_eod,
        "prepend-bos": prepend_bos,
        "min-document-tokens": min_document_tokens,
        "strict": strict,
    }
    keep = tokenizer_id is not None
    with open_partial(output_prefix, settings, encode.dtype, encode.chats, overwrite, keep) as partial:
        state = partial.state
        if not state.complete:
            batches = read_batches(files, encode.keys, encode.chats, state.position)
            with (
                contextlib.closing(map_in_order(encode, batches, workers)) as encoded,
                _shown_progress(files, output_prefix, state, progress) as advance,
            ):
                for batch in encoded:
                    partial.append(batch)
                    advance()
        if not state.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in state.dropped.items())
            raise ValueError(f"--input: no document is left to write ({reasons or 'the inputs are empty'})")
        lengths = partial.finish()
    return PreprocessReport(
        lengths=lengths,
        dropped=state.dropped,
        first_dropped=state.first_dropped,
        loss_tokens=state.loss_tokens if encode.chats else None,
        seconds=time.perf_counter() - started,
    )


def _digest(files: list[Path]) -> str:
    """Of the inputs' names, sizes and times of change."""
    listing = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(listing).encode()).hexdigest()


@contextlib.contextmanager
def _shown_progress(files: list[Path], prefix: Path, state: State, enabled: bool) -> Iterator[Callable[[], None]]:
    """Show on stderr how far `state` is: live on a terminal, elsewhere a line at the start and the end.

    Gives the function to call when it has changed.
    """
    total = sum(file.stat().st_size for file in files)
    started = time.perf_counter()
    first_byte, first_token = state.position.disk_bytes, state.tokens
    # No thread refreshes it: worker processes are forked while it is shown.
    bar = ProgressBar(total, shown=enabled, refresh=False)
    bar.move("", to=first_byte)

    def speed() -> str:
        seconds = max(time.perf_counter() - started, 1e-9)
        read, tokens = state.position.disk_bytes - first_byte, state.tokens - first_token
        return f"{state.documents:,} documents, {read / 1e6 / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s"

    def advance() -> None:
        nonlocal said
        # Not of inputs that are refused at their first document.
        if enabled and not bar.live and state.documents and not said:
            print(f"preprocess: {len(files)} files, {total / 1e6:.1f} MB, to {prefix}.bin/.idx", file=sys.stderr)
            said = True
        bar.move(speed(), to=state.position.disk_bytes)

    if enabled and state.documents:
        print(f"preprocess: going on after {state.documents:,} documents of an unfinished run", file=sys.stderr)
    said = False
    with bar:
        yield advance
    if said:
        print(f"preprocess: {speed()}, {time.perf_counter() - started:.1f} s", file=sys.stderr)
