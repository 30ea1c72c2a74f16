"""Where a run's words go: all to the terminal, or Megatron's to a file and ours to the terminal."""

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
