"""How far an evaluation is: a bar on a terminal, a line a minute where the output goes to a file."""

from megatron_cream.common.progress_bar import ProgressBar


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
        self._bar = ProgressBar(tokens or examples, f"0/{examples}", seconds_between_lines=60)

    def skip(self, weight: int) -> None:
        """Count an example that an earlier run did.

        Args:
            weight: as it counts in the total of tokens.
        """
        self._done += 1
        self._bar.subtract(weight if self._weighed else 1, self._text())

    def add(self, weight: int, tokens: int) -> None:
        """Count an example that was done.

        Args:
            weight: as it counts in the total of tokens.
            tokens: that were read for it.
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
