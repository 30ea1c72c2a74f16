"""Run the project's commands as a user types them: each in a fresh process, in an initially empty folder."""

import contextlib
import itertools
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.faults.kill import wait_for
from tests.processes import ending_with_test

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = "CHAIN_PYTHON"


def pythons() -> list[str]:
    """Return the interpreters listed in CHAIN_PYTHON, separated by colons; by default only this one."""
    return os.environ.get(PYTHONS, sys.executable).split(os.pathsep)


def advised(said: str) -> list[str]:
    """Return the script and flags of the last command that the output `said` advises."""
    words = shlex.split(re.findall(r"^Next: (.+)$", said, re.MULTILINE)[-1])
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]


class Chain:
    """Commands that run one after the other in `folder`.

    Several interpreters take turns, so that each reads files that another has written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._turns, self._commands = itertools.cycle(pythons()), itertools.count(1)
        # PYTHONPATH is not inherited: packages are found where a user's command finds them.
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
        self._environment = inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(self, script: str, *flags, ranks: int = 0, timeout: int = 900) -> str:
        """Run a command, check that it succeeds without library warnings, and return its output.

        Args:
            script: a path in the project, or -c.
            ranks: ranks to start with torchrun; 0 runs without torchrun.
        """
        with self.started(script, *flags, ranks=ranks) as (process, log):
            code = process.wait(timeout)
        said = log.read_text(errors="replace")
        warned = script != "-c" and re.search(r"[A-Za-z]Warning: ", said)
        assert code == 0 and not warned, f"{script} {' '.join(map(str, flags))}\n{said[-6000:]}"
        return said

    def run_code(self, code: str, *arguments) -> str:
        """Run Python code, check that it succeeds, and return its output."""
        return self.run("-c", code, *arguments)

    def kill_when(self, condition: Callable[[], bool], script: str, *flags, ranks: int) -> str:
        """Start a command, SIGKILL all its processes as soon as `condition` holds, and return its output."""
        with self.started(script, *flags, ranks=ranks) as (process, log):
            wait_for(condition, process)
            assert process.poll() is None, log.read_text(errors="replace")[-6000:]
        return log.read_text(errors="replace")

    @contextlib.contextmanager
    def started(self, script: str, *flags, ranks: int = 0) -> Iterator[tuple[psutil.Popen, Path]]:
        """Yield the process and its log file; all its processes are ended after the block.

        Then a line says how long the command took: pytest -rP shows it.
        """
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        command = [next(self._turns), *torchrun, script if script == "-c" else str(ROOT / script), *map(str, flags)]
        log = self.folder / f"log.{next(self._commands)}"
        start, cpu = time.monotonic(), _cpu_seconds()
        with open(log, "w") as out:
            process = psutil.Popen(
                ending_with_test(command), stdout=out, stderr=subprocess.STDOUT, cwd=self.folder, env=self._environment
            )
        try:
            yield process, log
        finally:
            if process.poll() is None:
                left = [process, *process.children(recursive=True)]  # torchrun's ranks have their own sessions
                for each in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                psutil.wait_procs(left)
            shown = " ".join(" ".join(map(str, (script, *flags))).removeprefix(f"{ROOT}/").split())[:90]
            print(f"{time.monotonic() - start:6.1f} s, {_cpu_seconds() - cpu:6.1f} s of CPU: {shown}", flush=True)


def _cpu_seconds() -> float:
    """Return the CPU time of all commands that have ended; not that of a killed torchrun's ranks."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime
