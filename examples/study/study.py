"""Does CREAM work? A small Llama learns recall at 256 tokens, and is extended to 1024, 2048 and 4096 in many ways.

    python examples/study/study.py --output runs/study --minutes 9

goes on where it was stopped, and says when the time is over before all is done. What it found is in results.jsonl,
and in the table and the pictures made of it. Flags after -- go to every run of pretrain_cream.py.
"""

import argparse
import json
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from megatron_cream import platform

platform.setup()  # before anything of Megatron is imported

import methods
import psutil
import report
import worker
from corpus import Corpus, prepare

LEARNED = 0.95
"""In-window recall below which a base is not extended."""


def main() -> int:
    flags = _parser().parse_args()
    deadline = time.monotonic() + 60 * flags.minutes
    longest = methods.WINDOW * max(flags.factors)
    corpus = prepare(flags.output / "corpus", length=longest, documents=flags.documents, source=flags.source)
    study = Study(flags, corpus, deadline)
    bases = [methods.base(seed) for seed in flags.seeds]
    if not study.do(bases, flags.jobs):
        return _later()
    for run in bases:
        mean = report.mean_recall(study.results[run.name], methods.WINDOW)
        if mean < flags.learned:
            print(
                f"{run.name}: recall at {methods.WINDOW} tokens is {mean:.3f}, below {flags.learned}: it is not extended"
            )
            return 1
    extensions = [run for run in methods.extensions(flags.seeds, flags.factors) if run.method in flags.methods]
    alone = [run for run in extensions if run.alone]
    done = study.do(alone, 1) and study.do(extensions, flags.jobs)
    report.write(list(study.results.values()), flags.output)
    return 0 if done else _later()


class Study:
    """Runs what has no result yet, and keeps each result as soon as it is there."""

    def __init__(self, flags: argparse.Namespace, corpus: Corpus, deadline: float):
        self.flags, self.corpus, self.deadline = flags, corpus, deadline
        self.file = flags.output / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.results = {result["run"]: result for result in map(json.loads, lines)}

    def do(self, wanted: list[methods.Run], jobs: int) -> bool:
        """Whether all of `wanted` have a result; False where the time is over first."""
        waiting = [run for run in wanted if run.name not in self.results]
        # New processes, as CUDA does not outlive a fork.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            under_way = {pool.submit(worker.do, run, *self._how(run)) for run in waiting}
            while under_way:
                done, under_way = wait(under_way, self.deadline - time.monotonic(), FIRST_COMPLETED)
                for future in done:
                    self._keep(future.result())
                if not done:
                    _stop(pool)
                    return False
        return True

    def _how(self, run: methods.Run) -> tuple:
        """The rest of the arguments of `worker.do`."""
        longest = methods.WINDOW * (max(self.flags.factors) if run.method == "base" else run.factor)
        lengths = [n for i in range(longest.bit_length()) if (n := methods.WINDOW * 2**i) <= longest]
        return self.flags.output, self.corpus, lengths, self.flags.samples, self.flags.extra

    def _keep(self, result: dict) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(result) + "\n")
        self.results[result["run"]] = result
        longest = max(map(int, result["recall"]))
        print(f"{result['run']}: recall {report.mean_recall(result, longest):.3f} at {longest} tokens", flush=True)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the runs that are under way: a base saves, and goes on from there next time; an extension begins again."""
    pool.shutdown(wait=False, cancel_futures=True)
    workers = psutil.Process().children()
    for process in workers:
        process.terminate()
    for process in psutil.wait_procs(workers, timeout=60)[1]:
        process.kill()


def _later() -> int:
    print("Time is over: the same command goes on from here.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the corpus, the runs, and what they found")
    add("--minutes", type=float, default=60.0, help="stop after so long; the same command goes on")
    add("--jobs", type=int, default=10, help="runs at a time on the GPU, but for those that are timed")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--factors", type=int, nargs="+", default=[4, 8, 16])
    add(
        "--methods", nargs="+", default=[*methods.METHODS, *methods.SIGMAS], choices=[*methods.METHODS, *methods.SIGMAS]
    )
    add("--samples", type=int, default=32, help="contexts for each length and depth")
    add("--documents", type=int, default=1500, help="documents of each number of pairs")
    add("--learned", type=float, default=LEARNED, help="recall that a base must have to be extended")
    add("--source", type=Path, help="folder of Python files to train on; default: the installed torch")
    add("extra", nargs="*", metavar="-- FLAG", help="flags for every run of pretrain_cream.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
