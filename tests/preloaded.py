"""Launch pretrain_cream.py, or a script around it, from a process that has imported everything. launch.py starts it.

Importing Megatron, torch and transformers takes ten seconds of CPU time per rank. Here torch's elastic launcher, which
torchrun also uses, forks the ranks from this process instead of starting Python again. This works only on machines
without a GPU: CUDA cannot be used in a forked process. The process reads one job per line (JSON: ranks, script, flags,
cwd, environment, out, error) and prints the id of the process that runs it, then its exit code.
"""

import json
import os
import runpy
import sys
import traceback
import uuid
from pathlib import Path

from megatron_cream.common.processes import end_with_parent
from megatron_cream.patches import platform

platform.setup()

JOB = Path(__file__).resolve().parents[1] / "pretrain_cream.py"


def import_all() -> None:
    """Import what ranks and commands import, so that forks need not."""
    import torch
    import torch.utils.tensorboard
    import transformers.models.llama.modeling_llama  # noqa: F401  (imported late by some runs)

    import pretrain_cream  # noqa: F401

    torch.set_num_threads(1)  # a fork does not inherit a pool's threads


def main() -> None:
    import_all()
    for line in sys.stdin:
        job = json.loads(line)
        server, process = os.getpid(), os.fork()
        if process == 0:
            end_with_parent(parent=server)
            _launch(job)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def launch_ranks(ranks: int, script: str, flags: list[str]) -> int:
    """Fork the ranks as torchrun starts them, and return the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, _rank)(script, flags)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _launch(job: dict) -> None:
    code = 1
    try:
        os.setsid()
        for fd, path in enumerate((os.devnull, job["out"], job["error"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
        os.chdir(job["cwd"])
        os.environ |= job["environment"]
        code = launch_ranks(job["ranks"], job["script"], job["flags"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(script: str, flags: list[str]) -> None:
    import torch

    import pretrain_cream

    end_with_parent()
    # A fork recreates torch's thread pool on first use. Do it here, before several autograd threads do it at once.
    torch.set_num_threads(1)
    sys.argv = [script, *flags]
    if Path(script).resolve() != JOB:
        runpy.run_path(script, run_name="__main__")
    elif code := pretrain_cream.main():
        sys.exit(code)


if __name__ == "__main__":
    main()
