"""End the job with stack traces when a rank stops making progress.

A stopped process, a data loader that waits for a dead file system and a collective that one rank never enters look the
same to the other ranks: they wait. NCCL's watchdog and gloo's timeout cover collectives only, and do not show where the
missing rank hangs.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

START_FACTOR = 6
"""The start and the first step may take this many times longer, to build data indexes and compile kernels."""
_GRACE_SECONDS = 5.0
"""Time for the other ranks to print their stacks too, before the end of this rank breaks their connections."""


class _Watchdog(threading.Thread):
    def __init__(self, seconds: float):
        super().__init__(name="watchdog", daemon=True)
        self.seconds, self.stepped, self.folder = seconds, False, None
        self.last, self.ended = time.monotonic(), threading.Event()

    def run(self) -> None:
        written = 0
        while not self.ended.wait(min(1.0, self.seconds / 10)):
            limit = self.seconds if self.stepped else START_FACTOR * self.seconds
            # Fires if this thread cannot run: C code holds the GIL, or this thread waits for a dead file system.
            # The real stderr, because libraries that compile may temporarily replace sys.stderr by a buffer.
            faulthandler.dump_traceback_later(limit + 2 * _GRACE_SECONDS, file=sys.__stderr__, exit=True)
            if self.folder is not None and (size := _get_folder_size(self.folder)) != written:
                self.last, written = time.monotonic(), size
            if time.monotonic() - self.last > limit:
                print(_format_stacks(limit, self.ident), file=sys.__stderr__, flush=True)
                time.sleep(min(_GRACE_SECONDS, self.seconds))
                os._exit(1)
        faulthandler.cancel_dump_traceback_later()


_watchdog: _Watchdog | None = None


@contextlib.contextmanager
def watch(minutes: float) -> Iterator[None]:
    """End the process if it reports no progress for `minutes` in the context; 0: never."""
    global _watchdog
    if not minutes:
        yield
        return
    _watchdog = _Watchdog(60 * minutes)
    _watchdog.start()
    try:
        yield
    finally:
        _watchdog.ended.set()
        _watchdog.join()
        _watchdog = None


def report_progress() -> None:
    """Restart the timeout, because a step, a batch or a checkpoint was finished."""
    if _watchdog:
        _watchdog.last = time.monotonic()


def report_step() -> None:
    """Restart the timeout after a training step, and end the longer timeout of the start."""
    if _watchdog:
        _watchdog.stepped = True
        report_progress()


@contextlib.contextmanager
def watch_save(folder: Path | None) -> Iterator[None]:
    """Count growth of a checkpoint folder as progress within the context.

    A checkpoint may take longer than the timeout.
    """
    report_progress()
    if _watchdog:
        _watchdog.folder = folder
    try:
        yield
    finally:
        if _watchdog:
            _watchdog.folder = None
        report_progress()


def _get_folder_size(folder: Path) -> int:
    """Return the total size of the files in a folder in bytes; 0 if it does not exist."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except OSError:
        return 0


def report_forward_passes(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Report progress at each forward pass. For Megatron's `pre_wrap_hooks`."""
    for chunk in chunks:
        chunk.register_forward_pre_hook(lambda *_: report_progress())
    return chunks


def _format_stacks(seconds: float, own: int | None) -> str:
    rank = os.environ.get("RANK", "0")
    lines = [
        f"pretrain_cream.py: error: rank {rank} on {socket.gethostname()} finished no step, evaluation batch or "
        f"checkpoint in {seconds / 60:g} minutes (--timeout-minutes): its stacks follow, and the job ends"
    ]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    for ident in sorted(frames.keys() - {own}, key=lambda ident: ident != threading.main_thread().ident):
        lines.append(f"thread {names.get(ident, ident)}:")
        lines += "".join(traceback.format_stack(frames[ident])).splitlines()
    return "\n".join(f"[rank {rank}] {line}" for line in lines)
