"""Run jobs of examples/slurm/train.sbatch under a real Slurm, and compare each with an undisturbed run.

    python tests/slurm/jobs.py FOLDER [JOB ...]        (as root; Debian: apt-get install munge slurm-wlm)

Two nodes with one rank each use gloo and the distributed optimizer. Jobs are stopped by `scancel --signal=USR1`, by the
signal before the time limit, and by a job of a preempting partition (SIGTERM at the start of the grace time), each also
with --async-save. Other jobs are an array of two seeds, and a failing and a cancelled job, which must not be requeued.
By default all jobs run.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.kill import compare, newest, run_flags
from tests.launch import write_documents
from tests.slurm.cluster import Slurm, slurm

STEPS, LONG = 16, 150


def preempt(cluster: Slurm, job: int, save: Path) -> int:
    """Stop a job as soon as it has a checkpoint, wait until it is requeued, and return its saved step."""
    wait_for_checkpoint(cluster, job, save)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(job, "PENDING")
    return newest(save)


def wait_for_checkpoint(cluster: Slurm, job: int, save: Path, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while newest(save) < 2:
        assert time.monotonic() < deadline, cluster.log(job)[-3000:]
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    stops = {
        "-".join([told.__name__, *(flag.strip("-") for flag in more)]): (told, more)
        for more in ([], ["--async-save"])
        for told in (by_signal, by_time_limit, by_preemption)
    }
    others = {job.__name__: job for job in (array, cancelled, failed)}
    parser.add_argument("jobs", nargs="*", metavar="JOB", default=[*stops, *others], help=", ".join([*stops, *others]))
    args = parser.parse_args()
    if unknown := set(args.jobs) - stops.keys() - others.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such job")
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    documents = write_documents(folder / "documents", documents=20)
    (folder / "slurm").mkdir()
    with slurm(folder / "slurm") as cluster:
        alone, chosen = folder / "alone", [name for name in stops if name in args.jobs]
        if chosen:
            cluster.wait(cluster.train(*run_flags(documents, alone, LONG)))
            print("left alone: done", flush=True)
        for name in chosen:
            told, more = stops[name]
            told(cluster, documents, folder / name, more)
            compare(alone, folder / name, LONG)
            print(f"{name}: ended with the same bits", flush=True)
        for name in (name for name in others if name in args.jobs):
            others[name](cluster, documents, folder / name)
    return 0


def by_signal(cluster: Slurm, documents: Path, save: Path, more: list) -> None:
    job = cluster.train(*run_flags(documents, save, LONG), *more)
    preempt(cluster, job, save)
    assert cluster.wait(job)["Restarts"] == "1"


def by_time_limit(cluster: Slurm, documents: Path, save: Path, more: list) -> None:
    """Lower the time limit once there is a checkpoint; Slurm checks it twice a minute."""
    job = cluster.train(*run_flags(documents, save, LONG), *more, options=["--time=60", "--signal=USR1@60"])
    wait_for_checkpoint(cluster, job, save)
    run_time = cluster.state(job)["RunTime"].split(":")
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(run_time[1]) + 2}")
    cluster.wait(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert cluster.wait(job)["Restarts"] == "1"


def by_preemption(cluster: Slurm, documents: Path, save: Path, more: list) -> None:
    job = cluster.train(*run_flags(documents, save, LONG), *more, options=["--cpus-per-task=32"])
    wait_for_checkpoint(cluster, job, save)
    other = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"
    )
    cluster.wait(int(other))
    assert cluster.wait(job)["Restarts"] == "1"


def array(cluster: Slurm, documents: Path, folder: Path) -> None:
    folder.mkdir()
    given = [*run_flags(documents, f"{folder}/seed%a", STEPS), "--seed", "%a"]
    first = cluster.train(*given, options=["--array=1-2"])
    for seed in (1, 2):
        cluster.wait(f"{first}_{seed}")
        assert newest(folder / f"seed{seed}") == STEPS
    print("array of two seeds: both at their end", flush=True)


def cancelled(cluster: Slurm, documents: Path, save: Path) -> None:
    not_again(cluster, documents, save, lambda job: cluster.run("scancel", job))


def failed(cluster: Slurm, documents: Path, save: Path) -> None:
    not_again(cluster, documents, save, lambda job: kill_a_rank(save))


def not_again(cluster: Slurm, documents: Path, save: Path, end) -> None:
    """Check that a job ended by `end` is not requeued; its save folder is named after the expected state."""
    job = cluster.train(*run_flags(documents, save, LONG))
    wait_for_checkpoint(cluster, job, save)
    end(job)
    state = cluster.wait(job, save.name.upper())
    time.sleep(10)
    assert cluster.state(job)["JobState"] == save.name.upper() and state["Restarts"] == "0", state
    print(f"{save.name}: not queued again", flush=True)


def kill_a_rank(save: Path) -> None:
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(save) in words and "-u" in words:
            os.kill(process.pid, 9)
            return
    raise AssertionError(f"no rank of {save}")


if __name__ == "__main__":
    sys.exit(main())
