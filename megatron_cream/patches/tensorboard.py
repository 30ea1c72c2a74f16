"""Continue training when TensorBoard events cannot be written."""

import contextlib
import os
import sys
from pathlib import Path

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

EVENTS = Patch(
    "tensorboard-events",
    "tensorboard.summary.writer.record_writer:RecordWriter.write",
    "A failed write of an event ends TensorBoard's writer thread, and the next event raises in the training.",
    parameters="self, data",
    written_for="tensorboard 2.x",
)


def install() -> None:
    """Install the patch. Call before the log files are opened."""
    registry.install(EVENTS, _write)


def _write(original, self, data) -> None:
    """Skip an event that cannot be written, and warn once.

    Truncates a partly written event, because readers stop there.
    """
    path = Path(os.fsdecode(self._writer.filename))
    size = path.stat().st_size if path.exists() else 0
    try:
        original(self, data)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        if not getattr(self, "_events_are_missing", False):
            self._events_are_missing = True
            print(f"warning: {path}: events are missing: {error.strerror or error}", file=sys.stderr, flush=True)
