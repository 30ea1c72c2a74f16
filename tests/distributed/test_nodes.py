"""Tests of two nodes with one torchrun each: on loopback, in two network namespaces, and after losing a node."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_cream.checkpoint import start
from megatron_cream.common.errors import UsageError
from megatron_cream.distributed import nodes
from megatron_cream.training.summary import finished_message
from tests.bad_inputs import free_port
from tests.bad_inputs import start as fork
from tests.faults.kill import compare, newest, run_flags, wait_for
from tests.launch import ROOT, torchrun, write_documents
from tests.processes import ending_with_test

STEPS = 8


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("data") / "documents", documents=20)


@pytest.fixture(scope="module")
def one_node(documents, tmp_path_factory):
    """The checkpoint folder of a run of the same four ranks in one torchrun."""
    folder = tmp_path_factory.mktemp("one_node")
    done = torchrun(4, *flags(documents, folder / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def flags(documents: Path, save: Path, tp: int = 2) -> list:
    """Return the flags of a run with TP in a node and, across the nodes, DP 2 with the distributed optimizer."""
    return [*run_flags(documents, save, STEPS), "--tensor-model-parallel-size", tp]


def launch(log: Path, flags: list, options: list, prefix: tuple = (), cwd: Path = ROOT, **env) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, ROOT / "pretrain_cream.py", *flags]
    with open(log, "w") as out:
        return subprocess.Popen(
            ending_with_test(command),
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )


def node(port: int, first: bool, address: str = "127.0.0.1", ranks: int = 2) -> list:
    """Return torchrun's options for one of two nodes.

    is_host is given because on one machine both nodes would consider themselves the first.
    """
    found = [f"--rdzv_endpoint={address}:{port}", f"--rdzv_conf=is_host={int(first)}", "--rdzv_id=test"]
    return ["--nnodes=2", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", *found]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(processes: list[subprocess.Popen], logs: list[Path]) -> list[int]:
    try:
        return [process.wait(timeout=900) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("\n\n".join(log.read_text()[-3000:] for log in logs)) from None


def test_a_finished_run_started_again_does_nothing(tmp_path):
    """A job may be requeued when its run is complete; Megatron would fail on its data."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    (tmp_path / "iter_0000008").mkdir()
    folder = str(tmp_path)
    resumed = start.find_origin(start.StartFlags(load=folder, save=folder, ckpt_format="fsdp_dtensor"))
    args = Namespace(load=folder, skip_train=False, train_iters=8)
    message = f"step 8 of 8 is in {tmp_path}: nothing is left to train"
    assert finished_message(args, resumed) == message
    by_samples = dict(train_iters=None, train_samples=72, global_batch_size=9)
    assert finished_message(Namespace(**vars(args) | by_samples), resumed) == message
    for other in (dict(train_iters=9), dict(skip_train=True)):
        assert finished_message(Namespace(**vars(args) | other), resumed) is None
    for flags in (replace(resumed.flags, finetune=True), start.StartFlags()):
        assert finished_message(args, start.find_origin(flags)) is None


