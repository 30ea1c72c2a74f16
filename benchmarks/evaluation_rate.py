"""Measure an evaluation's examples/s on several GPUs and on one, without start and load, and compare the answers.

    python benchmarks/evaluation_rate.py FOLDER --gpus 4 1 -- needle --model MODEL --min-length 2048 --max-length 8192 \
        --length-steps 4 --depth-steps 6 --samples 8

The rate is that of the examples between the first and the last that are stored. Flags after -- are evaluate.py's.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[4, 1])
    args = parser.parse_args(own)
    rates, answers = {}, {}
    for gpus in args.gpus:
        folder = args.folder / f"on_{gpus}"
        shutil.rmtree(folder, ignore_errors=True)
        rates[gpus] = measured(gpus, folder, flags)
        answers[gpus] = _read(folder)
    last = args.gpus[-1]
    for gpus in args.gpus[:-1]:
        same = sum(answers[gpus].get(name) == answer for name, answer in answers[last].items())
        print(
            f"{gpus} to {last}: {rates[gpus] / rates[last]:.2f} times; {same} of {len(answers[last])} answers are equal"
        )
    return 0


def measured(gpus: int, folder: Path, flags: list[str]) -> float:
    """Run one evaluation, print its row and return its examples/s."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *launch, str(ROOT / "tools" / "evaluate.py"), *flags, "--output", str(folder)]
    started, seen = time.monotonic(), []  # seen: (seconds, examples)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        examples = len(_read(folder))
        if examples and (not seen or examples > seen[-1][1]):
            seen.append((time.monotonic() - started, examples))
        time.sleep(0.02)
    if process.returncode or len(seen) < 2:
        raise SystemExit(f"evaluate.py on {gpus} GPUs ended with {process.returncode} after {len(seen)} results")
    (first, before), (last, after) = seen[0], seen[-1]
    rate = (after - before) / (last - first)
    found = dict(gpus=gpus, examples=after, first=round(first, 1), last=round(last, 1), rate=round(rate, 3))
    print(json.dumps(found), flush=True)
    return rate


def _read(folder: Path) -> dict[str, str]:
    """Return the answers stored so far, by the name of their example."""
    found = {}
    for file in folder.glob("results*.jsonl"):
        try:
            lines = file.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:  # the ranks' files have just been joined
            continue
        found |= {record["name"]: record.get("output") for record in map(json.loads, lines)}
    return found


if __name__ == "__main__":
    sys.exit(main())
