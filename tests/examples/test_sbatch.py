"""Tests of examples/slurm/train.sbatch with stand-ins for Slurm and torchrun; test_slurm.py uses a real Slurm."""

import os
import subprocess

import pytest

from tests.launch import ROOT

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo node0; else echo "$@" >>"$LOG"; fi',
    "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
    "torchrun": 'printf "%s\\n" "$@" >>"$LOG"; [ -z "$SEND" ] || kill -"$SEND" $PPID; exit "$CODE"',
    "sleep": "exit 0",
}
FOLDERS = ["plain", "a b", "$(touch pwned)", "`touch pwned`", "a; touch pwned", 'a"b', "a'b", "$HOME", "*", "a\nb"]


def run(tmp_path, folder: str, *flags, send: str = "", code: int = 0, **environment):
    """Run the script, and return its exit code and the arguments given to torchrun and `scontrol requeue`."""
    commands, log = tmp_path / "bin", tmp_path / "log"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    (tmp_path / folder).mkdir()
    environment |= {"SLURM_JOB_NODELIST": "node0", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "RANKS_PER_NODE": "2"}
    environment |= {"TMPDIR": str(tmp_path / folder), "LOG": str(log), "SEND": send, "CODE": str(code)}
    environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    script = ROOT / "examples/slurm/train.sbatch"
    result = subprocess.run(["bash", script, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert not result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "log", folder}
    assert not list((tmp_path / folder).iterdir())
    return result.returncode, log.read_text().splitlines()


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("send", ["USR1", "TERM"])
def test_a_stopped_job_is_requeued(tmp_path, folder, send):
    """With any name of TMPDIR the note in it is written and removed, and no part of the name is executed."""
    assert run(tmp_path, folder, send=send)[1][-1] == "requeue 7"


@pytest.mark.parametrize("send, code", [("", 0), ("", 3), ("USR1", 3)])
def test_a_finished_or_failed_job_is_not_requeued(tmp_path, send, code):
    found, log = run(tmp_path, "a b", send=send, code=code)
    assert found == code and "requeue 7" not in log


def test_flags_reach_the_run_unchanged(tmp_path):
    flags = ["--data-path", "a b", "$(touch pwned)", "", "--seed", "%a", "--save", "x%a/*"]
    _, log = run(tmp_path, "plain", *flags, SLURM_ARRAY_TASK_ID="3")
    assert log[log.index("pretrain_cream.py") + 1 :] == [flag.replace("%a", "3") for flag in flags]
