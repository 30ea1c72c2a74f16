"""How far a run is: a bar on a terminal, a line a minute where the output goes to a file."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 60


class WorkBar:
    """Counts examples, weighs them by their tokens, and tells tokens/s and the time left.

    Use as a context manager.

    Args:
        examples: in all.
        tokens: in all, by which the time left is told; None: by examples.
    """

    def __init__(self, examples: int, tokens: int | None):
        self._examples, self._weighed = examples, tokens is not None
        self._done = self._read = 0
        terminal = Console(stderr=True)
        self._lines = not terminal.is_terminal
        columns = (
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(*columns, console=terminal, disable=self._lines)
        self._task = self._bar.add_task("", total=tokens or examples, text=f"0/{examples}")

    def skip(self, weight: int) -> None:
        """An example that an earlier run did; `weight` as it counts in the total of tokens."""
        self._done += 1
        task = self._bar.tasks[0]
        # Out of the total, so that it does not count as speed.
        self._bar.update(self._task, total=task.total - (weight if self._weighed else 1), text=self._text())

    def add(self, weight: int, tokens: int) -> None:
        """An example that was done, with the tokens that were read for it."""
        self._done += 1
        self._read += tokens
        self._bar.update(self._task, advance=weight if self._weighed else 1, text=self._text())
        if self._lines and time.monotonic() - self._told > _SECONDS_BETWEEN_LINES:
            self._tell()

    def _text(self) -> str:
        rate = self._read / max(time.monotonic() - self._started, 1e-3)
        return f"{self._done}/{self._examples} examples, {rate:,.0f} tokens/s"

    def _tell(self) -> None:
        self._told = time.monotonic()
        task = self._bar.tasks[0]
        seconds = (task.total - task.completed) * (self._told - self._started) / max(task.completed, 1)
        print(f"{self._text()}, {seconds / 60:.0f} min left", file=sys.stderr, flush=True)

    def __enter__(self) -> "WorkBar":
        self._started = self._told = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
