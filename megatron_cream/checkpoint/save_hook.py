"""Run the user's command, such as an upload, for each complete checkpoint.

The commands do not delay training: they run one after the other, in the background, on the first rank. The command
gets the checkpoint's folder as its last argument, and CHECKPOINT_FOLDER and CHECKPOINT_STEP in its environment. Its
output goes to `save_hook.log` in --save, which only the run's user can read.

It survives a killed rank, so that a running upload can finish; after that, --save-hook-minutes no longer applies. The
command may contain a token, so it is kept only in this module. Anything saved, printed or logged has only the
program's name.
"""

import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_cream.common.errors import UsageError

LOG = "save_hook.log"

_command: list[str] = []
"""Program and arguments of this run's --save-hook."""


def set_command(command: str) -> str:
    """Keep --save-hook for `get_command`, and return the program's name, which may be shown."""
    global _command
    _command = parse_command(command)
    return program_name(_command)


def get_command() -> list[str]:
    """Return the program and arguments that `set_command` kept."""
    return _command


def program_name(words: list[str]) -> str:
    """Return the first word of a command, without the value of a variable."""
    return words[0].partition("=")[0]  # from TOKEN=... program, which a shell would accept


def parse_command(command: str) -> list[str]:
    """Split --save-hook into program and arguments, as a shell would; no shell runs it.

    Raises:
        UsageError: the command is empty, or a quotation is not closed.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--save-hook: {error}") from error
    if not words:
        raise UsageError("--save-hook: must name a command")
    return words


def check_can_run() -> None:
    """Raise UsageError unless the command is executable; call on the rank that runs it."""
    if shutil.which(_command[0]) is None:
        hint = ". No shell runs it, so set the variable for the whole run." if "=" in _command[0] else ""
        raise UsageError(f"--save-hook {program_name(_command)}: not found or not executable{hint}")


class SaveHook:
    """The background runs of the command for one training run, on its first rank.

    Args:
        command: program and arguments.
        log: file that the command's output is appended to.
        seconds: time limit of one command.
        after: called when the command for a checkpoint has ended.
    """

    def __init__(self, command: list[str], log: Path, seconds: float, after: Callable[[], None] = lambda: None):
        self._command, self._log, self._seconds, self._after = command, log, seconds, after
        self._jobs: queue.SimpleQueue[tuple[int, Path] | None] = queue.SimpleQueue()
        self._busy: list[Path] = []
        self._thread: threading.Thread | None = None

    def start(self, step: int, folder: Path) -> None:
        """Queue the command for this checkpoint, and return without waiting."""
        self._busy.append(folder)
        self._jobs.put((step, folder))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="save hook", daemon=True)
            self._thread.start()

    def busy(self) -> set[Path]:
        """Return the checkpoints whose command is running or queued."""
        return set(self._busy)

    def close(self) -> None:
        """Wait until all commands have ended, up to the time limit of one."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(self._seconds)
        for folder in self._busy:
            _warn(f"{folder}: not finished {self._seconds / 60:g} minutes after the run; it may still be running")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            step, folder = job
            if wrong := self._run(step, folder):
                _warn(f"{folder}: {wrong}; see {self._log}")
            self._busy.remove(folder)
            self._after()

    def _run(self, step: int, folder: Path) -> str:
        """Run the command for one checkpoint, and return what went wrong, or ""."""
        environment = {**os.environ, "CHECKPOINT_FOLDER": str(folder), "CHECKPOINT_STEP": str(step)}
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with open(self._log, "a", opener=_open_private) as log:
                print(f"{began} step {step}: {program_name(self._command)} ... {folder}", file=log, flush=True)
                # A new session, so that Ctrl-C ends the run but not an upload.
                process = subprocess.Popen(
                    [*self._command, str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            code = process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"killed after {self._seconds / 60:g} minutes (--save-hook-minutes)"
        except OSError as error:
            return error.strerror or str(error)
        return f"exit code {code}" if code else ""


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _warn(text: str) -> None:
    print(f"warning: --save-hook: {text}", file=sys.stderr, flush=True)
