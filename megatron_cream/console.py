"""Where a run's words go: all to the terminal, or Megatron's to a file and ours to the terminal."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def divert(mode: str, folder: str | None) -> Iterator[TextIO]:
    """Yield the stream a person reads.

    Args:
        mode: `full`: nothing is diverted; `progress`: this process's standard output,
            that of libraries written in C++ among it, goes to `folder`/megatron.log,
            and only what is printed to the yielded stream reaches the terminal.
        folder: made if missing; without one, `progress` drops the rest.
    """
    if mode == "full":
        yield sys.stdout
        return
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    path = os.devnull if folder is None else Path(folder) / "megatron.log"
    sys.stdout.flush()
    terminal_fd = os.dup(1)
    with open(path, "a") as log, open(terminal_fd, "w", buffering=1) as terminal:
        os.dup2(log.fileno(), 1)
        try:
            with _logging_to(logging.StreamHandler(log), _to_terminal()):
                yield terminal
        finally:
            sys.stdout.flush()
            os.dup2(terminal_fd, 1)


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
