"""Run the project's commands as a user types them: each in a process of its own, in an initially empty folder."""

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

from tests import forked_commands
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

    Args:
        forked: run commands in forks of a process that has imported everything, unless `fresh` is given.
    """

    def __init__(self, folder: Path, *, forked: bool = False):
        self.folder, self._forked = folder, forked
        self._turns, self._commands = itertools.cycle(pythons()), itertools.count(1)
        # PYTHONPATH is not inherited: packages are found where a user's command finds them.
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
        self._environment = inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(self, script: str, *flags, ranks: int = 0, fresh: bool = False, timeout: int = 900) -> str:
        """Run a command, check that it succeeds without library warnings, and return its output.

        Args:
            script: a path in the project, or -c.
            ranks: ranks to start with torchrun; 0 runs without torchrun.
            fresh: start a new Python also if the chain is forked.
        """
        with self.started(script, *flags, ranks=ranks, fresh=fresh) as (process, log):
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
    def started(self, script: str, *flags, ranks: int = 0, fresh: bool = False) -> Iterator[tuple[psutil.Popen, Path]]:
        """Yield the process and its log file; all its processes are ended after the block.

        Then a line says how long the command took: pytest -rP shows it.
        """
        if self._forked and not fresh:
            python, torchrun, environment = forked_commands.python(), forked_commands.torchrun(), None
        else:
            python, environment = [next(self._turns)], self._environment
            torchrun = [*python, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={ranks}"] if ranks else python
        command = [*command, script if script == "-c" else str(ROOT / script), *map(str, flags)]
        log = self.folder / f"log.{next(self._commands)}"
        start, cpu = time.monotonic(), _cpu_seconds()
        with open(log, "w") as out:
            process = psutil.Popen(
                ending_with_test(command), stdout=out, stderr=subprocess.STDOUT, cwd=self.folder, env=environment
            )
        try:
            yield process, log
        finally:
            if process.poll() is None:
                left = self._processes()  # torchrun's ranks have their own sessions, and a fork has another parent
                for each in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()
                psutil.wait_procs(left)
            shown = " ".join(" ".join(map(str, (script, *flags))).removeprefix(f"{ROOT}/").split())[:90]
            print(f"{time.monotonic() - start:6.1f} s, {_cpu_seconds() - cpu:6.1f} s of CPU: {shown}", flush=True)

    def _processes(self) -> list[psutil.Process]:
        """Return the processes that run in the chain's folder."""
        folder = str(self.folder.resolve())
        return [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == folder]


def _cpu_seconds() -> float:
    """Return the CPU time of all commands that have ended; not that of forks or a killed torchrun's ranks."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime
