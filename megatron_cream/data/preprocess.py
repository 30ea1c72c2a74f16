"""Text documents to Megatron's indexed dataset: PREFIX.bin and PREFIX.idx.

The files are those of Megatron's own tool, less the suffix that it adds to the prefix:
`preprocess(..., output_prefix)` writes what `--data-path output_prefix` reads. Each
document is one sequence: BOS, the text's tokens, EOD. The bytes written depend on the
inputs and the tokenizer, not on the number of workers.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from megatron_cream.data.documents import BadDocument, Batch, find_files, read_batches, read_documents
from megatron_cream.data.tokenizers import bos_to_prepend


@dataclass
class PreprocessReport:
    """What a run wrote and what it left out."""

    lengths: np.ndarray
    """int32 [documents]: tokens of each document as written, BOS and EOD included."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> how many documents were left out for it."""

    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> `file` or `file:line` of the first of them, in input order."""

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
    json_key: str = "text",
    glob: str = "*.txt",
    append_eod: bool = True,
    prepend_bos: bool | None = None,
    min_document_tokens: int = 1,
    workers: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> PreprocessReport:
    """Tokenize `inputs` (see `documents.find_files`) into OUTPUT_PREFIX.bin and .idx.

    Args:
        tokenizer: has `tokenize(text) -> list[int]`, `vocab_size`, `eod` and `bos`, as
            `tokenizers.load_tokenizer` gives.
        json_key: where the text of a JSON line stands.
        glob: which files of a folder are documents.
        prepend_bos: None follows the tokenizer, see `tokenizers.bos_to_prepend`.
        min_document_tokens: shorter documents are dropped; BOS and EOD do not count.
        workers: processes that tokenize. More than one needs `fork`: call it before the
            process starts threads or uses CUDA.
        strict: raise at the first document that cannot be read, instead of counting it.

    The output appears when it is complete, or not at all.

    Raises:
        FileExistsError: output is there and `overwrite` is not set.
        ValueError: wrong inputs, no document left, or with `strict` a bad document.
    """
    # Imported here, as it takes seconds that a wrong flag should not wait for.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    started = time.perf_counter()
    check_output(output_prefix, overwrite)
    files = find_files(inputs, glob)
    encode = _Encoder(
        tokenizer=tokenizer,
        json_key=json_key,
        bos=bos_to_prepend(tokenizer, prepend_bos),
        eod=_eod(tokenizer) if append_eod else None,
        min_tokens=min_document_tokens,
        strict=strict,
        vocab_size=tokenizer.vocab_size,
        dtype=DType.optimal_dtype(tokenizer.vocab_size),
    )
    report = PreprocessReport(lengths=np.zeros(0, dtype=np.int32))
    with _complete_or_absent(Path(output_prefix), overwrite) as (bin_path, idx_path):
        builder = IndexedDatasetBuilder(str(bin_path), dtype=encode.dtype)
        with (
            contextlib.closing(builder.data_file),
            contextlib.closing(_map_in_order(encode, read_batches(files), workers)) as encoded,
            _shown_progress(files, output_prefix, progress) as advance,
        ):
            for batch in encoded:
                for ids in batch.documents:
                    builder.add_document(ids, [len(ids)])
                for reason, where in batch.dropped:
                    report.dropped[reason] = report.dropped.get(reason, 0) + 1
                    report.first_dropped.setdefault(reason, where)
                advance(batch)
        if not builder.sequence_lengths:
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
            raise ValueError(f"no document is left to write ({reasons or 'the inputs are empty'})")
        report.lengths = np.array(builder.sequence_lengths, dtype=np.int32)
        builder.finalize(str(idx_path))
    report.seconds = time.perf_counter() - started
    return report


def output_paths(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx, as Megatron derives them (dots in the prefix stay)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def check_output(prefix: Path, overwrite: bool) -> None:
    """Raise FileExistsError if there is output at `prefix` that may not be replaced."""
    for path in output_paths(prefix):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} already exists")


@dataclass(frozen=True)
class _Encoded:
    """What an encoder made of one batch: token arrays [n], and (reason, place) of the rest."""

    documents: list[np.ndarray]
    dropped: list[tuple[str, str]]
    disk_bytes: int


@dataclass(frozen=True)
class _Encoder:
    """Batch -> _Encoded; what it needs is inherited by the workers, not sent to them."""

    tokenizer: Any
    json_key: str
    bos: int | None
    eod: int | None
    min_tokens: int
    strict: bool
    vocab_size: int
    dtype: type

    def __call__(self, batch: Batch) -> _Encoded:
        documents, dropped = [], []
        for where, text in read_documents(batch, self.json_key):
            if isinstance(text, BadDocument):
                if self.strict:
                    raise BadDocument(f"{where}: {text}")
                dropped.append((str(text), where))
                continue
            ids = self._text_ids(where, text)
            if len(ids) < self.min_tokens:
                dropped.append((f"shorter than {self.min_tokens} tokens", where))
                continue
            start = [] if self.bos is None else [self.bos]
            end = [] if self.eod is None else [self.eod]
            documents.append(np.array([*start, *ids, *end], dtype=self.dtype))
        return _Encoded(documents, dropped, batch.disk_bytes)

    def _text_ids(self, where: str, text: str) -> list[int]:
        try:
            ids = list(self.tokenizer.tokenize(text))
        except Exception as error:
            error.add_note(f"while tokenizing {where}")
            raise
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"{where}: token id {max(ids)}, but the tokenizer's vocab_size is {self.vocab_size}")
        # Hugging Face tokenizers may add their own: there is one BOS and one EOD at most.
        if ids[:1] == [self.tokenizer.bos]:
            ids = ids[1:]
        if ids[-1:] == [self.tokenizer.eod]:
            ids = ids[:-1]
        return ids


def _eod(tokenizer: Any) -> int:
    if tokenizer.eod is None or tokenizer.eod < 0:
        raise ValueError("the tokenizer has no end-of-document token: do not append one (--no-append-eod)")
    return tokenizer.eod


_encode_here: Callable[[Batch], _Encoded]
"""A worker process's encoder, set when it starts."""


