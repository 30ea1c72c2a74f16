"""Tables of several_gpus' results, and rows for the planner's measured runs.

    python -m benchmarks.several_gpus.report OUTPUT/results.jsonl                        # a section of RESULTS.md
    python -m benchmarks.several_gpus.report OUTPUT/results.jsonl --measured "2026-11-27, eight GPUs"

--measured appends the timed runs to megatron_cream/planning/measured_runs.json; its value names the section of
RESULTS.md that has them.
"""

import argparse
import datetime
import json
import re
import statistics
from pathlib import Path

from benchmarks.several_gpus.layouts import CONFIG, PRECISIONS

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "megatron_cream" / "planning" / "measured_runs.json"
BATCH_OF_ONE, TOKENS, LAYERS = 16, 4096, 32
TOLERANCE = 0.1
"""Relative error of a prediction from which tests/planning/test_measured.py wants a reason."""
DEFERRED = "--defer-embedding-wgrad-compute"
NOT_THE_PLANS = ("--data-path", "--split", "--tokenizer-type", "--train-iters", "--eval-iters")
"""Flags with a value that a plan does not depend on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--measured", metavar="SECTION")
    args = parser.parse_args()
    found = {run["run"]: run for run in map(json.loads, args.results.read_text().splitlines())}
    print("\n".join(section(found)))
    if args.measured:
        add_measured(found, args.measured)


def section(found: dict[str, dict]) -> list[str]:
    """Return the section of RESULTS.md about these results."""
    timed = [run for run in found.values() if "tokens_per_second" in run]
    count = max((run["gpus"] for run in timed), default=0)
    number = {2: "two", 4: "four", 8: "eight"}.get(count, "several")
    kind = timed[0]["gpu"] if timed else "GPU"
    head = [f"## {datetime.date.today()}: {number} {kind}s", "", f"    bash benchmarks/{number}_gpus.sh OUTPUT", ""]
    return head + tables(found)


def tables(found: dict[str, dict]) -> list[str]:
    """Return the results as Markdown."""
    lines = []
    if run := found.get("default"):
        lines += [f"default run: {run['seconds']} s", "", "| context | before | after |", "|---|---|---|"]
        lines += [f"| {n} | {run['before'][n]:.1f} | {run['after'][n]:.1f} |" for n in run["before"]] + [""]
    lines += _parity(found)
    if run := found.get("faults"):
        again = " and ".join(f"{seconds} s" for seconds in run["next_checkpoint_after"])
        lines += [
            f"One rank of {run['ranks']} killed in a step, then one in a checkpoint: {run['starts']} starts, the same bits "
            f"after {run['steps']} steps as a run left alone: {run['same_bits']}. The next checkpoint was whole {again} "
            "after the first kill.",
            "",
        ]
    prompts = [run for run in found.values() if "seconds_to_read" in run]
    if prompts:
        lines += [
            "| a prompt | tokens | read in | each token after | GiB of each GPU | loss of its end |",
            "|---" * 6 + "|",
        ]
        lines += [
            f"| {run['run'].split(', ')[1]} | {run['length']:,} | {run['seconds_to_read']} s | "
            f"{run['ms_each_token_after']} ms | {run['peak_gib']} | {run['loss']} |"
            for run in prompts
        ]
        lines += [""]
    return lines + _speed(found)


def _parity(found: dict[str, dict]) -> list[str]:
    layouts = list(dict.fromkeys(name.split(": ")[1] for name in found if name.startswith("parity")))
    if not layouts:
        return []
    lines = ["| 20 steps, largest relative difference of the loss from one rank | " + " | ".join(PRECISIONS) + " |"]
    lines += ["|---" * (1 + len(PRECISIONS)) + "|"]
    for layout in layouts:
        cells = [_difference(found, precision, layout) for precision in PRECISIONS]
        if layout != "one" and any(cells):
            lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _difference(found: dict[str, dict], precision: str, layout: str) -> str:
    one, other = (found.get(f"parity {precision}: {name}", {}).get("losses") for name in ("one", layout))
    if not one or not other or len(one) != len(other):
        return ""
    return f"{max(abs(x - y) / y for x, y in zip(other, one, strict=True)):.1e}"


def one_gpu(found: dict[str, dict]) -> tuple[float, str] | None:
    """Return one GPU's mean tokens/s with the whole 7B, and how it was found.

    Where the whole model does not fit, its time is extrapolated from runs of some of its layers: each layer adds the
    same time.
    """
    whole = [run["tokens_per_second"] for name, run in found.items() if re.fullmatch(r"7b one(, GPU \d+)?", name)]
    if whole:
        return statistics.mean(whole), f"measured on {len(whole)}"
    seconds = _seconds_by_layers(found)
    if len(seconds) < 2:
        return None
    (few, short), (many, long) = sorted(seconds.items())[-2:]
    whole = long + (LAYERS - many) * (long - short) / (many - few)
    return BATCH_OF_ONE * TOKENS / whole, f"extrapolated from {few} and {many} layers"


def _seconds_by_layers(found: dict[str, dict]) -> dict[int, float]:
    """Return the median seconds of a step on one GPU, by the number of layers."""
    rates: dict[int, list[float]] = {}
    for name, run in found.items():
        if " layers one" in name:
            rates.setdefault(int(name.split()[0]), []).append(run["tokens_per_second"])
    return {layers: BATCH_OF_ONE * TOKENS / statistics.median(each) for layers, each in rates.items()}


def _speed(found: dict[str, dict]) -> list[str]:
    rows = [run for run in found.values() if "tokens_per_second" in run]
    if not rows:
        return []
    one, lines = one_gpu(found), []
    if one:
        lines += [f"One GPU, the whole 7B, global batch {BATCH_OF_ONE}: {one[0]:,.0f} tokens/s ({one[1]}).", ""]
    lines += [
        "| run | tokens/s/GPU | beside one GPU | MFU | torch's GiB | the GPU's | planned tokens/s | off by | planned GiB "
        "| the GPU's | loss |",
        "|---" * 11 + "|",
    ]
    for run in rows:
        rate, planned = run["tokens_per_second"], run["planned_tokens_per_second"]
        beside = f"{rate / one[0]:.3f}" if one and run["run"].startswith("7b") else ""
        plan = f"{planned:,} | {planned / rate - 1:+.1%} | {run['planned_gib']}" if planned else " | | "
        device, planned_device = (run.get(name, "") for name in ("device_gib", "planned_device_gib"))
        lines.append(
            f"| {run['run']} | {rate:,.0f} | {beside} | {run['mfu']:.1f} % | {run['peak_gib']:.1f} | {device} | {plan} "
            f"| {planned_device} | {run['loss']} |"
        )
    return lines


def last_json(text: str) -> dict:
    """Return the last line of a log that is a JSON object."""
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def add_measured(found: dict[str, dict], section: str) -> None:
    """Append the timed runs to the planner's measured runs; runs that it has already are left out."""
    text = MEASURED.read_text().rstrip()
    known = {row["what"] for row in json.loads(text)}
    timed = [run for run in found.values() if "tokens_per_second" in run and run["gpu"]]
    # Runs on further GPUs repeat another run, and the planner does not count what deferred gradients keep.
    timed = [run for run in timed if ", GPU " not in run["run"] and DEFERRED not in run["flags"]]
    rows = [_measured_row(run, section) for run in timed]
    new = [row for row in rows if row["what"] not in known]
    written = [
        "  {\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in row.items()) + "\n  }" for row in new
    ]
    if written:
        MEASURED.write_text(text.removesuffix("]").rstrip() + ",\n" + ",\n".join(written) + "\n]\n")
    print(f"{len(new)} runs added to {MEASURED}")


def _measured_row(run: dict, section: str) -> dict:
    count = run["gpus"]
    given, left = {}, list(run["flags"])
    while left:
        flag = left.pop(0)
        given[flag] = [left.pop(0)] if left and not left[0].startswith("--") else []  # a later value replaces it
    flags = [word for flag, value in given.items() if flag not in NOT_THE_PLANS for word in (flag, *value)]
    row = {
        "what": f"{run['run']}, {count} {run['gpu']}{'s' if count > 1 else ''}",
        "source": f"RESULTS.md {section}: benchmarks/several_gpus",
        "gpu": run["gpu"],
        "config": CONFIG,
        **({"gpus": count} if count > 1 else {}),
        "flags": flags,
        "tokens_per_second": round(run["tokens_per_second"]),
        "peak_gib": run["peak_gib"],
    }
    planned = run["planned_tokens_per_second"]
    if planned and abs(planned / run["tokens_per_second"] - 1) >= TOLERANCE:
        row["off"] = (
            "large transfers are faster than planned" if planned < run["tokens_per_second"] else "not explained"
        )
    return row


if __name__ == "__main__":
    main()
