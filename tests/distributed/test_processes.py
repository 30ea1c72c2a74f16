"""Tests that processes end with their parent and react to signals; tests/faults/one_process.py has more."""

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.faults.kill import launch, newest, ranks, wait_for
from tests.faults.one_process import check_nothing_is_left
from tests.launch import ROOT, write_documents

# The child asks to end with its parent when the parent has already ended, like a worker whose rank dies at its start.
TOO_LATE = """
import os, time
from megatron_cream.common.processes import end_with_parent
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

# The second request exceeds the pipe's buffer: a small one would not block without a reader.
WRITER = """
import os, signal
from functools import partial
from megatron_cream.patches import platform
platform.setup()
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, PersistentAsyncCaller
from megatron_cream.patches import async_writer

if __name__ == "__main__":
    async_writer.install()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    killed_while_it_takes_the_tensors, killed_as_it_starts = PersistentAsyncCaller(), PersistentAsyncCaller()
    die = partial(signal.raise_signal, signal.SIGKILL)
    killed_while_it_takes_the_tensors.schedule_async_call(AsyncRequest(print, ("written",), [], preload_fn=die))
    killed_while_it_takes_the_tensors.close()
    print("closed", flush=True)
    killed_as_it_starts.schedule_async_call(AsyncRequest(print, (bytes(1_000_000),), []))
    killed_as_it_starts.process.kill()
    killed_as_it_starts.close()
    print("closed", flush=True)
"""


def run(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("parent, said", [("parent", ""), ("None", "alive\n")])
def test_a_child_ends_when_its_parent_ended_first(parent, said):
    """Without the given parent the child would see process 1 as its parent, and live on."""
    assert run(TOO_LATE.format(parent=parent)).stdout == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_rank_that_waits_for_others(number):
    """It waits in C++, where Python's handlers do not run; they are restored afterwards."""
    inside = run(PEERS.format(inside=f"os.kill(os.getpid(), {int(number)})", number=int(number)))
    assert (inside.returncode, inside.stdout) == (-number, "")
    after = run(PEERS.format(inside="pass", number=int(number)))
    assert (after.returncode, after.stdout) == (0, "handled\n")


def test_a_rank_does_not_wait_for_a_checkpoint_writer_that_was_killed(tmp_path):
    """Megatron waits forever: for the writer to take the tensors, and at the end for a queue that nobody reads."""
    script = tmp_path / "script.py"
    script.write_text(WRITER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "closed\n" * 2)


STARTS = """
import os, signal, subprocess
from tests.processes import ending_with_test
started = subprocess.Popen(ending_with_test(["sleep", 600]), stdout=subprocess.DEVNULL, start_new_session=True)
print(started.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_of_a_test_ends_with_it():
    """A process in its own session gets neither Ctrl-C nor the signal that ends the test process."""
    started = int(run(STARTS).stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(started).wait(timeout=300)


def test_a_killed_rank_leaves_no_process_behind(tmp_path):
    """The --async-save writer with its helpers, the data loader workers and the other rank all end."""
    documents, save = write_documents(tmp_path / "documents", documents=20), tmp_path / "run"
    flags = ["--save", save, "--load", save, "--save-interval", 2, "--num-workers", 1, "--async-save"]
    process = launch(documents, save, 100_000, tmp_path / "log", flags=flags)
    wait_for(lambda: newest(save) >= 2, process)
    ranks(process)[1].kill()
    assert process.wait(timeout=300) == 1
    check_nothing_is_left(save, patience=30)


def test_a_killed_result_server_loses_one_checkpoint_at_most(tmp_path):
    """Kill the process that passes on the answers of one rank's --async-save writer; the peer rank must not hang."""
    documents, save = write_documents(tmp_path / "documents", documents=20), tmp_path / "run"
    flags = ["--save", save, "--load", save, "--save-interval", 2, "--async-save"]
    process = launch(documents, save, 20, tmp_path / "log", flags=flags)
    wait_for(lambda: newest(save) >= 2, process)
    (keeper,) = (p for p in ranks(process)[0].children() if "pretrain_cream.py" in " ".join(p.cmdline()))
    keeper.kill()
    assert process.wait(timeout=300) == 0 and newest(save) == 20
    words = (tmp_path / "log").read_text()
    assert words.count("warning: no checkpoint of step") <= 1 and "Traceback" not in words, words[-3000:]
