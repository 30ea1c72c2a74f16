"""Run the grid of cells.py on this host's GPUs: scalings and samplers on a real pretrained model.

    python examples/study_real/prepare.py --hf MODEL --train train.jsonl --held held.jsonl --output DATA
    python examples/study_real/study.py --data DATA --output OUT --gpus 8 --seconds 3000
    python examples/study_real/report.py --results OUT/results.jsonl --output OUT

Each GPU executes one run at a time. Each training and each evaluation adds a line to OUT/results.jsonl when it ends.
The same command again resumes: it executes what has no line yet. It starts no run that would not end within --seconds.
A run that fails is retried once after all others; the end of its log is in OUT/failed.log.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import cells

TRIES = 2


class Worker:
    """A process of worker.py on one GPU, waiting for its cell or running it."""

    def __init__(self, gpu: int, data: Path, log: IO[str]):
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": _device(gpu),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8"),
            # torch reads this at its first allocation, which comes before the run's flags are parsed.
            "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(data)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.cell: cells.Cell | None = None
        self.began = 0.0

    def start(self, cell: cells.Cell, **task) -> None:
        self.cell, self.began = cell, time.monotonic()
        try:
            self.process.stdin.write(json.dumps({"cell": asdict(cell), **task}) + "\n")
            self.process.stdin.close()
        except OSError:
            pass  # the process has died; _collect handles that like any other exit

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # its data loaders too
        except ProcessLookupError:
            pass
        self.process.wait()


def _device(gpu: int) -> str:
    """Return the name of the given GPU among those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[gpu] if visible else str(gpu)


class Study:
    """Scheduler of cells on GPUs, and writer of results.jsonl."""

    def __init__(self, flags: argparse.Namespace):
        self.flags, self.settings = flags, cells.Settings.read(flags.data)
        self.began = time.monotonic()
        self.runs = flags.output / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.results = flags.output / "results.jsonl"
        self.trained: set[str] = set()
        self.evaluated: dict[str, dict] = {}
        for line in self.results.read_text().splitlines() if self.results.exists() else []:
            self._know(json.loads(line))
        self._keep_found()
        self.waiting = wanted(self.settings, flags.cells)
        self.tries: dict[str, int] = {}
        self.longest: dict[tuple, float] = {}
        self.running: dict[int, Worker] = {}
        self.spare: dict[int, Worker] = {}

    def run(self) -> None:
        cells.write_models(self.settings, self.flags.data)
        with open(self.runs / "workers.log", "a") as log:
            try:
                while self._start_what_can(log) or self.running:
                    time.sleep(0.2)
                    self._collect()
            finally:
                for worker in (*self.running.values(), *self.spare.values()):
                    worker.kill()
        left = len(self.waiting)
        self._say(f"over: {len(self.evaluated)} cells have results, {left} are left")

    def _start_what_can(self, log: IO[str]) -> bool:
        """Start a run on each free GPU; return whether any run is in progress or can still start."""
        for gpu in range(self.flags.gpus):
            if gpu in self.running:
                continue
            cell = self._next()
            if cell is None:
                continue
            worker = self.spare.pop(gpu, None) or Worker(gpu, self.flags.data, log)
            again = cell.name in self.trained and (self.runs / cell.name).is_dir()
            worker.start(cell, data=str(self.flags.data), runs=str(self.runs), evaluate_only=again)
            self.running[gpu] = worker
            self._say(f"GPU {gpu}: {cell.name}")
            if self.waiting and self.flags.ahead:
                self.spare[gpu] = Worker(gpu, self.flags.data, log)
        return bool(self.running) or self._can_go_on()

    def _can_go_on(self) -> bool:
        return any(self._ready(cell) for cell in self.waiting)

    def _next(self) -> cells.Cell | None:
        """Remove and return the first waiting cell that is ready, or None; drop cells that have results."""
        i = 0
        while i < len(self.waiting):
            waiting = self.waiting[i]
            cell = self._ready(waiting)
            if cell is not None and cell.name in self.evaluated:
                del self.waiting[i]
                continue
            if cell is not None:
                del self.waiting[i]
                return cell
            i += 1
        return None

    def _ready(self, cell: cells.Cell) -> cells.Cell | None:
        """Return the cell with its learning rate, or None if that is unknown or the time is too short."""
        if self.flags.seconds - (time.monotonic() - self.began) < self._expected(cell):
            return None
        if not cell.trains or cell.rate is not None:
            return cell
        unfinished = {waiting.name for waiting in self.waiting} | {w.cell.name for w in self.running.values()}
        if any(choice.name in unfinished for choice in cells.choosing(self.settings, cell.scaling)):
            return None
        rate = cells.chosen_rate(self.settings, cell.scaling, self.evaluated)
        return None if rate is None else cell.with_rate(rate)

    def _expected(self, cell: cells.Cell) -> float:
        """Return the expected seconds of a run: 1.05 times the longest of its kind, or a guess from --run-seconds."""
        kind = _kind(cell)
        guess = self.flags.run_seconds * {"base": 0.3, "full": 2.0, cells.LONG_END: 1.3}.get(kind[0], 1.0)
        return 1.05 * self.longest[kind] if kind in self.longest else guess

    def _collect(self) -> None:
        for gpu, worker in list(self.running.items()):
            took = time.monotonic() - worker.began
            limit = min(self.flags.seconds - (worker.began - self.began) + 20, 4 * self.flags.run_seconds)
            if worker.process.poll() is None and took < limit:
                continue
            killed = worker.process.poll() is None
            worker.kill()
            del self.running[gpu]
            self._over(worker.cell, took, f"killed after {took:.0f} s" if killed else "")

    def _keep_found(self) -> None:
        """Move results that workers have written to results.jsonl, also those of workers that failed later."""
        for file in sorted(self.runs.glob("*.training.json")) + sorted(self.runs.glob("*.evaluation.json")):
            line = json.loads(file.read_text())
            with open(self.results, "a") as results:
                results.write(json.dumps(line) + "\n")
            self._know(line)
            file.unlink()

    def _know(self, line: dict) -> None:
        if line["what"] == "training":
            self.trained.add(line["run"])
        else:
            self.evaluated[line["run"]] = line

    def _over(self, cell: cells.Cell, took: float, killed: str) -> None:
        self._keep_found()
        if cell.name in self.evaluated:
            self.longest[_kind(cell)] = max(took, self.longest.get(_kind(cell), 0.0))
            self._say(f"{cell.name}: {took:.0f} s, score {cells.score(self.evaluated[cell.name]):.3f}")
            return
        self.tries[cell.name] = self.tries.get(cell.name, 0) + 1
        if self.tries[cell.name] < TRIES:  # learning-rate cells go first, because others wait for them
            self.waiting.insert(0 if cell.rate in self.settings.rates else len(self.waiting), cell)
        self._say(f"{cell.name}: failed after {took:.0f} s {killed}")
        log = self.runs / f"{cell.name}.log"
        tail = log.read_text(errors="replace").splitlines()[-60:] if log.exists() else ["no log: see workers.log"]
        with open(self.flags.output / "failed.log", "a") as failed:
            failed.write("\n".join([f"==== {cell.name} {killed}", *tail, ""]))

    def _say(self, line: str) -> None:
        text = f"{time.monotonic() - self.began:6.0f} s  {line}"
        print(text, flush=True)
        with open(self.flags.output / "progress.txt", "a") as progress:
            progress.write(text + "\n")


