"""The progress bar of every command: on a terminal a bar with a rate and the time left, elsewhere nothing, or lines."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar on standard error. Use as a context manager; may be moved by any thread.

    Args:
        total: of the work, in any unit; None while it is not known.
        text: what stands beside the bar.
        shown: False shows nothing at all.
        refresh: by a thread of its own. Not where processes are forked meanwhile: then each move draws.
        transient: the bar goes away at its end.
        seconds_between_lines: where standard error is no terminal, `text` and the time left are printed so often.
    """

    def __init__(
        self,
        total: float | None,
        text: str = "",
        *,
        shown: bool = True,
        refresh: bool = True,
        transient: bool = False,
        seconds_between_lines: float | None = None,
    ):
        terminal = Console(stderr=True)
        self.live = shown and terminal.is_terminal
        self._between = seconds_between_lines if shown and not self.live else None
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(
            *columns, console=terminal, transient=transient, disable=not self.live, auto_refresh=refresh
        )
        self._draws, self._lock = not refresh, threading.Lock()
        self._task = self._bar.add_task("", total=total, text=text)
        self._started = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the bar was entered."""
        return max(time.monotonic() - self._started, 1e-3)

    def expect(self, total: float) -> None:
        """Set how much there will be in all."""
        self._bar.update(self._task, total=total)

    def leave_out(self, amount: float, text: str) -> None:
        """Take out of the total what an earlier run did, so that it does not count as speed.

        Args:
            amount: of the total's unit.
            text: what stands beside the bar from now on.
        """
        self._bar.update(self._task, total=(self._bar.tasks[0].total or 0) - amount, text=text)

    def move(self, text: str, *, by: float | None = None, to: float | None = None) -> None:
        """Move the bar.

        Args:
            text: what stands beside it from now on.
            by: so much further.
            to: the place that is reached, in place of `by`.
        """
        with self._lock:
            self._bar.update(self._task, advance=by, completed=to, text=text, refresh=self._draws)
            if self._between is not None and time.monotonic() - self._told > self._between:
                self._tell(text)

    def _tell(self, text: str) -> None:
        self._told = time.monotonic()
        task = self._bar.tasks[0]
        left = ((task.total or 0) - task.completed) * self.seconds / max(task.completed, 1)
        print(f"{text}, {left / 60:.0f} min left", file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressBar":
        self._started = self._told = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()


class TransferBar:
    """A bar over bytes, and one line at the end that stays.

    Use as a context manager; call it with each number of bytes, from any thread.

    Args:
        verb: what is done, "imported"; None shows nothing.
    """

    def __init__(self, verb: str | None):
        self._verb, self._moved, self._lock = verb, 0, threading.Lock()
        self._bar = ProgressBar(None, shown=verb is not None, transient=True)

    def expect(self, nbytes: int) -> None:
        """Set how many bytes there will be in all."""
        self._bar.expect(nbytes)

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._moved += nbytes
        self._bar.move(self._text(), by=nbytes)

    def _text(self) -> str:
        return f"{self._moved / 1e9:,.2f} GB, {self._moved / 1e9 / self._bar.seconds:.2f} GB/s"

    def __enter__(self) -> "TransferBar":
        self._bar.__enter__()
        return self

    def __exit__(self, error, *_) -> None:
        self._bar.__exit__()
        if self._verb and not error:
            rate = self._moved / 1e9 / self._bar.seconds
            print(f"{self._verb} {self._moved / 1e9:,.2f} GB in {self._bar.seconds:.1f} s, {rate:.2f} GB/s", flush=True)
