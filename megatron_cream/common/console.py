"""Where a run's words go: all to the terminal, or Megatron's to a file and ours to the terminal; progress bars."""

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from megatron_cream.common import entry
from megatron_cream.common.errors import UsageError, reason


@contextlib.contextmanager
def divert(mode: str, folder: str | None) -> Iterator[TextIO]:
    """Yield the stream a person reads.

    Args:
        mode: `full`: nothing is diverted; `progress`: this process's standard output,
            that of libraries written in C++ among it, goes to `folder`/megatron.log,
            and only what is printed to the yielded stream reaches the terminal.
        folder: made if missing; without one, `progress` drops the rest.
    """
    entry.ignore_lost_output()
    if mode == "full":
        yield sys.stdout
        return
    path = Path(os.devnull) if folder is None else Path(folder) / "megatron.log"
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise UsageError(f"--save {folder}: {reason(error)}") from error
    sys.stdout.flush()
    terminal_fd, stdout = os.dup(1), sys.stdout
    with _lossy(path, "a") as log, _lossy(terminal_fd, "w") as terminal:
        os.dup2(log.fileno(), 1)
        sys.stdout = log
        try:
            with _logging_to(logging.StreamHandler(log), _to_terminal()):
                yield terminal
        finally:
            sys.stdout = stdout
            os.dup2(terminal_fd, 1)


class _Lossy(io.FileIO):
    """A full disk, or a reader that left, costs a log's lines, not the run."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _lossy(file: str | Path | int, mode: str) -> TextIO:
    raw = io.BufferedWriter(_Lossy(file, mode))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


@contextlib.contextmanager
def captured(words: TextIO) -> Iterator[None]:
    """What Python code prints and logs goes to `words`."""
    with contextlib.redirect_stdout(words), _logging_to(logging.StreamHandler(words)):
        yield


@contextlib.contextmanager
def _logging_to(*handlers: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    before, root.handlers = root.handlers, list(handlers)
    try:
        yield
    finally:
        root.handlers = before


def _to_terminal() -> logging.Handler:
    """Warnings; from Megatron, which gives that level to every change of its state, errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda r: r.levelno >= logging.ERROR or not r.name.startswith("megatron."))
    return handler


class TransferBar:
    """A progress bar over bytes, with GB/s, and one line at the end that stays.

    Use as a context manager; call it with each number of bytes, from any thread.

    Args:
        verb: what is done, "imported"; None shows nothing.
    """

    def __init__(self, verb: str | None):
        self._verb, self._moved, self._lock = verb, 0, threading.Lock()
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        terminal = Console(stderr=True)
        hidden = verb is None or not terminal.is_terminal
        self._bar = Progress(*columns, console=terminal, transient=True, disable=hidden)
        self._task = self._bar.add_task("", total=None)

    def expect(self, nbytes: int) -> None:
        """How much there will be in all."""
        self._bar.update(self._task, total=nbytes)

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._moved += nbytes
        self._bar.update(self._task, advance=nbytes)

    def __enter__(self) -> "TransferBar":
        self._started = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, error, *_) -> None:
        self._bar.stop()
        if self._verb and not error:
            seconds = time.monotonic() - self._started
            rate = self._moved / 1e9 / max(seconds, 1e-3)
            print(f"{self._verb} {self._moved / 1e9:,.2f} GB in {seconds:.1f} s, {rate:.2f} GB/s", flush=True)
