"""benchmarks/stopping.py: a stopped benchmark ends its processes."""

import signal
import subprocess
import sys
import time

import psutil

from tests.launch import ROOT

PARENT = """
import subprocess, sys
from benchmarks.stopping import leave_no_ranks
leave_no_ranks()
launcher = "import subprocess; subprocess.run(['sleep', '600'], start_new_session=True)"
subprocess.run([sys.executable, "-c", launcher], start_new_session=True)
"""


def test_a_stopped_benchmark_leaves_no_process():
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT)
    started = []
    while not any(child.name() == "sleep" for child in started):
        assert process.poll() is None
        time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
    _, left = psutil.wait_procs(started, timeout=300)
    assert not left
