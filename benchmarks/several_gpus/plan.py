"""Predicted speed and memory of each run, made before it: plan.json, and the planner for any other flags.

python -m benchmarks.several_gpus.plan    # writes plan.json for H100 and H200
"""

import json
import sys
from functools import cache
from pathlib import Path

from benchmarks.several_gpus.layouts import CONFIG, list_runs
from benchmarks.several_gpus.machine import Machine

FILE = Path(__file__).with_name("plan.json")
ROOM = 0.85
"""GiB of nvidia-smi's total that a run must leave by plan; half a GiB is never free. On H100s DP 4 fitted with 1.1 GiB left,
and TP 2 x DP 2 at micro-batch 4 did not with 0.7."""


@cache
def _read() -> dict[str, dict]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def key(gpu: str, gpus: int, flags: str) -> str:
    """Return the key of a run in plan.json."""
    return f"{gpu} x {gpus}: {flags}"


def predict(gpu: str | None, gpus: int, flags: str) -> dict:
    """Return {tokens_per_second, gib, device} of a run, or {error}; without GPUs for an H200.

    gib is the peak of torch's allocator, device the memory of the GPU.
    """
    gpu = gpu or "H200"
    if known := _read().get(key(gpu, gpus, flags)):
        return known
    return _ask_planner(gpu, gpus, flags)


def _ask_planner(gpu: str, gpus: int, flags: str) -> dict:
    from megatron_cream.patches import platform

    platform.setup()
    from megatron_cream.common.errors import UsageError
    from megatron_cream.planning import measured

    row = dict(what="", gpu=gpu, config=CONFIG, flags=flags.split(), gpus=gpus, tokens_per_second=1, peak_gib=1.0)
    try:
        found = measured.check_run(row)
    except UsageError as error:
        return {"error": str(error)}
    rate, gib, device = found.speed.tokens_per_second, found.peak_gib, found.device_gib
    return {"tokens_per_second": round(rate), "gib": round(gib, 1), "device": round(device, 1)}


def leaves_room(plan: dict, memory: float) -> bool:
    """Return whether a run leaves ROOM of a GPU's GiB, by its plan."""
    return "error" not in plan and plan["device"] <= memory - ROOM


def fits(machine: Machine, name: str, gpus: int, flags: str) -> bool:
    """Return whether a run fits by its plan; print why not."""
    plan = predict(machine.gpu, gpus, flags)
    if "error" in plan:
        print(f"{name:28} left out: {plan['error']}", flush=True)
        return False
    if not leaves_room(plan, machine.memory):
        print(f"{name:28} left out: the planner says that it takes {plan['device']} GiB", flush=True)
        return False
    return True


def main() -> None:
    known, wanted = ({} if "--again" in sys.argv else _read()), {}
    for gpu in ("H100", "H200"):
        for gpus, flags in list_runs():
            name = key(gpu, gpus, flags)
            wanted[name] = known.get(name) or _ask_planner(gpu, gpus, flags)
    lines = [f"{json.dumps(name)}: {json.dumps(plan)}" for name, plan in wanted.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(wanted)} plans in {FILE}")


if __name__ == "__main__":
    main()