def _start_worker(encode: Callable[[Batch], _Encoded]) -> None:
    global _encode_here
    _encode_here = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A parent that was killed closes no queue: its workers would wait for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(batch: Batch) -> _Encoded:
    return _encode_here(batch)


def _map_in_order(encode: Callable[[Batch], _Encoded], batches: Iterable[Batch], workers: int) -> Iterator[_Encoded]:
    """`map(encode, batches)` over processes, in order, a few batches ahead of its reader."""
    if workers == 1:
        yield from map(encode, batches)
        return
    # Read by Hugging Face tokenizers, whose own threads would not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Fork: the tokenizer is shared as it is, whether or not it can be pickled.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (encode,))
    try:
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _complete_or_absent(prefix: Path, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Temporary paths beside the output that take its names when the block ends well."""
    bin_path, idx_path = output_paths(prefix)
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = [path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in (bin_path, idx_path)]
    try:
        yield temporary[0], temporary[1]
        check_output(prefix, overwrite)  # another run may have finished meanwhile
        # At no time is there an .idx that belongs to another .bin.
        idx_path.unlink(missing_ok=True)
        os.replace(temporary[0], bin_path)
        os.replace(temporary[1], idx_path)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _shown_progress(files: list[Path], prefix: Path, enabled: bool) -> Iterator[Callable[[_Encoded], None]]:
    """Show progress on stderr: live on a terminal, elsewhere a line at the start and the end.

    Gives the function to call with each batch that is written.
    """
    total = sum(file.stat().st_size for file in files)
    started = time.perf_counter()
    read = documents = tokens = 0
    # No refresh thread: worker processes are forked while this is shown.
    bar = Progress(
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        disable=not (enabled and sys.stderr.isatty()),
    )
    task = bar.add_task("", total=total, speed="")

    def speed() -> str:
        seconds = max(time.perf_counter() - started, 1e-9)
        return f"{documents:,} documents, {read / 1e6 / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s"

    def advance(batch: _Encoded) -> None:
        nonlocal read, documents, tokens
        read += batch.disk_bytes
        documents += len(batch.documents)
        tokens += sum(map(len, batch.documents))
        bar.update(task, completed=read, speed=speed(), refresh=True)

    if enabled and bar.disable:
        print(f"preprocess: {len(files)} files, {total / 1e6:.1f} MB, to {prefix}.bin/.idx", file=sys.stderr)
    with bar:
        yield advance
    if enabled and bar.disable:
        print(f"preprocess: {speed()}, {time.perf_counter() - started:.1f} s", file=sys.stderr)
