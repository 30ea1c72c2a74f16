"""Does CREAM work? A small Llama learns recall at 256 tokens, and is extended to 1024, 2048 and 4096 in many ways.

    python examples/study/study.py --output runs/study --minutes 9

resumes where it stopped, and says so if the time runs out before all runs are done. It writes results.jsonl, and the
table and pictures made from it. Flags after -- are passed to every run of pretrain_cream.py.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from megatron_cream.common import devices
from megatron_cream.patches import platform

platform.setup()  # before any import of Megatron

import methods
import psutil
import report
import torch
import worker
from corpus import Corpus, prepare

from megatron_cream.common.errors import one_line
from megatron_cream.common.processes import end_with_parent

LEARNED = 0.95
"""In-window recall below which a base is not extended."""


def main() -> int:
    flags = _parser().parse_args()
    deadline = time.monotonic() + 60 * flags.minutes
    longest = methods.WINDOW * max(flags.factors)
    study = Study(flags, deadline)
    try:
        # Meanwhile the study's processes import the trainer.
        study.corpus = prepare(flags.output / "corpus", length=longest, documents=flags.documents, source=flags.source)
        return _study(study)
    finally:
        study.close()


def _study(study: "Study") -> int:
    flags = study.flags
    if not study.do([methods.base(seed) for seed in flags.seeds]):
        return _later()
    seeds = [seed for seed in flags.seeds if study.has_learned(methods.base(seed))]
    done = not seeds or all(study.do(runs) for runs in _parts(study, seeds))
    report.write(list(study.results.values()), flags.output)
    return 1 if study.failed else 0 if done else _later()


def _parts(study: "Study", seeds: list[int]) -> Iterator[list[methods.Run]]:
    """Yield runs that can be executed beside each other; later ones depend on the results of earlier ones."""
    flags = study.flags
    chosen = lambda runs: [run for run in runs if run.method in flags.methods]
    if "samplers" in flags.parts:
        yield chosen(methods.extensions(seeds, flags.factors))
    if "scalings" in flags.parts:
        yield [run for scaling in methods.TRIED for run in methods.choosing(scaling, seeds[0], flags.factors)]
        results = list(study.results.values())
        best = {scaling: report.chosen_rate(results, scaling, seeds[0]) for scaling in methods.SCALINGS}
        rates = {scaling: rate or methods.RATE for scaling, rate in best.items()}
        yield chosen(methods.scaled(seeds, flags.factors, rates))


class Study:
    """Execute the runs that have no result yet, and write each result as soon as it arrives."""

    corpus: Corpus

    def __init__(self, flags: argparse.Namespace, deadline: float):
        self.flags, self.deadline = flags, deadline
        flags.output.mkdir(parents=True, exist_ok=True)
        self.file = flags.output / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.results = {result["run"]: result for result in map(json.loads, lines)}
        self.failed: list[str] = []
        # The processes live as long as the study, because importing Megatron takes longer than an extension. They are
        # spawned, because CUDA does not work after a fork.
        self.pools = {
            gpu: ProcessPoolExecutor(flags.jobs, get_context("spawn"), end_with_parent, (signal.SIGKILL, os.getpid()))
            for gpu in range(flags.gpus)
        }
        for gpu, pool in self.pools.items():
            for _ in range(flags.jobs):
                pool.submit(worker.start, gpu)

    def do(self, wanted: list[methods.Run]) -> bool:
        """Execute the runs of `wanted` that have no result; return False if the time runs out first."""
        waiting = [run for run in wanted if run.name not in self.results]
        going: dict[Future, tuple[methods.Run, int]] = {}
        while waiting or going:
            while (choice := self._next(waiting, list(going.values()))) is not None:
                run, gpu = choice
                waiting.remove(run)
                going[self.pools[gpu].submit(worker.do, run, gpu, *self._how(run))] = choice
            done, _ = wait(going, max(self.deadline - time.monotonic(), 0), FIRST_COMPLETED)
            for future in done:
                run, _ = going.pop(future)
                try:
                    self._keep(future.result())
                except BrokenExecutor:
                    raise
                except Exception as error:  # the run's log has the details; the other runs continue
                    self.failed.append(run.name)
                    print(f"{run.name}: failed: {one_line(error)}", flush=True)
            if not done:
                return False
        return True

    def has_learned(self, base: methods.Run) -> bool:
        """Return whether a base recalls enough to be extended; print a line if it does not."""
        if base.name not in self.results:
            return False  # it failed
        mean = report.mean_recall(self.results[base.name], methods.WINDOW)
        if mean < self.flags.learned:
            self.failed.append(base.name)
            print(
                f"{base.name}: recall at {methods.WINDOW} tokens is {mean:.3f}, below {self.flags.learned}: "
                "it is not extended",
                flush=True,
            )
        return mean >= self.flags.learned

    def _next(self, waiting: list[methods.Run], going: list[tuple[methods.Run, int]]) -> tuple[methods.Run, int] | None:
        """Return a run that can start now and the least busy GPU for it, or None.

        Timed runs have GPU 0 to themselves and start first there. A run that needs more slots than --jobs runs alone.
        """
        timed, others = ([run for run in waiting if run.alone is alone] for alone in (True, False))
        there = {gpu: [run for run, on in going if on == gpu] for gpu in self.pools}
        for gpu in sorted(self.pools, key=lambda gpu: len(there[gpu])):
            if gpu == 0 and (timed or any(run.alone for run in there[0])):
                if timed and not there[0]:
                    return timed[0], 0
            elif others:
                taken = sum(run.places for run in there[gpu])
                if not taken or taken + others[0].places <= self.flags.jobs:
                    return others[0], gpu
        return None

    def _how(self, run: methods.Run) -> tuple:
        """Return the remaining arguments of `worker.do`."""
        longest = methods.WINDOW * (max(self.flags.factors) if run.method == "base" else run.factor)
        lengths = [n for i in range(longest.bit_length()) if (n := methods.WINDOW * 2**i) <= longest]
        return self.flags.output, self.corpus, lengths, self.flags.samples, self.flags.extra

    def _keep(self, result: dict) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(result) + "\n")
        self.results[result["run"]] = result
        longest = max(map(int, result["recall"]))
        print(f"{result['run']}: recall {report.mean_recall(result, longest):.3f} at {longest} tokens", flush=True)

    def close(self) -> None:
        """End the runs in progress: a base saves and resumes next time; an extension starts again."""
        for pool in self.pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        started = {child.pid for child in active_children()}  # not multiprocessing's own, which ignore SIGTERM
        workers = [child for child in psutil.Process().children() if child.pid in started]
        for process in workers:
            process.terminate()
        for process in psutil.wait_procs(workers, timeout=60)[1]:
            process.kill()


def _jobs() -> int:
    """Return how many runs to start at once: seven fit into 80 GB, ten do not; more than ten gain nothing."""
    if not devices.has_cuda():
        return 10
    return max(1, min(torch.cuda.get_device_properties(0).total_memory // (10 << 30), 10))


def _later() -> int:
    print("Time is over: the same command goes on from here.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the corpus, the runs, and what they found")
    add("--minutes", type=float, default=60.0, help="stop after so long; the same command goes on")
    add(
        "--jobs",
        type=int,
        default=_jobs(),
        help="runs at a time on a GPU, but for those that are timed; `full` counts as three. Default: by the GPU's memory",
    )
    gpus = torch.cuda.device_count() if devices.has_cuda() else 1
    add("--gpus", type=int, default=gpus, help="GPUs of this machine to use; default: all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--factors", type=int, nargs="+", default=[4, 8, 16])
    parts = ["samplers", "scalings"]
    add("--parts", nargs="+", default=parts, choices=parts, help="parts of the study; default: both")
    add("--methods", nargs="+", default=[*methods.ALL], choices=[*methods.ALL])
    add("--samples", type=int, default=32, help="contexts for each length and depth")
    add("--documents", type=int, default=1500, help="documents of each number of pairs")
    add("--learned", type=float, default=LEARNED, help="recall that a base must have to be extended")
    add("--source", type=Path, help="folder of Python files to train on; default: the installed torch")
    add("extra", nargs="*", metavar="-- FLAG", help="flags for every run of pretrain_cream.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
