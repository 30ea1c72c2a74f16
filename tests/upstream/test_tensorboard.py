"""Faults of tensorboard's writer."""

import resource
import signal
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from tests.upstream import upstream_fault
from tests.upstream.unpatched import unpatched


@upstream_fault(
    "tensorboard-events",
    "an event that cannot be written ends the writer's thread, and the next call raises in the training",
    raises=OSError,
)
def test_events_after_a_full_disk_are_written(tmp_path):
    unpatched(_log_over_a_full_disk, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 3]


def _log_over_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = SummaryWriter(str(folder))
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()
    (file,) = folder.iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, limits[1]))
    writer.add_scalar("loss", 2.0, 2)
    try:
        writer.flush()
    except OSError:
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.add_scalar("loss", 3.0, 3)
    writer.close()