@pytest.fixture
def namespaces():
    """Command prefixes for two hosts, 10.99.0.1 and 10.99.0.2, joined by a virtual cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces are made by root with `ip` (Debian: iproute2)")
    names = [f"megatron-cream-{os.getpid()}-{i}" for i in range(2)]

    def ip(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        assert not ip(
            "link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "wire0", "netns", names[1]
        ).returncode
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.99.0.{i + 1}/24", "dev", "wire0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "wire0", "up")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_hosts_whose_names_do_not_resolve(documents, one_node, tmp_path, namespaces):
    """Each host resolves its own name to 127.0.0.1, so addresses and the network interface must be given."""
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    given = flags(documents, tmp_path / "run")
    processes = []
    for i, (log, prefix) in enumerate(zip(logs, namespaces, strict=True)):
        options = [*node(29500, first=i == 0, address="10.99.0.1"), f"--local_addr=10.99.0.{i + 1}"]
        processes.append(launch(log, given, options, prefix, GLOO_SOCKET_IFNAME="wire0"))
    assert ended(processes, logs) == [0, 0], logs[0].read_text()[-3000:]
    compare(one_node, tmp_path / "run", STEPS)


def test_a_lost_node_rejoins(documents, tmp_path, port):
    """Kill one torchrun with its ranks, and start it again as a cluster would. The other torchrun stays."""
    logs = [tmp_path / "0.log", tmp_path / "1.log", tmp_path / "1.again.log"]
    save = tmp_path / "run"

    def start(log: Path) -> subprocess.Popen:
        options = [*node(port, first=log is logs[0], ranks=1), "--max_restarts=3"]
        return launch(log, flags(documents, save, tp=1), options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    stays, lost = start(logs[0]), start(logs[1])
    wait_for(lambda: newest(save) >= 2, lost)
    victims = [*psutil.Process(lost.pid).children(), psutil.Process(lost.pid)]
    for victim in victims:
        victim.kill()
    lost.wait()
    before = newest(save)
    assert before < STEPS
    assert ended([stays, start(logs[2])], logs) == [0, 0], logs[0].read_text()[-3000:] + logs[2].read_text()[-3000:]
    done = torchrun(2, *flags(documents, tmp_path / "one_node", tp=1))
    assert done.returncode == 0, done.stderr[-3000:]
    compare(tmp_path / "one_node", save, STEPS)
    assert f"successfully loaded checkpoint from {save}" in "".join(log.read_text() for log in logs)


def test_restarts_on_several_nodes_need_a_store_that_is_new_each_time(monkeypatch):
    several = dict(
        RANK="0",
        WORLD_SIZE="4",
        GROUP_WORLD_SIZE="2",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_MAX_RESTARTS="3",
    )
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes"):
        with nodes.share_all_errors():
            pass


def test_ranks_of_another_launcher_check_shared_folders(tmp_path, monkeypatch):
    """mpirun and srun set no GROUP_WORLD_SIZE, so that the ranks may be on several nodes."""
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setattr(nodes, "_VISIBILITY_SECONDS", 0)

    def run(folder: str) -> list[tuple[int, str]]:
        def main() -> None:
            rank = int(os.environ["RANK"])
            try:
                nodes.check_shared({"--save": folder.format(rank)})
            except UsageError as error:
                sys.exit(str(error))

        port = free_port()
        waits = [fork(main, "rank", rank=rank, ranks=2, port=port) for rank in range(2)]
        return [(ended.code, ended.error) for ended in (wait() for wait in waits)]

    assert run(f"{tmp_path}/shared") == [(0, ""), (0, "")]
    assert [code for code, _ in run(f"{tmp_path}/of_rank_{{}}")] == [1, 1]
    assert not list((tmp_path / "shared").iterdir()) and not list((tmp_path / "of_rank_0").iterdir())


def test_a_file_missing_on_one_node_ends_the_job_on_all(documents, tmp_path, port):
    """Both nodes use the same relative paths in different folders: first the data, then --save is not shared."""
    folders = [tmp_path / "first", tmp_path / "second"]
    logs = [folder / "log" for folder in folders]
    for folder in folders:
        folder.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{documents}{suffix}", folders[0])
    given = flags(Path("documents"), Path("run"))

    def run() -> list[str]:
        options = [[*node(port, first=i == 0, ranks=1), "--max_restarts=0"] for i in range(2)]
        processes = [launch(log, given, each, cwd=log.parent) for log, each in zip(logs, options, strict=True)]
        assert ended(processes, logs) == [1, 1]
        said = [line for log in logs for line in log.read_text().splitlines() if "pretrain_cream.py: error:" in line]
        assert not any("[rank" in log.read_text() for log in logs), "a rank's traceback"
        return said

    host = socket.gethostname()
    (said,) = run()
    assert "error: --data-path documents: " in said and said.endswith(f"(on {host})")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{documents}{suffix}", folders[1])
    (said,) = run()
    assert f"error: --save run: {host} does not see the files that the first node writes there" in said
    assert not list(folders[0].glob("run/*"))
