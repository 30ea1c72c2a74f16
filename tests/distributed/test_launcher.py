"""Tests of the launcher's environment variables, and of ranks whose launcher is killed."""

import itertools
import os
import signal
import socket
import subprocess
import time

import psutil
import pytest
import torch

from megatron_cream.common import devices
from megatron_cream.patches import platform

platform.setup()

from megatron_cream.common.errors import UsageError
from megatron_cream.config.checks import flags as flag_checks
from megatron_cream.distributed import launcher
from tests import forked_commands
from tests.launch import ROOT
from tests.processes import ending_with_test

ALL = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "3",
}
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("names", [names for n in range(6) for names in itertools.combinations(list(ALL)[:5], n)])
def test_incomplete_torchrun_variables(names):
    """Try all combinations of the variables that torch needs: several ranks need all, a single rank none."""
    given = {name: ALL[name] for name in names}
    missing = [name for name in NEEDED if name not in given]
    if "WORLD_SIZE" in given and not missing:
        assert launcher.read_environment(given) == (1, 2)
    elif "WORLD_SIZE" in given:
        with pytest.raises(UsageError, match=f"^WORLD_SIZE=2 in the environment: {missing[0]} is missing; start"):
            launcher.read_environment(given)
    elif "RANK" in given:
        with pytest.raises(UsageError, match="^RANK=1 in the environment: must be below WORLD_SIZE=1"):
            launcher.read_environment(given)
    else:
        assert launcher.read_environment(given) == (0, 1)


@pytest.mark.parametrize(
    "changes, words",
    [
        *(
            ({name: value}, f"{name}={value} in the environment: must be a whole number")
            for name in ALL
            if name not in ("MASTER_ADDR", "TORCHELASTIC_RUN_ID")
            for value in ("x", "", "-1", "1e3", " 1", "9" * 5000, "\u0663")
        ),
        ({"RANK": "2"}, "RANK=2 in the environment: must be below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "RANK=1 in the environment: must be below WORLD_SIZE=0"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 in the environment: must be below LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": None}, "LOCAL_RANK=2 in the environment: must be below WORLD_SIZE=2"),
        ({"GROUP_RANK": "1"}, "GROUP_RANK=1 in the environment: must be below GROUP_WORLD_SIZE=1"),
        ({"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": None}, "TORCHELASTIC_RUN_ID is missing"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 in the environment: must be 65535 or less"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is missing"),
    ],
)
def test_impossible_torchrun_variables(changes, words):
    assert launcher.read_environment(ALL) == (1, 2)
    given = {name: value for name, value in (ALL | changes).items() if value is not None}
    with pytest.raises(UsageError) as refused:
        launcher.read_environment(given)
    assert words in str(refused.value)


def test_an_invalid_environment_prints_one_line():
    plain = {key: value for key, value in os.environ.items() if key not in ALL}
    command = [*forked_commands.python(), "pretrain_cream.py", "--print-config"]
    result = subprocess.run(command, cwd=ROOT, env=plain | {"WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "RANK is missing" in result.stderr


def test_a_port_in_use_prints_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = [*forked_commands.python(), str(ROOT / "pretrain_cream.py"), "--config", "quickstart"]
        result = subprocess.run(command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].endswith("the port is in use. Set another"), (
        result.stderr
    )
    assert f"MASTER_PORT={port}" in result.stderr and "Traceback" not in result.stderr


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert launcher.get_rank_and_world_size() == (0, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 1023
    del os.environ["MASTER_PORT"]
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["MASTER_ADDR"] = "node0"  # set by itself, as for examples/slurm/train.sbatch
    assert launcher.get_rank_and_world_size() == (0, 1) and os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setitem(os.environ, "RANK", "2")
    with pytest.raises(UsageError, match="RANK=2"):
        launcher.get_rank_and_world_size()


def test_more_ranks_than_gpus_prints_one_line(monkeypatch):
    monkeypatch.setattr(devices, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="^LOCAL_RANK=2 in the environment: this machine has 2 visible GPUs; use"):
        flag_checks.check_gpu_of_rank(2)


def test_ranks_end_with_a_torchrun_that_was_killed_while_they_started(tmp_path):
    """Kill torchrun before training starts; training/test_faults.py kills it during training."""
    flags = ["--config", "quickstart", "--save", tmp_path / "new", "--train-iters", "100000"]
    command = [*forked_commands.FRESH_TORCHRUN, "--nproc_per_node=2", ROOT / "pretrain_cream.py", *flags]
    command = ending_with_test(command)
    torchrun = subprocess.Popen(command, cwd=tmp_path)
    ranks = []
    while len(ranks) < 2 or not all(_ends_with_its_parent(rank) for rank in ranks):
        assert torchrun.poll() is None
        time.sleep(0.01)
        ranks = psutil.Process(torchrun.pid).children()
    time.sleep(2)  # after loading _ctypes a rank soon follows its parent, while its imports take longer
    torchrun.send_signal(signal.SIGKILL)
    torchrun.wait()
    _, left = psutil.wait_procs(ranks, timeout=300)
    for rank in left:
        rank.kill()
    assert not left and not (tmp_path / "new").exists()


def _ends_with_its_parent(rank: psutil.Process) -> bool:
    """Return whether the rank has loaded _ctypes, the only visible sign that it soon asks to end with its parent."""
    try:
        return any("_ctypes" in found.path for found in rank.memory_maps())
    except psutil.Error:
        return False
