"""How much GPU memory a run takes, and the layouts that fit, before anything is started. No GPU is needed.

python tools/plan.py --config examples/llama2_7b_32k.yaml --gpus 2 --gpu-memory 80
python tools/plan.py --load-hf Llama-2-13b-hf --seq-length 4096 --global-batch-size 32 --gpus 8 --json

Every other flag is pretrain_cream.py's: the recipe's own layout is predicted first, then others with the same
sequence length and global batch. --transformer-impl local plans for GPUs without Transformer Engine.
"""

import argparse
import json
import re
import sys
from pathlib import Path

# So that the file runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cream import platform

platform.setup()  # before anything of Megatron is imported

from rich.console import Console

from megatron_cream.errors import UsageError
from megatron_cream.planning import layouts, report, run_from_flags
from megatron_cream.planning.memory import GIB, predict

MOST_GPUS = 1024


def main() -> int:
    try:
        options, flags = parser().parse_known_args()
        return plan(options, flags)
    except UsageError as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2


def plan(options: argparse.Namespace, flags: list[str]) -> int:
    run = run_from_flags(flags, options.gpus)
    misfit = run.misfit()
    reason = None if misfit else layouts.refused(run.model, run.layout)
    if reason is not None:
        raise UsageError(reason)
    usable = layouts.usable(options.gpu_memory)
    own = None if misfit else predict(run.model, run.layout, run.engine)
    plans = layouts.fitting(run.model, run.layout, run.engine, options.gpus, usable)
    if options.json:
        print(json.dumps(report.as_dict(run, own, plans, options.gpu_memory, usable), indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 120
        if own:
            report.print_own(console, run, own, usable)
        else:
            console.print(f"the layout of these flags cannot run: {misfit}", soft_wrap=True, highlight=False)
        if plans:
            report.print_layouts(console, plans, run.layout, usable)
    if not plans:
        print(f"plan.py: {report.nothing_fits(run, usable, MOST_GPUS)}", file=sys.stderr)
    return 0 if plans else 1


def memory(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of GiB such as 80, or 80GiB, or 86GB")
    return float(match[1]) * (1e9 if (match[2] or "").upper() == "GB" else GIB)


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_GPUS:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 to {MOST_GPUS}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    class OneLine(argparse.ArgumentParser):
        def error(self, message: str):
            raise UsageError(message)

    result = OneLine(
        description=__doc__, epilog=layouts.RULES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    result.add_argument("--gpus", type=positive, required=True, metavar="N", help="in all")
    result.add_argument(
        "--gpu-memory", type=memory, default=80 * GIB, metavar="GIB",
        help="of each GPU; 80 (the default) for an A100 or H100 of 80 GB, which has 80 GiB; 140 for an H200",
    )  # fmt: skip
    result.add_argument("--json", action="store_true", help="all of it, in bytes, for a program")
    return result


if __name__ == "__main__":
    sys.exit(main())
