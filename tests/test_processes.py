"""Processes end with the one that started them, and hear what ends them; tests/faults/one_process.py has more."""

import os
import signal
import subprocess
import sys

import pytest

from tests.faults.kill import launch, newest, ranks, wait_for
from tests.faults.one_process import check_nothing_is_left
from tests.launch import ROOT, write_documents

# The child asks for its parent's end when that is long past, as a worker may whose rank dies as it starts.
TOO_LATE = """
import os, time
from megatron_cream.distributed.launcher import end_with_parent
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.001)
    end_with_parent(parent={parent})
    print("alive")
"""

PEERS = """
import os, signal
from megatron_cream.distributed.launcher import waiting_for_peers
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: print("handled", flush=True))
with waiting_for_peers():
    {inside}
os.kill(os.getpid(), {number})
"""


def run(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("parent, said", [("parent", ""), ("None", "alive\n")])
def test_a_child_ends_with_a_parent_that_has_ended_before_it_asks(parent, said):
    """Its own look at its parent would come too late: that is process 1 by then, which lives on."""
    assert run(TOO_LATE.format(parent=parent)).stdout == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_rank_that_waits_for_others(number):
    """In C++, where no handler of Python's is run; the handlers are back afterwards."""
    inside = run(PEERS.format(inside=f"os.kill(os.getpid(), {int(number)})", number=int(number)))
    assert (inside.returncode, inside.stdout) == (-number, "")
    after = run(PEERS.format(inside="pass", number=int(number)))
    assert (after.returncode, after.stdout) == (0, "handled\n")


def test_a_killed_rank_leaves_no_process_behind(tmp_path):
    """The writer of --async-save and what belongs to it, workers, the other rank, and what they wait for."""
    documents, save = write_documents(tmp_path / "documents", documents=20), tmp_path / "run"
    flags = ["--save", save, "--load", save, "--save-interval", 2, "--num-workers", 1, "--async-save"]
    process = launch(documents, save, 100_000, tmp_path / "log", flags=flags)
    wait_for(lambda: newest(save) >= 2, process)
    ranks(process)[1].kill()
    assert process.wait(timeout=120) == 1
    check_nothing_is_left(save, patience=30)
