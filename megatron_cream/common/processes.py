"""Processes that must not outlive the one that started them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Let the system send this process a signal when its parent ends. Linux only.

    The system looks at the thread that started this process, so that must live as long as its process.

    Args:
        number: the signal to send.
        parent: its process id, as the parent itself handed it down. A child that asks for it may be too late: its
            parent has ended, and the child has process 1 as its new one. None: torchrun hands nothing down.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before, of which the system says nothing
        os.kill(os.getpid(), number)
