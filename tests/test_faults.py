"""Faults, as far as the test suite has time for; tests/faults/ has the long ones."""

import pytest
from megatron.training import checkpointing

from megatron_cream import compat
from tests.faults.kill import kill


def test_killed_runs_end_as_one_left_alone(tmp_path):
    """SIGKILL in training and in the middle of a checkpoint; the last checkpoints have the same bits."""
    met = kill(tmp_path, kills=4, seed=3, steps=16)
    assert sum(met.values()) == 4 and met["checkpoint"] >= 1


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
