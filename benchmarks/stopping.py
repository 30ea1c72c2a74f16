"""A benchmark that is stopped leaves no rank on a GPU, beside what is started next."""

import contextlib
import os
import signal

import psutil


def leave_no_ranks() -> None:
    """From now on SIGTERM (`timeout`, a batch system) ends this process with all that it started."""
    signal.signal(signal.SIGTERM, _end_all)


def end_ranks() -> None:
    """What this process started, and what that did: torchrun's ranks have sessions of their own."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _end_all(*_) -> None:
    end_ranks()
    os._exit(128 + signal.SIGTERM)
