"""Start the processes of tests so that they end with the test process, even if it is killed."""

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
    """Wrap `command` so that the kernel kills its process when this process ends, also by Ctrl-C or a signal.

    Otherwise a torchrun in its own session, which a terminal's Ctrl-C does not reach, would continue to train. Its
    ranks end with it. Start the command from the main thread: the kernel kills it when the starting thread ends.
    """
    return [sys.executable, "-c", _END_WITH_TEST, str(ROOT), str(os.getpid()), *map(str, command)]
