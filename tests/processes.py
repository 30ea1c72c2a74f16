"""Start the processes of tests so that they end with the test, however that ends."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_END_WITH_TEST = """
import os, sys
sys.path.insert(0, sys.argv[1])
from megatron_cream.common.processes import end_with_parent
end_with_parent(parent=int(sys.argv[2]))
os.execvp(sys.argv[3], sys.argv[3:])
"""


def ending_with_test(command: list) -> list[str]:
    """Return `command` so that the system kills its process when this one has ended, by Ctrl-C or by a signal.

    A torchrun in a session of its own would train on, where a terminal's Ctrl-C does not reach it; its ranks end with
    it. Start it from the main thread: the system looks at the thread.
    """
    return [sys.executable, "-c", _END_WITH_TEST, str(ROOT), str(os.getpid()), *map(str, command)]
