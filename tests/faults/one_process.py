"""Kill or signal one random process of a training, repeatedly; no launch may leave a process behind.

    python tests/faults/one_process.py FOLDER [--signals 30] [--seed 0] [--steps 60]

Two ranks over gloo run with --async-save, two data loader workers each and a --save-hook. The processes are torchrun,
ranks, workers, checkpoint writers, the servers of their queues, resource trackers and hooks. In each launch one of them
gets one signal at a random moment. The launch must end by itself or complete the run, without a rank's traceback.
Within --patience seconds of torchrun's end, its processes and all files in /dev/shm (private, as root) must be gone.
The last checkpoint must be bit-identical to that of an undisturbed run.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from tests.faults.kill import _OF, compare, launch, newest, wait_for
from tests.launch import write_documents

SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--signals", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--patience", type=float, default=60.0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    own_shared_memory()
    rng, met = random.Random(args.seed), Counter()
    documents = write_documents(args.folder / "documents", documents=20)
    alone, told = args.folder / "alone", args.folder / "told"

    def start(save: Path, log: Path) -> subprocess.Popen:
        flags = ["--save", save, "--load", save, "--save-interval", 2, "--async-save", "--num-workers", 2]
        return launch(documents, save, args.steps, log, flags=[*flags, "--save-hook", "bash -c 'sleep 0.5'"])

    began = time.monotonic()
    assert start(alone, args.folder / "alone.log").wait() == 0, (args.folder / "alone.log").read_text()[-3000:]
    whole = time.monotonic() - began
    check_nothing_is_left(alone, args.patience)
    print(f"left alone: {whole:.1f} s", flush=True)

    starts = 0
    while met.total() < args.signals:
        before, log, starts = newest(told), args.folder / f"told.{starts}.log", starts + 1
        if before >= args.steps:  # the run is complete: start a new one
            compare(alone, told, args.steps)
            shutil.rmtree(told)
            before = 0
        process = start(told, log)
        if rng.random() < 0.7:  # otherwise at any time, mostly during the start
            step = rng.randrange(before, args.steps)
            wait_for(lambda step=step: newest(told) >= step, process)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(0, whole))
        found = {}
        for one in processes(told):  # choose a kind first, as there are more workers than ranks
            found.setdefault(kind(one), []).append(one)
        if process.poll() is None and found:
            name, number = rng.choice(sorted(found)), rng.choice(SIGNALS)
            try:
                rng.choice(found[name]).send_signal(number)
                met[name] += 1
            except psutil.NoSuchProcess:
                pass
        else:
            name, number = "nothing", signal.SIGKILL
        code = process.wait(timeout=args.patience + whole)
        took = check_nothing_is_left(told, args.patience)
        print(
            f"{starts}: {number.name} to {name}: exit code {code}, step {newest(told)} (was {before}), all gone after "
            f"{took:.1f} s",
            flush=True,
        )
        words = log.read_text()
        # A restarted resource tracker of Python prints a traceback for each resource of the killed one.
        fine = name == "tracker" or words.count("Traceback") <= 1
        assert "[rank" not in words and fine, f"a traceback but torchrun's: {log}"
        assert newest(told) >= before, log
    if newest(told) < args.steps:
        assert start(told, args.folder / "told.last.log").wait() == 0
    compare(alone, told, args.steps)
    print(f"bit-equal after {dict(met)}")
    return 0


def own_shared_memory() -> None:
    """As root, restart this program with a private /dev/shm."""
    if os.geteuid() == 0 and "OWN_SHARED_MEMORY" not in os.environ:
        os.environ["OWN_SHARED_MEMORY"] = "1"
        mount = 'mount -t tmpfs none /dev/shm && exec "$@"'
        os.execvp("unshare", ["unshare", "--mount", "bash", "-c", mount, "bash", sys.executable, *sys.argv])


def processes(save: Path) -> list[psutil.Process]:
    """Return all running processes of a launch, including hooks."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_OF) == str(save) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def kind(process: psutil.Process) -> str:
    try:
        words, parent = " ".join(process.cmdline()), " ".join(process.parent().cmdline())
    except (psutil.Error, AttributeError):
        return "gone"
    for name, sign in {"writer": "spawn_main", "tracker": "resource_tracker", "fork server": "forkserver"}.items():
        if sign in words:
            return name
    if "pretrain_cream.py" not in words:
        return "hook"
    if "torch.distributed.run" in words:
        return "torchrun"
    return "rank" if "torch.distributed.run" in parent else "worker or queue"


def check_nothing_is_left(save: Path, patience: float) -> float:
    """Wait until no process and no shared memory is left, and return the seconds it took.

    Raises:
        AssertionError: something is left after `patience` seconds.
    """
    began = time.monotonic()
    while left := [f"{p.pid} {kind(p)}" for p in processes(save)] + shared_memory():
        assert time.monotonic() - began < patience, left
        time.sleep(0.1)
    return time.monotonic() - began


def shared_memory() -> list[str]:
    return os.listdir("/dev/shm") if "OWN_SHARED_MEMORY" in os.environ else []


if __name__ == "__main__":
    sys.exit(main())
