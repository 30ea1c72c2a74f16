"""Tests of the CI rule: a skipped test fails unless the reason is a missing GPU."""

import os
import subprocess
import sys

import pytest

from tests.launch import ROOT

TESTS = """
import pytest

@pytest.mark.skipif(True, reason="gpu: needs two of them")
def test_for_a_gpu(): pass

def test_that_finds_no_gpu():
    pytest.skip("gpu: none is there")

def test_that_runs(): pass
"""
OTHERS = {
    "by a mark": '@pytest.mark.skip(reason="no Slurm")\ndef test_other(): pass\n',
    "while it runs": 'def test_other(): pytest.skip("no Slurm")\n',
    "as a file": 'pytest.importorskip("no_such_package", reason="no Slurm")\n',
}


@pytest.mark.parametrize("ci", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_only_gpus_may_be_missing_in_ci(tmp_path, ci):
    for number, other in enumerate(["", *OTHERS.values()]):
        (tmp_path / f"test_{number}.py").write_text(TESTS + other)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:warnings", "-rfE"]
    command += ["--continue-on-collection-errors"]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, env=environment, cwd=tmp_path)
    outcome = "1 failed, 3 passed, 6 skipped, 2 errors" if ci == "true" else "3 passed, 9 skipped"
    assert outcome in done.stdout, done.stdout[-3000:]
    assert done.returncode == (ci == "true")
    assert ("skipped, which CI does not allow: no Slurm" in done.stdout) == (ci == "true")
