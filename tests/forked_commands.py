"""Run `python SCRIPT` and `torchrun SCRIPT` in forks of a process that has imported everything.

Importing Megatron, torch and transformers takes five seconds of CPU time per process. `programs` is a folder with a
`python` and a `torchrun` that send their command line, folder, environment and open files to the server, which forks
(tests/fork_server.py). pytest's workers share one server. tests/end_to_end runs commands in fresh processes. Not for
machines with a GPU: CUDA cannot be used in a forked process.
"""

import atexit
import functools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.processes import ROOT, ending_with_test

FRESH_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
"""The first words of a command that runs a script on several ranks, each in a process that is not forked."""

_SHARED = "TEST_PROGRAMS"  # environment variable: the folder of the programs that pytest's workers share

_SHIM = """#!{python} -IS
import json, os, socket, sys

server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
words = dict(words=["{name}", *sys.argv[1:]], folder=os.getcwd(), environment=dict(os.environ))
socket.send_fds(server, [json.dumps(words).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or 1))
"""

_SERVE_WHEN_CONNECTED = """
import os, select, sys
select.select([int(sys.argv[1])], [], [])
os.execv(sys.executable, [sys.executable, "-m", "tests.fork_server", sys.argv[1]])
"""


def python() -> list[str]:
    """Return the first words of a command that runs a script of the project."""
    return [sys.executable] if _has_cuda() else [str(_programs() / "python")]


def torchrun() -> list[str]:
    """Return the first words of a command that runs a script on several ranks of this machine."""
    return FRESH_TORCHRUN if _has_cuda() else [str(_programs() / "torchrun"), "--standalone"]


def _has_cuda() -> bool:
    from megatron_cream.common import devices

    return devices.has_cuda()


def share() -> None:
    """Let the processes that this one starts use one server. It ends with this process."""
    os.environ[_SHARED] = str(_programs())


@functools.cache
def _programs() -> Path:
    if shared := os.environ.get(_SHARED):
        return Path(shared)
    folder = tempfile.TemporaryDirectory(prefix="programs")
    atexit.register(folder.cleanup)
    return shims(Path(folder.name) / "bin", environment())


def environment() -> dict[str, str]:
    """Return the environment in which a command finds the package."""
    path = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}  # a model in this process sets them
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def shims(folder: Path, environment: dict[str, str]) -> Path:
    """Return the folder with `python` and `torchrun`. Their server ends with this process.

    The server imports everything when the first command comes, which waits for it.
    """
    folder.mkdir()
    address = str(folder / "socket")
    for name in ("python", "torchrun"):
        shim = folder / name
        shim.write_text(_SHIM.format(python=sys.executable, address=address, name=name))
        shim.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        command = ending_with_test([sys.executable, "-ISc", _SERVE_WHEN_CONNECTED, server.fileno()])
        subprocess.Popen(command, pass_fds=[server.fileno()], cwd=ROOT, env=environment)
    return folder
