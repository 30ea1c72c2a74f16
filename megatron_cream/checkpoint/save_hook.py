"""The user's own command for each checkpoint that is whole: an upload, a message. It never holds training up.

One after the other, in the background, on the first rank. It gets the checkpoint's folder as its last argument, and
CHECKPOINT_FOLDER and CHECKPOINT_STEP in its environment; what it prints goes to `save_hook.log` in --save, which only
the run's user may read.

It outlives a rank that is killed, so that an upload under way comes to its end; then nothing ends it after
--save-hook-minutes. Its words may hold a token: they are kept here alone, and everything that is saved, printed or
logged has the program's name.
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
"""Those of this run's --save-hook."""


def set_command(command: str) -> str:
    """Keep the words of --save-hook for `words`, and return what may be shown: the program."""
    global _command
    _command = parse_command(command)
    return program_name(_command)


def get_command() -> list[str]:
    """Return those that `take` was given."""
    return _command


def program_name(words: list[str]) -> str:
    return words[0].partition("=")[0]  # TOKEN=... program, which a shell would understand


def parse_command(command: str) -> list[str]:
    """The words of --save-hook, as a shell would cut them; no shell runs it.

    Raises:
        UsageError: none, or a quotation that is not closed.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--save-hook: {error}") from error
    if not words:
        raise UsageError("--save-hook: must name a command")
    return words


def check_can_run() -> None:
    """Raise UsageError unless the command is there and can be run; on the rank that is to."""
    if shutil.which(_command[0]) is None:
        hint = "; no shell runs it, so set the variable for the whole run" if "=" in _command[0] else ""
        raise UsageError(f"--save-hook {program_name(_command)}: is not found, or not a program that can be run{hint}")


class SaveHook:
    """Of one run; on its first rank.

    Args:
        command: words.
        log: where its output goes.
        seconds: it is ended after so long.
        after: called when a checkpoint is no longer in use.
    """

    def __init__(self, command: list[str], log: Path, seconds: float, after: Callable[[], None] = lambda: None):
        self._command, self._log, self._seconds, self._after = command, log, seconds, after
        self._jobs: queue.SimpleQueue[tuple[int, Path] | None] = queue.SimpleQueue()
        self._busy: list[Path] = []
        self._thread: threading.Thread | None = None

    def start(self, step: int, folder: Path) -> None:
        """Run the command for this checkpoint when those before are done. Returns at once."""
        self._busy.append(folder)
        self._jobs.put((step, folder))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="save hook", daemon=True)
            self._thread.start()

    def busy(self) -> set[Path]:
        """Checkpoints that the command is at, or still has to come to."""
        return set(self._busy)

    def close(self) -> None:
        """At the run's end: wait until all are done, for as long as one may take."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(self._seconds)
        for folder in self._busy:
            _warn(
                f"{folder}: not done {self._seconds / 60:g} minutes after the end of the run; it may still be running"
            )

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            step, folder = job
            if wrong := self._run(step, folder):
                _warn(f"{folder}: {wrong}; see {self._log}")
            self._busy.remove(folder)
            self._after()

    def _run(self, step: int, folder: Path) -> str:
        """Returns what went wrong."""
        environment = {**os.environ, "CHECKPOINT_FOLDER": str(folder), "CHECKPOINT_STEP": str(step)}
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with open(self._log, "a", opener=_open_private) as log:
                print(f"{began} step {step}: {program_name(self._command)} ... {folder}", file=log, flush=True)
                # A session of its own: what ends the run (Ctrl-C) does not end an upload.
                process = subprocess.Popen(
                    [*self._command, str(folder)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env=environment, start_new_session=True,
                )  # fmt: skip
            code = process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {self._seconds / 60:g} minutes (--save-hook-minutes)"
        except OSError as error:
            return error.strerror or str(error)
        return f"exit code {code}" if code else ""


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _warn(text: str) -> None:
    print(f"warning: --save-hook: {text}", file=sys.stderr, flush=True)
