"""Test of examples/slurm/train.sbatch under a real Slurm of two nodes, if installed; tests/slurm/jobs.py has more."""

import pytest

from tests.faults.kill import compare, newest, run_flags
from tests.launch import torchrun, write_documents
from tests.slurm import cluster
from tests.slurm.jobs import STEPS, preempt

pytestmark = pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing()))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster.slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def test_a_stopped_job_requeues_and_ends_bit_identical(slurm, tmp_path):
    """Stop a job of two nodes with one rank each by scancel --signal=USR1; two ranks of one node run undisturbed."""
    documents = write_documents(tmp_path / "documents", documents=20)
    alone, told = tmp_path / "alone", tmp_path / "told"
    done = torchrun(2, *run_flags(documents, alone, STEPS))
    assert done.returncode == 0, done.stderr[-3000:]
    job = slurm.train(*run_flags(documents, told, STEPS))
    step = preempt(slurm, job, told)
    assert 0 < step < STEPS
    assert slurm.wait(job)["Restarts"] == "1"
    log = slurm.log(job)
    assert f"SIGUSR1: step {step} is saved in {told}" in log and "told to stop: job" in log
    assert newest(told) == STEPS
    compare(alone, told, STEPS)
