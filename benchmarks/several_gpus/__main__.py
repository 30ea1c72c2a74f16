"""Run the benchmarks of two_gpus.sh, four_gpus.sh or eight_gpus.sh, and print their table.

The scripts set the environment.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.several_gpus import parity, report, speed
from benchmarks.several_gpus.machine import find_machine
from benchmarks.several_gpus.runs import ROOT, Job, Runs
from benchmarks.stopping import leave_no_ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gpus", type=int, choices=(2, 4, 8))
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; between those joined by + no GPU waits"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    stages = args.stages or DEFAULT[args.gpus]
    if unknown := {name for stage in stages for name in stage.split("+")} - STAGES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such stage; choose from {', '.join(STAGES)}")
    leave_no_ranks()
    runs = Runs(args.output.absolute(), find_machine(args.gpus), extra, args.seconds)
    print(f"{args.gpus} x {runs.machine.gpu or 'CPU rank'}", flush=True)
    for stage in stages:
        started = time.monotonic()
        print(f"== {stage}", flush=True)
        runs.run([job for name in stage.split("+") for job in STAGES[name](runs)])
        print(f"   {time.monotonic() - started:.0f} s", flush=True)
    print("\n".join(report.tables(runs.results)))
    return 1 if runs.failed else 0


def default(runs: Runs) -> list[Job]:
    """Run pretrain_cream.py without flags."""

    def read(text: str) -> dict:
        from megatron_cream.training.quickstart import read_last_perplexity

        folder = max((ROOT / "runs").glob("quickstart-*"))
        before, after = (read_last_perplexity(folder / part) for part in ("base", "cream"))
        return dict(before=before, after=after)

    return [Job("default", 2, [], read)]


def faults(runs: Runs) -> list[Job]:
    """Kill one rank in a step, and one during a checkpoint write; it may run beside other runs."""

    def read(text: str) -> dict:
        return report.last_json(text)

    flags, limit = [runs.folder / "faults", runs.machine.count], 110 if runs.machine.gpu else 600
    return [Job("faults", 0, flags, read, script=("benchmarks.several_gpus.faults",), limit=limit)]


def parity_faults(runs: Runs) -> list[Job]:
    """Measure losses in float32; the kills run beside all layouts but the first."""
    layouts = parity.layout_jobs(runs, "fp32")
    return [*parity.start_jobs(runs, ["fp32"]), layouts[0], *faults(runs), *layouts[1:]]


def prepare(runs: Runs) -> list[Job]:
    """Make what later stages need: documents of full length, and the losses of one rank, on the last GPU."""
    return [speed.documents(runs), *parity.start_jobs(runs, ["fp32", "bf16"] if runs.machine.gpu else ["fp32"])]


STAGES = {
    "default": default,
    "prepare": prepare,
    "one": speed.one,
    "parity": parity.parity,
    "faults": faults,
    "parity-faults": parity_faults,
    "7b": speed.seven_b,
    "7b-more": speed.seven_b_more,
    "tuning4": speed.tuning4,
    "long": speed.long,
    "70b": speed.seventy_b,
    "evaluation": speed.evaluation,
    "parity-bf16": parity.parity_bf16,
}
DEFAULT = {
    2: ["default", "parity", "parity-bf16", "faults", "one+7b+long"],
    4: ["one+prepare+parity-faults", "7b+tuning4+long+70b+7b-more+evaluation+parity-bf16"],
    8: ["one+prepare+parity-faults", "7b+tuning4+long+70b+7b-more+evaluation+parity-bf16"],
}

if __name__ == "__main__":
    sys.exit(main())
