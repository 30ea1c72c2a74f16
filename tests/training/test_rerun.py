"""The rerun state machine, which runs a step again to tell a machine's fault from the data's, in fresh processes."""

import pytest

from tests.launch import TINY, torchrun, write_documents

RERUN = [*TINY, "--fp32", "--train-iters", 4, "--split", "90,10,0", "--eval-iters", 0, "--nan-policy", "rerun"]
FAULT = ["--error-injection-rate", 2, "--error-injection-type", "persistent_error"]


def said(result) -> str:
    return result.stdout + result.stderr


@pytest.mark.slow
def test_a_fault_is_saved_and_known_after_a_restart(tmp_path):
    """Megatron asks to resume from the checkpoint that it saves then."""
    flags = [*RERUN, *FAULT, "--data-path", write_documents(tmp_path / "documents")]
    first = said(torchrun(1, *flags, "--save", tmp_path / "saved", "--save-interval", 100))
    assert "Saving a checkpoint and exiting now" in first and "exitcode  : 16" in first, first[-3000:]
    again = said(torchrun(1, *flags, "--load", tmp_path / "saved"))
    assert "Getting RerunStateMachine state from checkpoint" in again, again[-3000:]
    assert "Got rescheduled on the same GPU" in again, again[-3000:]


@pytest.mark.slow
def test_a_fault_in_a_run_without_save_ends_it_with_megatrons_exit_code(tmp_path):
    ended = said(torchrun(1, *RERUN, "--data-path", write_documents(tmp_path / "documents"), "--lr", "1e30"))
    assert "exitcode  : 16" in ended and "TypeError" not in ended, ended[-3000:]
