"""A run whose --save disappears: a lost mount, or a moved or deleted folder."""

import shutil
import signal

import pytest

from tests.faults.kill import launch, newest, ranks, wait_for
from tests.launch import write_documents


@pytest.mark.slow
def test_a_deleted_save_folder_loses_checkpoints_but_no_step(tmp_path):
    """Checkpoints are written again when the folder is back; if it stays away, the exit code is 1."""
    documents, save, away = write_documents(tmp_path / "documents", documents=20), tmp_path / "run", tmp_path / "away"
    log = tmp_path / "log"
    process = launch(documents, save, 100_000, log, flags=["--save", save, "--save-interval", 2])
    said = f"{save} is not the folder that this run opened: it was unmounted, moved or deleted"

    def wait_for_failures(count: int) -> None:
        wait_for(lambda: log.read_text().count(said) >= count, process)
        assert process.poll() is None, log.read_text()[-3000:]

    wait_for(lambda: newest(save) >= 2, process)
    save.rename(away)
    wait_for_failures(2)
    assert not save.exists()
    save.mkdir()  # like a mount point whose disk is gone
    wait_for_failures(4)
    assert not list(save.iterdir())
    save.rmdir()
    before = newest(away)
    away.rename(save)
    wait_for(lambda: newest(save) > before, process)
    seen = log.read_text().count(said)
    assert process.poll() is None, log.read_text()[-3000:]
    shutil.rmtree(save, ignore_errors=True)
    wait_for_failures(seen + 1)
    ranks(process)[1].send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 1
    words = log.read_text()
    assert "pretrain_cream.py: error: the last checkpoint is missing: step " in words and not save.exists()
    assert words.count("Traceback") == 1, "torchrun's"
