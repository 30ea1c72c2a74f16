"""The progress of an evaluation: a bar on a terminal, one line per minute in a log file."""

from megatron_cream.common.progress_bar import ProgressBar


class WorkBar:
    """A progress bar that shows finished examples, tokens/s and the time left.

    Use it as a context manager.

    Args:
        examples: total number of examples.
        tokens: total number of tokens, from which the time left is estimated; None estimates it from examples.
        shown: False shows nothing.
    """

    def __init__(self, examples: int, tokens: int | None, *, shown: bool = True):
        self._examples, self._weighed = examples, tokens is not None
        self._done = self._read = 0
        self._bar = ProgressBar(tokens or examples, f"0/{examples}", shown=shown, seconds_between_lines=60)

    def skip(self, weight: int) -> None:
        """Count an example that an earlier run finished.

        Args:
            weight: the example's part of the total, in tokens.
        """
        self._done += 1
        self._bar.subtract(weight if self._weighed else 1, self._text())

    def add(self, weight: int, tokens: int) -> None:
        """Count an example that this run finished.

        Args:
            weight: the example's part of the total, in tokens.
            tokens: tokens that the model read for it.
        """
        self._done += 1
        self._read += tokens
        self._bar.move(self._text(), by=weight if self._weighed else 1)

    def _text(self) -> str:
        return f"{self._done}/{self._examples} examples, {self._read / self._bar.seconds:,.0f} tokens/s"

    def __enter__(self) -> "WorkBar":
        self._bar.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._bar.__exit__()
