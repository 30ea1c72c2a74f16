"""The project's commands, run as a user types them: each in a fresh process, in a folder that was empty."""

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.faults.kill import wait_for
from tests.processes import ending_with_test

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = "CHAIN_PYTHON"


def pythons() -> list[str]:
    """Return the interpreters of CHAIN_PYTHON, which has colons between them; by default this one alone."""
    return os.environ.get(PYTHONS, sys.executable).split(os.pathsep)


def advised(said: str) -> list[str]:
    """Return the script and the flags of the command that `said` ends by advising."""
    words = shlex.split(re.findall(r"^Next: (.+)$", said, re.MULTILINE)[-1])
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]


class Chain:
    """Commands run one after the other in `folder`.

    Where there are several interpreters they take turns, so that each reads what another has written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._turns, self._commands = itertools.cycle(pythons()), itertools.count(1)
        # Nothing of the test's own process: a package is found where the user's command finds it.
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
        self._environment = inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(self, script: str, *flags, ranks: int = 0, timeout: int = 900) -> str:
        """Run a command that must succeed, and return what it printed; a tool prints no library's warnings.

        Args:
            script: a path in the project.
            ranks: started by torchrun; 0 is without it.
        """
        with self.started(script, *flags, ranks=ranks) as (process, log):
            code = process.wait(timeout)
        said = log.read_text(errors="replace")
        warned = script != "-c" and re.search(r"[A-Za-z]Warning: ", said)
        assert code == 0 and not warned, f"{script} {' '.join(map(str, flags))}\n{said[-6000:]}"
        return said

    def run_code(self, code: str, *arguments) -> str:
        """Run Python code that must succeed, and return what it printed."""
        return self.run("-c", code, *arguments)

    def kill_when(self, condition: Callable[[], bool], script: str, *flags, ranks: int) -> str:
        """Start a command, and SIGKILL all of its processes as soon as `condition` holds; return what it printed."""
        with self.started(script, *flags, ranks=ranks) as (process, log):
            wait_for(condition, process)
            assert process.poll() is None, log.read_text(errors="replace")[-6000:]
        return log.read_text(errors="replace")

    @contextlib.contextmanager
    def started(self, script: str, *flags, ranks: int = 0) -> Iterator[tuple[psutil.Popen, Path]]:
        """Yield the process and the file that it prints to; nothing of it is left at the end of the block."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        command = [next(self._turns), *torchrun, script if script == "-c" else str(ROOT / script), *map(str, flags)]
        log = self.folder / f"log.{next(self._commands)}"
        with open(log, "w") as out:
            process = psutil.Popen(
                ending_with_test(command), stdout=out, stderr=subprocess.STDOUT, cwd=self.folder, env=self._environment
            )
        try:
            yield process, log
        finally:
            if process.poll() is None:
                left = [process, *process.children(recursive=True)]  # torchrun's ranks are in sessions of their own
                for each in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                psutil.wait_procs(left)
