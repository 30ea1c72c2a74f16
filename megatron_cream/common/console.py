"""Redirect a run's output, to the terminal or to a log file; format counts."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_cream.common import entry
from megatron_cream.common.errors import UsageError, reason


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 file" or "2,000 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@contextlib.contextmanager
def redirect_output(mode: str, folder: str | None) -> Iterator[TextIO]:
    """Redirect Megatron's output as `mode` says; yield the stream for the user.

    Args:
        mode: `full` redirects nothing. `progress` sends this process's standard output,
            also that of C++ libraries, to `folder`/megatron.log, and only text printed to
            the yielded stream reaches the terminal.
        folder: the log's folder, created if missing; None discards that output.

    Raises:
        UsageError: the folder or the log cannot be created.
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
    with _open_lossy(path, "a") as log, _open_lossy(terminal_fd, "w") as terminal:
        os.dup2(log.fileno(), 1)
        sys.stdout = log
        try:
            with _use_log_handlers(logging.StreamHandler(log), _terminal_handler()):
                yield terminal
        finally:
            sys.stdout = stdout
            os.dup2(terminal_fd, 1)


class _Lossy(io.FileIO):
    """A file that drops what it cannot write.

    A full disk or a closed pipe must not end the run.
    """

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _open_lossy(file: str | Path | int, mode: str) -> TextIO:
    raw = io.BufferedWriter(_Lossy(file, mode))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


@contextlib.contextmanager
def capture_output(stream: TextIO) -> Iterator[None]:
    """Send what Python code prints and logs to `stream`."""
    with contextlib.redirect_stdout(stream), _use_log_handlers(logging.StreamHandler(stream)):
        yield


@contextlib.contextmanager
def _use_log_handlers(*handlers: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    before, root.handlers = root.handlers, list(handlers)
    try:
        yield
    finally:
        root.handlers = before


def _terminal_handler() -> logging.Handler:
    """Return a handler that prints warnings, but only errors from Megatron.

    Megatron logs every change of its state as a warning.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda r: r.levelno >= logging.ERROR or not r.name.startswith("megatron."))
    return handler
