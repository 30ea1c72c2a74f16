"""Convert text documents and chats to Megatron's PREFIX.bin and PREFIX.idx.

The files are the same as those of Megatron's own tool, without the suffix that it adds to the
prefix: `preprocess(..., output_prefix)` writes what `--data-path output_prefix` reads. Each
document is one sequence: BOS, the text's tokens, EOD. A chat follows its format, and has a
mask of the assistant's tokens in a second pair of files. The output depends on the inputs and
the tokenizer, not on the number of workers or on how often the run was killed.
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

from megatron_cream.common.console import format_count
from megatron_cream.common.progress_bar import ProgressBar
from megatron_cream.data.documents import check_files, read_batches
from megatron_cream.data.encode import Encoder
from megatron_cream.data.hub import HubDataset
from megatron_cream.data.input_files import LeftOut, Source, disk_size, find_files, identify
from megatron_cream.data.partial import State, check_output, open_partial
from megatron_cream.data.special_tokens import is_kept_as_text
from megatron_cream.data.workers import map_in_order

FORMAT_VERSION = 3
"""Increase it when the same inputs and settings give other bytes: runs do not resume across versions."""


@dataclass
class PreprocessReport:
    """Statistics of the written and the dropped documents."""

    lengths: np.ndarray
    """int32 [documents]: tokens of each document as written, BOS and EOD included."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of documents dropped for it."""

    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> `file` or `file:line` of the first such document, in input order."""

    cuts: dict[str, int] = field(default_factory=dict)
    """What was left out of chats that were written -> number of chats."""

    first_cut: dict[str, str] = field(default_factory=dict)
    """The same -> `file:line` of the first such chat, in input order."""

    left_out: LeftOut = field(default_factory=LeftOut)
    """Files of the input folders that were not read."""

    loss_tokens: int | None = None
    """Number of tokens with loss; only for chats."""

    seconds: float = 0.0
    """Wall-clock time of reading, tokenizing and writing."""

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def documents_of_at_least(self, tokens: int) -> int:
        """Return how many documents have `tokens` tokens or more."""
        return int((self.lengths >= tokens).sum())


def preprocess(
    inputs: Iterable[Path | HubDataset],
    output_prefix: Path,
    tokenizer: Any,
    *,
    json_key: str | None = None,
    glob: str | None = None,
    chat_format: str | None = None,
    chat_template: str | None = None,
    append_eod: bool = True,
    prepend_bos: bool | None = None,
    min_document_tokens: int = 1,
    workers: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    progress: bool = True,
    tokenizer_id: str | None = None,
) -> PreprocessReport:
    """Tokenize `inputs` (see `input_files.find_files`) into OUTPUT_PREFIX.bin and .idx.

    The output files appear only when they are complete.

    Args:
        inputs: files, folders and datasets on the Hub.
        output_prefix: path of the output without its suffix.
        tokenizer: has `tokenize(text) -> list[int]`, `vocab_size`, `eod` and `bos`, as
            `tokenizers.load_tokenizer` returns.
        json_key: key of a record's text, or of a chat's turns; None: `text`, or `chat_records.CHAT_KEYS`.
        glob: pattern of the documents in a folder; None: files with a known suffix.
        chat_format: one of `chat.CHAT_FORMATS`: documents are chats, and OUTPUT_PREFIX_loss_mask
            is written too. The format sets BOS and EOS.
        chat_template: for the format `tokenizer`, see `chat.TemplateChat`.
        append_eod: end each document with the tokenizer's EOD.
        prepend_bos: None follows the tokenizer, see `tokenizers.bos_to_prepend`.
        min_document_tokens: shorter documents are dropped; BOS and EOD do not count.
        workers: processes that tokenize. More than one uses `fork`: call this before the
            process starts threads or uses CUDA.
        overwrite: replace existing output, and an unfinished run with other settings.
        strict: raise at the first document that cannot be read, instead of dropping it.
        progress: show a progress bar.
        tokenizer_id: identifies the tokenizer, see `tokenizers.tokenizer_id`. With it, the next run
            with equal inputs and settings resumes a killed or interrupted one; without it, no
            partial output is kept.

    Raises:
        FileExistsError: there is output and `overwrite` is not set.
        ValueError: wrong inputs, no document left, with `strict` a bad document, or an
            unfinished run with other inputs or settings and `overwrite` not set.
        BlockingIOError: another process is writing this output.
    """
    started = time.perf_counter()
    output_prefix = Path(output_prefix)
    check_output(output_prefix, overwrite)
    left_out = LeftOut()
    files = find_files(inputs, glob, output_prefix, left_out)
    encode = Encoder(
        tokenizer,
        json_key=json_key,
        chat_format=chat_format,
        chat_template=chat_template,
        append_eod=append_eod,
        prepend_bos=prepend_bos,
        min_tokens=min_document_tokens,
        strict=strict,
    )
    check_files(files, encode.keys, encode.chats)
    settings = {
        "version": FORMAT_VERSION,
        "input": _digest(files),
        "tokenizer": tokenizer_id or uuid.uuid4().hex,  # matches no other run
        "json-key": encode.keys,
        "chat-format": chat_format,
        "chat-template": chat_template,
        "append-eod": append_eod,
        "prepend-bos": prepend_bos,
        "min-document-tokens": min_document_tokens,
        "strict": strict,
        # None is as in unfinished runs of versions that always parsed them.
        "parse-special": False if is_kept_as_text(tokenizer) else None,
    }
    keep = tokenizer_id is not None
    with open_partial(output_prefix, settings, encode.dtype, encode.chats, overwrite, keep) as partial:
        state = partial.state
        if not state.complete:
            batches = read_batches(files, encode.keys, encode.chats, state.position)
            with (
                contextlib.closing(map_in_order(encode, batches, workers)) as encoded,
                _show_progress(files, output_prefix, state, progress) as advance,
            ):
                for batch in encoded:
                    partial.append(batch)
                    advance()
        if not state.documents:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in state.dropped.items())
            raise ValueError(f"--input: no document is left to write ({reasons or 'the inputs are empty'})")
        lengths = partial.finish()
    return PreprocessReport(
        lengths=lengths,
        dropped=state.dropped,
        first_dropped=state.first_dropped,
        cuts=state.cuts,
        first_cut=state.first_cut,
        left_out=left_out,
        loss_tokens=state.loss_tokens if encode.chats else None,
        seconds=time.perf_counter() - started,
    )


def _digest(files: list[Source]) -> str:
    """Return a digest of the inputs' paths, sizes and modification times."""
    return hashlib.sha256(repr([identify(file) for file in files]).encode()).hexdigest()


