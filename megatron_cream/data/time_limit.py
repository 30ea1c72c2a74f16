"""A time limit for chat templates, which may have nested loops that never finish."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SECONDS = 60.0
"""Limit for one rendering; a chat of 100 MB takes a second or two."""


class TemplateTimeout(Exception):
    """A rendering took more than SECONDS. The message follows the template's name."""


@contextlib.contextmanager
def limit_rendering_time() -> Iterator[None]:
    """Raise TemplateTimeout in the block after SECONDS.

    Uses SIGALRM, which only the main thread can handle: in other threads there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise TemplateTimeout(f"did not finish within {SECONDS:g} s. Check it for nested loops.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
