"""The progress bars of all commands: a bar on a terminal, elsewhere lines or nothing."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A progress bar on standard error. Use it as a context manager; any thread may move it.

    Args:
        total: the amount of work, in any unit; None while it is unknown.
        text: the text beside the bar.
        shown: False shows nothing at all.
        refresh: redraw from a separate thread. Set False where processes are forked meanwhile: then each move redraws.
        transient: remove the bar at its end.
        seconds_between_lines: if standard error is not a terminal, the interval at which `text` and the time left are
            printed; None prints nothing.
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
        self._line_interval = seconds_between_lines if shown and not self.live else None
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(
            *columns, console=terminal, transient=transient, disable=not self.live, auto_refresh=refresh
        )
        self._draw_moves, self._lock = not refresh, threading.Lock()
        self._task = self._bar.add_task("", total=total, text=text)
        self._started = self._line_time = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the bar was entered."""
        return max(time.monotonic() - self._started, 1e-3)

    def expect(self, total: float) -> None:
        """Set the total amount of work."""
        self._bar.update(self._task, total=total)

    def subtract(self, amount: float, text: str) -> None:
        """Subtract an earlier run's work from the total, so that it does not count as speed.

        Args:
            amount: the work to subtract, in the total's unit.
            text: the new text beside the bar.
        """
        self._bar.update(self._task, total=(self._bar.tasks[0].total or 0) - amount, text=text)

    def move(self, text: str, *, by: float | None = None, to: float | None = None) -> None:
        """Move the bar.

        Args:
            text: the new text beside it.
            by: the progress since the last move.
            to: the total progress, instead of `by`.
        """
        with self._lock:
            self._bar.update(self._task, advance=by, completed=to, text=text, refresh=self._draw_moves)
            if self._line_interval is not None and time.monotonic() - self._line_time > self._line_interval:
                self._print_line(text)

    def _print_line(self, text: str) -> None:
        self._line_time = time.monotonic()
        task = self._bar.tasks[0]
        left = ((task.total or 0) - task.completed) * self.seconds / max(task.completed, 1)
        print(f"{text}, {left / 60:.0f} min left", file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressBar":
        self._started = self._line_time = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()


class TransferBar:
    """A progress bar over bytes that prints one summary line at its end.

    Use it as a context manager; call it with the size of each transfer, from any thread.

    Args:
        verb: the first word of the summary, such as "imported"; None shows nothing.
    """

    def __init__(self, verb: str | None):
        self._verb, self._moved, self._lock = verb, 0, threading.Lock()
        self._bar = ProgressBar(None, shown=verb is not None, transient=True)

    def expect(self, nbytes: int) -> None:
        """Set the total number of bytes."""
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
