"""End the ranks of a benchmark that is stopped, so that none stays on a GPU beside the next job."""

import contextlib
import os
import signal

import psutil


def leave_no_ranks() -> None:
    """Make SIGTERM (from `timeout` or a batch system) end this process and all its descendants."""
    signal.signal(signal.SIGTERM, _end_all)


def end_ranks() -> None:
    """Kill all descendants of this process; torchrun's ranks have their own sessions, so a group kill misses them."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _end_all(*_) -> None:
    end_ranks()
    os._exit(128 + signal.SIGTERM)