def _kind(cell: cells.Cell) -> tuple[str, int]:
    """Return a key that is equal for runs that take the same time."""
    return cell.sampler if cell.sampler in ("base", "full", cells.LONG_END) else "window", cell.factor


def wanted(settings: cells.Settings, texts: list[str]) -> list[cells.Cell]:
    """Return the cells that choose learning rates, then those that match all words of a text, in the order of `texts`.

    Cells of one text have the grid's order. Without texts it is the whole grid.
    """
    every = cells.order(settings)
    if not texts:
        return every
    short = set(cells.short(settings))
    words = lambda cell: {
        *(cell.scaling, cell.sampler, f"s{cell.factor}", f"seed {cell.seed}"),
        *(("short", f"share {cell.share:g}") if cell in short else ()),
    }
    named = dict.fromkeys(cell for text in texts for cell in every if set(text.split(",")) <= words(cell))
    scalings = {cell.scaling for cell in named if cell.trains and cell.rate is None}
    choosing = {cell for scaling in scalings for cell in cells.choosing(settings, scaling)}
    return [*(cell for cell in every if cell in choosing), *(cell for cell in named if cell not in choosing)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="what prepare.py wrote")
    add("--output", type=Path, required=True, help="folder for results.jsonl, progress.txt, failed.log and runs/")
    add("--gpus", type=int, default=1, help="of this host, one run on each at a time; 1 on a machine without one")
    add("--seconds", type=float, default=3600.0, help="start no run that would end later")
    add("--run-seconds", type=float, default=240.0, help="what a run is expected to take before one has ended")
    add(
        "--cells",
        nargs="+",
        default=[],
        metavar="WORDS",
        help="only cells that have all words of one of these, such as yarn,s8 or 'ntk,cream even' or short, and those that "
        "choose their learning rates; in the order given",
    )
    add(
        "--ahead",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start the process of a GPU's next run beside the run that it has, so that imports cost no GPU time",
    )
    add("--list", action="store_true", help="print the cells in their order, and exit")
    flags = parser.parse_args()
    flags.data, flags.output = flags.data.resolve(), flags.output.resolve()
    if not (flags.data / "settings.json").is_file():
        print(f"study.py: error: --data {flags.data}: no settings.json there; prepare.py writes it", file=sys.stderr)
        return 2
    if flags.list:
        print(*(cell.name for cell in wanted(cells.Settings.read(flags.data), flags.cells)), sep="\n")
        return 0
    Study(flags).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