@contextlib.contextmanager
def _show_progress(files: list[Source], prefix: Path, state: State, enabled: bool) -> Iterator[Callable[[], None]]:
    """Show progress on stderr: a bar on a terminal, elsewhere a first and a last line.

    Yields the function to call after each change of `state`.
    """
    total = sum(map(disk_size, files))
    started = time.perf_counter()
    first_byte, first_token = state.position.disk_bytes, state.tokens
    # No refresh thread: worker processes are forked while the bar is shown.
    bar = ProgressBar(total, shown=enabled, refresh=False)
    bar.move("", to=first_byte)

    def speed() -> str:
        seconds = max(time.perf_counter() - started, 1e-9)
        read, tokens = state.position.disk_bytes - first_byte, state.tokens - first_token
        documents = format_count(state.documents, "document")
        return f"{documents}, {read / 1e6 / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s"

    def advance() -> None:
        nonlocal header_printed
        # Print nothing before the first document, which may fail.
        if enabled and not bar.live and state.documents and not header_printed:
            what = format_count(len(files), "file")
            print(f"preprocess: {what}, {total / 1e6:.1f} MB, to {prefix}.bin/.idx", file=sys.stderr)
            header_printed = True
        bar.move(speed(), to=state.position.disk_bytes)

    if enabled and state.documents:
        done = format_count(state.documents, "document")
        print(f"preprocess: resuming after {done} of an unfinished run", file=sys.stderr)
    header_printed = False
    with bar:
        yield advance
    if header_printed:
        print(f"preprocess: {speed()}, {time.perf_counter() - started:.1f} s", file=sys.stderr)
