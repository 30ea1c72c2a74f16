"""End a process together with its parent."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Ask the kernel to send this process a signal when its parent ends. Linux only.

    The kernel watches the thread that started this process, so that thread must live as long as the parent.

    Args:
        number: the signal to send.
        parent: the parent's process id, passed by the parent itself. A child that calls getppid() may get 1, if its
            parent has ended already. None calls getppid() nonetheless: torchrun passes no id.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the request, and the kernel sends nothing
        os.kill(os.getpid(), number)
