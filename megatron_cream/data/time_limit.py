"""Stop a chat template that runs without end, such as one with loops in loops."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SECONDS = 60.0
"""A chat of 100 MB takes a second or two."""


class Endless(Exception):
    """A rendering took more than SECONDS. The message ends a line that begins with the template's name."""


@contextlib.contextmanager
def limited_rendering() -> Iterator[None]:
    """Raise Endless in a block that renders a template, after SECONDS.

    Signals reach the main thread alone: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise Endless(f"does not come to an end: it was stopped after {SECONDS:g} s. Look for loops in loops in it")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
