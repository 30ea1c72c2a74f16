"""Launch runs on the GPUs of one host, each as soon as its GPUs are free, and store their results."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.several_gpus.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
JOB = ("pretrain_cream.py",)
SECONDS_BETWEEN_LOOKS = 1.0
"""At the memory of the GPUs."""


@dataclass(frozen=True)
class Job:
    """One run of a benchmark.

    name: its key in results.jsonl.
    ranks: processes that torchrun starts; 0: `script` is a Python module that runs by itself.
    flags: flags of the script.
    read: function that returns the results from the log; it raises if the log has none.
    gpus: indices of its GPUs; None: all, but none with 0 ranks.
    limit: seconds after which it is killed.
    """

    name: str
    ranks: int
    flags: list
    read: Callable[[str], dict]
    gpus: tuple[int, ...] | None = None
    script: tuple[str, ...] = JOB
    limit: float = 600


@dataclass
class _Started:
    job: Job
    process: subprocess.Popen
    log: Path
    signal: Path
    gpus: set[int]
    since: float = field(default_factory=time.monotonic)
    runs: bool = False
    device_gib: float = 0.0


class Runs:
    """Launcher of runs; it stores one line per run in FOLDER/results.jsonl and logs in FOLDER/logs.

    Args:
        folder: the output folder.
        machine: its GPUs.
        extra: flags for every run of parity and of the 7B.
        seconds: time after which no run is started.
    """

    def __init__(self, folder: Path, machine: Machine, extra: list[str], seconds: float):
        self.folder, self.machine, self.extra, self.failed = folder, machine, extra, []
        self.file, self.deadline = folder / "results.jsonl", time.monotonic() + seconds
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.results: dict[str, dict] = {result["run"]: result for result in map(json.loads, lines)}

    def keep(self, name: str, **found) -> None:
        """Store and print the results of a run."""
        self.results[name] = {"run": name, **found}
        with self.file.open("a") as file:
            file.write(json.dumps(self.results[name]) + "\n")
        shown = {key: value for key, value in found.items() if key not in ("losses", "flags")}
        print(f"{name:28} {shown}", flush=True)

    def run(self, jobs: list[Job]) -> None:
        """Run the jobs that have no result yet, in order; those on different GPUs run at the same time.

        On GPUs, the next job of each GPU imports while another one runs.
        """
        left = [job for i, job in enumerate(jobs) if job.name not in {*self.results, *(each.name for each in jobs[:i])}]
        started: list[_Started] = []
        looked = time.monotonic()
        while left or started:
            if time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                self._look_at_memory(started)
            for each in [each for each in started if each.process.poll() is not None or self._is_late(each)]:
                started.remove(each)
                self._end(each)
            waiting = [each for each in started if not each.runs]
            taken = set().union(*(each.gpus for each in started if each.runs))
            for each in waiting:  # a job does not overtake an earlier one on its GPUs
                if not each.gpus & taken:
                    each.runs, each.since = True, time.monotonic()
                    each.signal.touch()
                taken |= each.gpus
            if left and self._may_start(left[0], started):
                job = left.pop(0)
                if time.monotonic() > self.deadline:
                    print(f"{job.name:28} not started: the time is over", flush=True)
                    self.failed.append(job.name)
                else:
                    started.append(self._start(job))
                continue
            time.sleep(0.02)

    def _look_at_memory(self, started: list[_Started]) -> None:
        """Keep the most memory that nvidia-smi has shown of a job's GPUs. A job that waits for its GPUs has none."""
        if used := self.machine.read_used_memory():
            for each in started:
                if each.runs and each.gpus:
                    each.device_gib = max(each.device_gib, *(used[gpu] for gpu in each.gpus))

    def _may_start(self, job: Job, started: list[_Started]) -> bool:
        if not self._gpus(job):  # in its turn
            return all(each.runs for each in started)
        waiting = set().union(*(each.gpus for each in started if not each.runs))
        taken = set().union(*(each.gpus for each in started))
        return not self._gpus(job) & (waiting if self.machine.gpu and job.script == JOB else taken)

    def _gpus(self, job: Job) -> set[int]:
        if not self.machine.gpu:  # one job at a time
            return set(range(self.machine.count))
        if job.gpus is None:
            return set(range(self.machine.count) if job.ranks else ())
        return set(job.gpus)

    def _start(self, job: Job) -> _Started:
        plain = re.sub(r"[^a-z0-9-]+", "_", job.name)
        log, signal = self.folder / "logs" / f"{plain}.txt", self.folder / "logs" / f"{plain}.go"
        signal.unlink(missing_ok=True)
        command = [sys.executable, "-m", *job.script]
        if job.ranks:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={job.ranks}", "--standalone"]
            command += ["benchmarks/several_gpus/warm.py", str(signal)] if job.script == JOB else []
            command += job.script
        gpus = self._gpus(job)
        visible = {"CUDA_VISIBLE_DEVICES": self.machine.visible(gpus)} if gpus and self.machine.gpu else {}
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *map(str, job.flags)],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | visible,
            )
        return _Started(job, process, log, signal, gpus)

    def _is_late(self, started: _Started) -> bool:
        # The imports of a job that waits are not its time.
        return started.runs and time.monotonic() - started.since > started.job.limit

    def _end(self, started: _Started) -> None:
        job, code = started.job, started.process.poll()
        seconds = round(time.monotonic() - started.since, 1)
        more = {"seconds": seconds} | ({"device_gib": round(started.device_gib, 1)} if started.device_gib else {})
        if code is None:
            end_tree(started.process)
            more["killed"] = True
        text = started.log.read_text()
        if not code:  # a killed run may have been measured before it hung
            try:
                return self.keep(job.name, **job.read(text), **more)
            except Exception as error:
                said = f"killed after {seconds} s" if code is None else f"no result in {started.log}: {error!r}"
        else:
            lines = [line for line in text.splitlines() if "Error" in line or "error:" in line or " --" in line[:40]]
            said = (lines or [text[-300:].replace("\n", " ")])[0]
        self.failed.append(job.name)
        print(f"{job.name:28} failed: {said[:300]}", flush=True)


def end_tree(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants; torchrun's ranks have their own sessions."""
    parent = psutil.Process(process.pid)
    tree = [*parent.children(recursive=True), parent]
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(tree, timeout=20)
    process.wait()
