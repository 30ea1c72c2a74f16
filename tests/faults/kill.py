"""Kill a training repeatedly, restart it each time, and compare the result with an undisturbed run.

    python tests/faults/kill.py FOLDER [--kills 30] [--seed 0] [--steps 40] [--torchrun]

Two data-parallel ranks over gloo use the distributed optimizer and save a checkpoint every second step. Each kill is a
SIGKILL of one rank, or of the launcher and all its ranks, at a random moment: some time after the start, or while a
checkpoint is being written. At the end every tensor of the two runs' last checkpoints, weights and optimizer, must be
bit-identical. With --torchrun, `torchrun --max-restarts` restarts the ranks, without --load.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_cream.patches import platform

platform.setup()

import psutil
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.forked_commands import FRESH_TORCHRUN
from tests.launch import TINY, torchrun, write_documents
from tests.processes import ending_with_test

_OF = "TEST_RUN_OF"  # environment variable of a launch's processes: its --save
TRACKER = "latest_checkpointed_iteration.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--torchrun", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    how = kill_under_torchrun if args.torchrun else kill
    how(args.folder, kills=args.kills, seed=args.seed, steps=args.steps)
    return 0


def kill(folder: Path, *, kills: int, seed: int, steps: int) -> dict[str, int]:
    """Kill launches at random, and return how many kills hit a start, a training and a checkpoint.

    Raises:
        AssertionError: a launch did not resume, or the results differ.
    """
    rng = random.Random(seed)
    documents = write_documents(folder / "documents", documents=20)
    alone, killed = folder / "alone", folder / "killed"
    started = time.monotonic()
    process = launch(documents, alone, steps, folder / "alone.log")
    assert process.wait() == 0, (folder / "alone.log").read_text()[-3000:]
    whole = time.monotonic() - started
    print(f"left alone: {whole:.1f} s", flush=True)

    met = dict.fromkeys(("start", "training", "checkpoint"), 0)
    i = -1
    while sum(met.values()) < kills:
        i += 1
        before = newest(killed)
        if before >= steps:  # the run is complete: start a new one
            compare(alone, killed, steps)
            shutil.rmtree(killed)
            before = 0
        log = folder / f"killed.{i}.log"
        process = launch(documents, killed, steps, log)
        how = rng.choice(["rank", "all"])
        if rng.random() < 0.5:
            known = before + 2 * rng.randrange(4)
            wait_for(lambda: newest(killed) >= known and writing(killed, known), process)
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, whole))
        if process.poll() is not None:
            assert process.returncode == 0 and newest(killed) == steps, log.read_text()[-3000:]
            print(f"{i}: at its end before the kill", flush=True)
            continue
        place = "checkpoint" if writing(killed, newest(killed)) else "training" if newest(killed) > before else "start"
        victims = ranks(process) or [psutil.Process(process.pid)]
        for victim in [rng.choice(victims)] if how == "rank" else [psutil.Process(process.pid), *victims]:
            victim.send_signal(signal.SIGKILL)
        process.wait()
        for rest in ranks_of_folder(killed):
            rest.kill()
        wait_for_no_helper(killed)
        met[place] += 1
        print(f"{i}: killed {how} at {place}; newest checkpoint {newest(killed)} (was {before})", flush=True)
        assert newest(killed) >= before
    process = launch(documents, killed, steps, folder / "killed.last.log")
    assert process.wait() == 0, (folder / "killed.last.log").read_text()[-3000:]
    compare(alone, killed, steps)
    print(f"bit-equal after {sum(met.values())} kills: {met}")
    return met


def kill_under_torchrun(folder: Path, *, kills: int, seed: int, steps: int) -> None:
    """Kill ranks of one launch, each after a new checkpoint, while torchrun restarts all ranks.

    Raises:
        AssertionError: the launch failed, or its result differs from an undisturbed run.
    """
    rng = random.Random(seed)
    documents = write_documents(folder / "documents", documents=20)
    alone, killed, log = folder / "alone", folder / "killed", folder / "killed.log"
    run_undisturbed(documents, alone, steps)
    flags = ["--save", killed, "--save-interval", 2]
    process = launch(documents, killed, steps, log, f"--max-restarts={kills}", flags=flags)
    for i in range(kills):
        before = newest(killed)
        most = max(before + 1, steps - 2 * (kills - i))
        wait_for(lambda: newest(killed) >= min(most, before + 2), process)
        time.sleep(rng.uniform(0, 0.3))
        running = ranks(process)
        rng.choice(running).send_signal(signal.SIGKILL)
        print(f"{i}: killed after {newest(killed)} (was {before})", flush=True)
        psutil.wait_procs(running, timeout=60)
    assert process.wait() == 0, log.read_text()[-3000:]
    starts = list((killed / "runs").iterdir())
    assert len(starts) == kills + 1, starts
    compare(alone, killed, steps)
    print(f"bit-equal after {kills} kills")


def launch(
    documents: Path,
    save: Path,
    steps: int,
    log: Path,
    *options,
    flags: list | None = None,
    script: tuple = (ROOT / "pretrain_cream.py",),
    ranks: int = 2,
) -> subprocess.Popen:
    """Start a training with two ranks, or with `ranks`.

    Args:
        options: options of torchrun.
        flags: flags that replace --save, --load and --save-interval.
    """
    command = [*FRESH_TORCHRUN, f"--nproc_per_node={ranks}", *options]
    command += [*script, *run_flags(documents, save, steps, flags)]
    with open(log, "w") as out:
        return subprocess.Popen(
            ending_with_test(command),
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", _OF: str(save)},
        )


def run_flags(documents: Path, save: Path | str, steps: int, flags: list | None = None) -> list:
    """Return the flags of a small run that saves and resumes; `flags` replace those of --save."""
    saving = ["--save", save, "--load", save, "--save-interval", 2] if flags is None else flags
    schedule = ["--train-iters", steps, "--lr-decay-iters", steps]
    return [
        *TINY,
        "--fp32",
        "--data-path",
        documents,
        "--split",
        "90,10,0",
        "--use-distributed-optimizer",
        *schedule,
        *saving,
    ]


def run_undisturbed(documents: Path, save: Path, steps: int) -> str:
    """Run the training of `launch` to its end, and return its output."""
    done = torchrun(2, *run_flags(documents, save, steps))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def newest(save: Path) -> int:
    """Return the step that a launch would resume from; 0 without a checkpoint."""
    tracker = save / TRACKER
    return int(tracker.read_text()) if tracker.is_file() else 0


def writing(save: Path, known: int) -> bool:
    """Return whether there is a checkpoint folder after `known` that the tracker does not name yet."""
    steps = [int(path.name.removeprefix("iter_")) for path in save.glob("iter_*")] if save.is_dir() else []
    return any(step > max(known, newest(save)) for step in steps)


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def ranks(launcher: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children()
    return [child for child in children if "pretrain_cream.py" in " ".join(child.cmdline())]


def ranks_of_folder(save: Path) -> list[psutil.Process]:
    """Return the remaining ranks of a launch: a rank may outlive its killed launcher for a moment."""
    left = []
    for process in psutil.process_iter(["cmdline"]):
        if str(save) in (process.info["cmdline"] or []) and process.pid != os.getpid():
            left.append(process)
    return left


def wait_for_no_helper(save: Path, seconds: float = 60.0) -> None:
    """Wait until all checkpoint helper processes of the launches into `save` have ended with their ranks."""
    deadline = time.monotonic() + seconds
    while left := [p for p in psutil.process_iter(["cmdline", "ppid", "environ"]) if _helper_of_nobody(p, save)]:
        assert time.monotonic() < deadline, [p.info["cmdline"] for p in left]
        time.sleep(0.2)


def _helper_of_nobody(process: psutil.Process, save: Path) -> bool:
    helper = process.info["ppid"] == 1 and "multiprocessing.spawn" in " ".join(process.info["cmdline"] or [])
    return helper and (process.info["environ"] or {}).get(_OF) == str(save)


def compare(one: Path, other: Path, steps: int) -> None:
    """Check that all tensors of both runs' checkpoints at `steps` are bit-identical."""
    first, second = (tensors(path / f"iter_{steps:07d}") for path in (one, other))
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        same = torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        assert same, f"{name} differs"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = dcp.FileSystemReader(folder)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name: tensor.reshape(-1) for name, tensor in state.items()}


if __name__ == "__main__":
    sys.exit(main())
