"""Faults, as far as the test suite has time for; tests/faults/ has the long ones."""

import signal
import time

import pytest
from megatron.training import checkpointing

from megatron_cream import compat
from tests.faults.kill import kill, launch, newest, wait_for, writing
from tests.launch import write_documents


def test_killed_runs_end_as_one_left_alone(tmp_path):
    """SIGKILL at random moments, checkpoints among them; the last checkpoints have the same bits."""
    met = kill(tmp_path, kills=4, seed=3, steps=16)
    assert sum(met.values()) == 4


def test_sigterm_saves_and_exits(tmp_path):
    """What a cluster sends before it takes the machines: to the launcher, which passes it on."""
    documents, save = write_documents(tmp_path / "documents", documents=20), tmp_path / "run"
    process = launch(documents, save, 100_000, tmp_path / "log")
    wait_for(lambda: newest(save) >= 2, process)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    log = (tmp_path / "log").read_text()
    assert "exiting program after receiving sigterm" in log.lower(), log[-3000:]
    assert not writing(save, newest(save)) and time.monotonic() - sent < 60


def test_the_tracker_is_never_half_written(tmp_path):
    compat._tracker_replaced_at_once()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("100")
    with pytest.raises(KeyboardInterrupt):
        with checkpointing.maybe_msc.open(str(tracker), "w") as file:
            file.write("2")
            raise KeyboardInterrupt  # where a kill could fall
    assert tracker.read_text() == "100"
    with checkpointing.maybe_msc.open(str(tracker), "w") as file:
        file.write("200")
        assert tracker.read_text() == "100"
    assert checkpointing.read_metadata(str(tracker)) == (200, False)
