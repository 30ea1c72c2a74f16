"""Run `python SCRIPT` and `torchrun SCRIPT` of a shell block in forks of a process that has imported everything.

Importing Megatron, torch and transformers takes six seconds of CPU time per process. `shims` writes a `python` and a
`torchrun` into a folder for the front of PATH. Each sends its command line, folder, environment and open files to this
process, which forks. tests/end_to_end runs the same commands in fresh processes. Not for machines with a GPU: CUDA
cannot be used in a forked process.
"""

import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from megatron_cream.common.processes import end_with_parent
from megatron_cream.patches import platform
from tests.preloaded import import_all, launch_ranks
from tests.processes import ROOT, ending_with_test

_SHIM = """#!{python} -IS
import json, os, socket, sys

server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
words = dict(words=["{name}", *sys.argv[1:]], folder=os.getcwd(), environment=dict(os.environ))
socket.send_fds(server, [json.dumps(words).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or 1))
"""


def shims(folder: Path, environment: dict[str, str]) -> Path:
    """Start the server, which ends with this process, and return the folder with `python` and `torchrun`."""
    folder.mkdir()
    address = str(folder / "socket")
    for name in ("python", "torchrun"):
        shim = folder / name
        shim.write_text(_SHIM.format(python=sys.executable, address=address, name=name))
        shim.chmod(0o755)
    command = ending_with_test([sys.executable, "-m", "tests.forked_commands", address])
    server = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    assert server.stdout.readline() == b"ready\n"
    return folder


def main(address: str) -> None:
    platform.setup()
    import_all()
    for name in ("convert", "evaluate", "plan", "plot_positions", "preprocess"):
        importlib.import_module(f"megatron_cream.commands.{name}")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(address)
    server.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    own = os.getpid()
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end_with_parent(parent=own)
            server.close()
            _answer(connection)
            os._exit(0)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Run one command in a fork, and send its exit code."""
    text, files, _, _ = socket.recv_fds(connection, 1 << 18, 3)
    own, process = os.getpid(), os.fork()
    if process == 0:
        end_with_parent(parent=own)
        connection.close()
        _run(files, **json.loads(text))
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    connection.send(str(code if code >= 0 else 128 - code).encode())


def _run(files: list[int], words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Turn this fork into the process of the command."""
    code: object = 1
    try:
        for fd, file in enumerate(files):
            os.dup2(file, fd)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ |= environment
        sys.stdin, sys.stdout, sys.stderr = (open(fd, "r" if fd == 0 else "w", closefd=False) for fd in range(3))
        launch = re.match(r"torchrun (?:--standalone )?--nproc_per_node=(\d+) (\S+\.py)", " ".join(words))
        if launch:
            code = launch_ranks(int(launch[1]), launch[2], words[words.index(launch[2]) + 1 :])
        elif words[0] == "python" and words[1].endswith(".py"):
            sys.argv = words[1:]
            sys.path[0] = str(Path(words[1]).resolve().parent)
            runpy.run_path(words[1], run_name="__main__")
            code = 0
        else:
            module = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
            os.execv(sys.executable, [sys.executable, *module, *words[1:]])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main(sys.argv[1])
