"""A rank that no longer gets on ends the job, with its stacks: never silently, and never not at all.

A stopped process, a data loader that waits for a dead file system, a collective that one rank never enters: to the
others all look alike, they wait. NCCL's watchdog and gloo's time-out know collectives only, and say nothing of
where the rank stands that was waited for.
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

PATIENCE = 6
"""How many times longer the start and the first step may take: data indexes are built, kernels compiled."""
_GRACE = 5.0
"""Seconds for the other ranks to show their stacks too, before this one's end breaks their connections."""


class _Watchdog(threading.Thread):
    def __init__(self, seconds: float):
        super().__init__(name="watchdog", daemon=True)
        self.seconds, self.stepped, self.folder = seconds, False, None
        self.last, self.ended = time.monotonic(), threading.Event()

    def run(self) -> None:
        written = 0
        while not self.ended.wait(min(1.0, self.seconds / 10)):
            limit = self.seconds if self.stepped else PATIENCE * self.seconds
            # For a rank whose threads do not get to run: C code that keeps the interpreter's lock, a dead file system.
            # To the real standard error: a library that compiles may have put a buffer in its place for a while.
            faulthandler.dump_traceback_later(limit + 2 * _GRACE, file=sys.__stderr__, exit=True)
            if self.folder is not None and (size := _size(self.folder)) != written:
                self.last, written = time.monotonic(), size
            if time.monotonic() - self.last > limit:
                print(_stacks(limit, self.ident), file=sys.__stderr__, flush=True)
                time.sleep(min(_GRACE, self.seconds))
                os._exit(1)
        faulthandler.cancel_dump_traceback_later()


_watchdog: _Watchdog | None = None


@contextlib.contextmanager
def watching(minutes: float) -> Iterator[None]:
    """End the process if it is not `alive` for so long while the block runs; 0 watches nothing."""
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


def alive() -> None:
    """Something was finished: a step, a batch, a checkpoint."""
    if _watchdog:
        _watchdog.last = time.monotonic()


def stepped() -> None:
    """A training step was finished; before the first one kernels are compiled and memory allocated."""
    if _watchdog:
        _watchdog.stepped = True
        alive()


@contextlib.contextmanager
def saving(folder: Path | None) -> Iterator[None]:
    """Around a checkpoint, which may take longer than the time-out: as long as it grows, it is a sign."""
    alive()
    if _watchdog:
        _watchdog.folder = folder
    try:
        yield
    finally:
        if _watchdog:
            _watchdog.folder = None
        alive()


def _size(folder: Path) -> int:
    """Of the files in it, in bytes; 0 of one that is not there."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except OSError:
        return 0


def listen(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """For Megatron's `pre_wrap_hooks`: each pass through the model, of training or of an evaluation, is a sign."""
    for chunk in chunks:
        chunk.register_forward_pre_hook(lambda *_: alive())
    return chunks


def _stacks(seconds: float, own: int | None) -> str:
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
