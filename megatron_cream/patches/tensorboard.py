"""Keep training alive when TensorBoard's events cannot be written."""

import contextlib
import os
import sys
from pathlib import Path

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

EVENTS = Patch(
    "tensorboard-events",
    "tensorboard.summary.writer.record_writer:RecordWriter.write",
    "An event that cannot be written ends the writer's thread, and the next event ends the training.",
    parameters="self, data",
    written_for="tensorboard 2.x",
)


def install() -> None:
    """Call before the log files are opened."""
    registry.install(EVENTS, _write)


def _write(original, self, data) -> None:
    """Leave the event out and say so once. Cut off half an event, as no reader goes past it."""
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
