"""The environment that a launcher gives, and its end."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from megatron_cream import launcher
from megatron_cream.errors import UsageError
from tests.launch import ROOT


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("RANK", "x", "RANK=x"), ("RANK", "-1", "RANK=-1"), ("RANK", "5", "below WORLD_SIZE=1"),
        ("WORLD_SIZE", "0", "below WORLD_SIZE=0"), ("WORLD_SIZE", "", "WORLD_SIZE="), ("MASTER_PORT", "1e3", "MASTER_PORT=1e3"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_be_is_a_line(name, value, words):
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    command = [sys.executable, "pretrain_cream.py", "--print-config"]
    result = subprocess.run(command, cwd=ROOT, env=plain | {name: value}, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and words in result.stderr


def test_a_port_that_is_taken_is_a_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "pretrain_cream.py"), "--config", str(ROOT / "examples/quickstart.yaml")]
        result = subprocess.run(command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].endswith("is taken; give another"), result.stderr
    assert f"MASTER_PORT={port}" in result.stderr and "Traceback" not in result.stderr


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert launcher.ranks() == (0, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 1023
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setitem(os.environ, "RANK", "2")
    with pytest.raises(UsageError, match="RANK=2"):
        launcher.ranks()


def test_ranks_end_with_a_torchrun_that_was_killed_while_they_started(tmp_path):
    """Before training, of which test_faults.py has this."""
    flags = ["--config", ROOT / "examples" / "quickstart.yaml", "--save", tmp_path / "new", "--train-iters", "100000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun = subprocess.Popen([*command, ROOT / "pretrain_cream.py", *map(str, flags)], cwd=tmp_path)
    ranks = []
    while len(ranks) < 2 or not all(_ends_with_its_parent(rank) for rank in ranks):
        assert torchrun.poll() is None
        time.sleep(0.01)
        ranks = psutil.Process(torchrun.pid).children()
    time.sleep(2)  # loaded, it is called at once, where the machine is not busy; imports go on for longer
    torchrun.send_signal(signal.SIGKILL)
    torchrun.wait()
    _, left = psutil.wait_procs(ranks, timeout=30)
    for rank in left:
        rank.kill()
    assert not left and not (tmp_path / "new").exists()


def _ends_with_its_parent(rank: psutil.Process) -> bool:
    """It has loaded what `follow` calls, and so may be about to: what it will be told of has no other sign."""
    try:
        return any("_ctypes" in found.path for found in rank.memory_maps())
    except psutil.Error:
        return False
