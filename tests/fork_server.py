"""The process whose forks run the commands of tests/forked_commands.py.

It imports everything, and forks for each command; torch's own launcher forks the ranks. What a fork cannot take from
here it runs afresh: another script than one of the project's, or an environment that matters while a module is
imported.
"""

import argparse
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # until everything is imported: collections take a quarter of that time and find nothing

from megatron_cream.common.processes import end_with_parent
from megatron_cream.patches import platform
from tests import help_texts
from tests.processes import ROOT

platform.setup()  # here: a process that a rank spawns imports this module, as that of the rank

JOB = ROOT / "pretrain_cream.py"
READ_AT_IMPORT = {
    *("HF_HOME", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"),
    *("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME", "OMP_NUM_THREADS", "TRITON_INTERPRET"),
}

IMPORTED_LATE = (
    "megatron.core.datasets.helpers_cpp",
    "megatron.core.models.mimo.optimizer",
    "megatron.core.tokenizers.text.libraries",
    "megatron_cream.model.kernels.swiglu",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)


def main(listening: int) -> None:
    """Answer what connects to the socket `listening`, a file descriptor."""
    _import_all()
    server = socket.socket(fileno=listening)
    server.set_inheritable(False)
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


def _import_all() -> None:
    """Import what ranks and commands import, so that forks need not."""
    import torch
    import torch._dynamo  # an optimizer imports it
    import torch.utils.tensorboard
    from megatron.training.arguments import add_megatron_arguments

    import pretrain_cream  # noqa: F401

    for name in ("convert", "evaluate", "plan", "plot_positions", "preprocess"):
        importlib.import_module(f"megatron_cream.commands.{name}")
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    help_texts.read_once()
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    torch.set_num_threads(1)  # a fork does not inherit a pool's threads
    gc.freeze()  # all that stays alive: a collection in a fork would copy it
    gc.enable()


def _answer(connection: socket.socket) -> None:
    """Run one command in a fork, and send its exit code. If the sender is killed, the command ends."""
    text, files, _, _ = socket.recv_fds(connection, 1 << 18, 3)
    own, process = os.getpid(), os.fork()
    if process == 0:
        end_with_parent(parent=own)
        connection.close()
        _run(files, **json.loads(text))
    if connection in select.select([os.pidfd_open(process), connection], [], [])[0]:
        return
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    connection.send(str(code if code >= 0 else 128 - code).encode())


def _run(files: list[int], words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Turn this fork into the process of the command."""
    for fd, file in enumerate(files):
        os.dup2(file, fd)
        os.close(file)
    os.chdir(folder)
    started_with = _read_initial_environment()
    known = _read_at_import(started_with) == _read_at_import(environment)
    known &= _python_path(environment) <= _python_path(started_with)
    set_by_imports = {name: value for name, value in os.environ.items() if name not in started_with}
    os.environ.clear()
    os.environ |= set_by_imports | environment
    is_script = words[0] == "torchrun" or words[1].endswith(".py")
    if not known or not (is_script or words[1] == "-c"):
        for name in set_by_imports.keys() - environment.keys():
            del os.environ[name]
        module = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
        os.execv(sys.executable, [sys.executable, *module, *words[1:]])
    sys.stdin, sys.stdout = (open(fd, mode, closefd=False) for fd, mode in enumerate("rw"))
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    _exit(_run_ranks if words[0] == "torchrun" else _run_script if is_script else _run_code, words[1:])


def _read_initial_environment() -> dict[str, str]:
    """Return the variables that the server was started with."""
    lines = Path("/proc/self/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(line.split("=", 1) for line in lines if line)


def _read_at_import(environment) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name in READ_AT_IMPORT}


def _python_path(environment) -> set[str]:
    return set(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))


def _exit(function, words: list[str]) -> None:
    """Call the function, and end this process as Python does."""
    code: object = None
    try:
        function(words)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def _run_script(words: list[str]) -> None:
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")


def _run_code(words: list[str]) -> None:
    sys.argv = ["-c", *words[2:]]
    sys.path.insert(0, "")
    exec(words[1], {"__name__": "__main__"})


def _run_ranks(words: list[str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    run.run_script_path = _run_rank
    try:
        run.main(["--start-method=fork", "--run-path", *words])
    except ChildFailedError as error:
        sys.exit(str(error))


def _run_rank(script: str, *words: str) -> None:
    import torch

    import pretrain_cream

    end_with_parent()
    # A fork recreates torch's thread pool on first use. Do it here, before several autograd threads do it at once.
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    if Path(script).resolve() != JOB:
        return _run_script([script, *words])
    sys.argv = [script, *words]
    if code := pretrain_cream.main():
        sys.exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
