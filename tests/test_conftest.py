"""Tests of the CI rule: a skipped test fails unless the reason is a missing GPU."""

import os
import subprocess
import sys

import pytest

from tests import skips
from tests.processes import ROOT

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


def test_the_rule_is_installed(pytestconfig):
    for name in ("pytest_make_collect_report", "pytest_runtest_makereport"):
        functions = [each.function for each in getattr(pytestconfig.hook, name).get_hookimpls()]
        assert getattr(skips, name) in functions


@pytest.mark.parametrize("ci", ["true", "false"])
def test_only_gpus_may_be_missing_in_ci(tmp_path, ci):
    for number, other in enumerate(["", *OTHERS.values()]):
        (tmp_path / f"test_{number}.py").write_text(TESTS + other)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:warnings", "-rfE"]
    command += ["--continue-on-collection-errors"]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, env=environment, cwd=tmp_path)
    outcome = "1 failed, 3 passed, 6 skipped, 2 errors" if ci == "true" else "3 passed, 9 skipped"
    assert outcome in done.stdout, done.stdout[-3000:]
    assert done.returncode == (ci == "true")
    assert ("skipped, which CI does not allow: no Slurm" in done.stdout) == (ci == "true")
