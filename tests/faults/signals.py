"""Signal a training at random moments, restart it each time, and compare the result with an undisturbed run.

    python tests/faults/signals.py FOLDER [--signals 20] [--seed 0] [--steps 40]

Two ranks over gloo use the distributed optimizer, save a checkpoint every second step, and export with --save-hf at the
end. Each launch gets SIGTERM, SIGUSR1 or SIGINT, once or twice in a row. The signal goes to the launcher, to one rank,
or to all processes as from a terminal or Slurm, at any time from the start to the last write, including the imports and
the export. Each launch must end by itself within --patience seconds, without a rank's traceback once the ranks have
started, and lose no checkpoint.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from megatron_cream.checkpoint.output import check_manifest
from tests.faults.kill import compare, launch, newest, ranks, ranks_of_folder, wait_for_no_helper, writing
from tests.launch import write_documents

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--patience", type=float, default=60.0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    documents = write_documents(args.folder / "documents", documents=20)
    alone, told, exported = (args.folder / name for name in ("alone", "told", "hf"))

    def start(save: Path, log: Path) -> subprocess.Popen:
        flags = ["--save", save, "--load", save, "--save-interval", 2, "--save-hf", exported]
        return launch(documents, save, args.steps, log, flags=flags)

    started = time.monotonic()
    assert start(alone, args.folder / "alone.log").wait() == 0
    whole = time.monotonic() - started
    print(f"left alone: {whole:.1f} s", flush=True)
    wanted = (exported / "model.safetensors").read_bytes()
    shutil.rmtree(exported)

    sent = starts = 0
    while sent < args.signals:
        before, log, starts = newest(told), args.folder / f"told.{starts}.log", starts + 1
        process = start(told, log)
        time.sleep(rng.uniform(0, whole))
        if process.poll() is None:
            number, to, times = rng.choice(SIGNALS), rng.choice(["launcher", "rank", "all"]), rng.choice([1, 1, 2])
            place = "saving" if writing(told, newest(told)) else "exporting" if newest(told) == args.steps else "else"
            for _ in range(times):
                send(process, number, to, rng)
                time.sleep(rng.uniform(0, 0.5))
            asked = time.monotonic()
            try:
                code = process.wait(timeout=args.patience)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still there {args.patience} s after {number.name} to {to}: {log}") from None
            sent += 1
            took, now = time.monotonic() - asked, newest(told)
            print(
                f"{starts}: {number.name} x {times} to {to} ({place}): exit code {code} after {took:.1f} s, "
                f"step {now} (was {before})",
                flush=True,
            )
        else:
            print(f"{starts}: at its end before the signal", flush=True)
        for rest in ranks_of_folder(told):
            rest.kill()
        wait_for_no_helper(told)
        words = log.read_text()
        assert newest(told) >= before, log
        assert "[rank" not in words, f"a rank's traceback: {log}"
        assert not exported.exists() or not check_manifest(exported), f"half an export: {log}"
        if newest(told) == args.steps and exported.exists():
            compare(alone, told, args.steps)
            assert (exported / "model.safetensors").read_bytes() == wanted
            shutil.rmtree(told)
            shutil.rmtree(exported)
    assert start(told, args.folder / "told.last.log").wait() == 0
    compare(alone, told, args.steps)
    assert (exported / "model.safetensors").read_bytes() == wanted
    print(f"bit-equal after {sent} signals")
    return 0


def send(process: subprocess.Popen, number: signal.Signals, to: str, rng: random.Random) -> None:
    try:
        launcher = psutil.Process(process.pid)
        running = ranks(process)
        if to == "all":
            os.killpg(process.pid, number)  # torchrun's ranks have their own sessions
        victims = [launcher] if to == "launcher" or not running else running if to == "all" else [rng.choice(running)]
        for victim in victims:
            victim.send_signal(number)
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass  # the process has just ended


if __name__ == "__main__":
    sys.exit(main())
