"""Predict GPU memory, time and cost of a run, and the layouts that fit. No GPU is needed.

python tools/plan.py --config llama2_7b_32k --gpus 2 --gpu A100
python tools/plan.py --load-hf Llama-2-13b-hf --seq-length 4096 --global-batch-size 32 --gpus 8 --gpu H200 --json
python tools/plan.py --config llama2_7b_256k --gpus 64 --gpu H100 --network 200 --price 2.5
python tools/plan.py --check

All other flags are those of pretrain_cream.py. The layout of the flags is predicted first, then others with the same
sequence length and global batch, then training at the full --target-length. --transformer-impl local plans for
GPUs without Transformer Engine. --check compares predictions with all measured runs.
"""

import argparse
import re
import sys
from dataclasses import replace

from megatron_cream.patches import platform

platform.setup()  # before anything of Megatron is imported

from rich.console import Console

from megatron_cream.common.advice import command_line
from megatron_cream.common.cli import path, program_name, to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import check_picture, convert_disk_errors, to_json
from megatron_cream.config.checks.flags import LONG_DATA
from megatron_cream.planning import layouts, measured, memory, outside, picture, report, report_time, step_time
from megatron_cream.planning.flags import parse_flags, run_from_flags
from megatron_cream.planning.hardware import GIB, GPUS, Cluster
from megatron_cream.planning.layouts import Plan
from megatron_cream.planning.run import Run

MAX_GPUS = 1024


def main() -> int:
    try:
        options, flags = parser().parse_known_args()
        if options.check:
            measured.print_check(console())
            return 0
        if options.gpus is None:
            raise UsageError("the following arguments are required: --gpus")
        if options.picture:
            check_picture(options.picture, "--picture")
        return plan(options, flags)
    except UsageError as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 2


def plan(options: argparse.Namespace, flags: list[str]) -> int:
    """Print the plan, and return the exit code: 1 if no layout fits."""
    run = run_from_flags(flags, options.gpus)
    misfit = run.find_misfit() or find_own_conflict(run)
    gpu_memory = options.gpu_memory or GPUS[options.gpu].memory
    usable = layouts.usable(gpu_memory)
    around = cluster(options)
    own = None
    if not misfit:
        needed = memory.predict(run.model, run.layout, run.engine)
        own = Plan(run.layout, needed, step_time.predict(run.model, run.layout, run.engine, around))
    plans = layouts.find_fitting(run.model, run.layout, run.engine, options.gpus, usable, around)
    long = replace(run, layout=replace(run.layout, seq_length=run.target_length))
    full = []
    if plans and run.target_length > run.layout.seq_length:
        full = layouts.find_fitting(long.model, long.layout, long.engine, options.gpus, usable, around)
    if options.json:
        print(to_json(report.as_dict(run, around, own, plans, full, gpu_memory, usable), indent=2))
    else:
        terminal = console()
        if own:
            report.print_memory(terminal, run, own.memory, usable)
            report_time.print_time(terminal, run, own.speed, options.price)
        else:
            terminal.print(f"The layout of these flags cannot run: {misfit}", soft_wrap=True, highlight=False)
        if plans:
            report.print_layouts(terminal, plans, run.layout, usable)
            if not own:
                report_time.print_cost(terminal, run, plans[0], options.price)
            report_time.print_user_buffers(terminal, run, plans[: report.MAX_LAYOUTS], around, usable)
            print_full_length(terminal, options, long, plans[0], full, usable, around)
            report_time.print_assumptions(terminal, run, around)
            best = find_roomy(plans[: report.MAX_LAYOUTS], usable)
            if best is not plans[0]:
                terminal.print(
                    f"Layout 1 may run out of memory; the next command is of layout {plans.index(best) + 1}."
                )
            if command := next_command(options, flags, run, best):
                terminal.print(f"Next: {command}", soft_wrap=True, highlight=False)
    if options.picture and plans:
        shown = (
            f"{options.gpus} x {around.gpu.name}, {run.layout.global_batch} samples of {run.layout.seq_length:,} tokens"
        )
        with convert_disk_errors(options.picture, "--picture"):
            picture.draw(plans[: report.MAX_LAYOUTS], shown, options.picture)
    if not plans:
        print(f"{program_name()}: {report.explain_no_fit(run, usable, MAX_GPUS, around)}", file=sys.stderr)
    return 0 if plans else 1


def find_roomy(plans: list[Plan], usable: float) -> Plan:
    """Return the fastest plan with more memory left than the plan's error, or the fastest if none has."""
    return next((plan for plan in plans if not outside.is_close(plan.memory.device, usable)), plans[0])


def find_own_conflict(run: Run) -> str | None:
    """Return why the layout of the flags cannot run on this number of GPUs; None if it can.

    Raises:
        UsageError: it cannot run on any number of GPUs.
    """
    reason = layouts.find_conflict(run.model, run.layout)
    if reason and layouts.find_conflict(run.model, replace(run.layout, data=1)):
        raise UsageError(reason)
    return reason


def next_command(options: argparse.Namespace, flags: list[str], run: Run, best: Plan) -> str:
    """Return the command that trains with the layout of `best`.

    Recipe and flags keep their model, data and output; a placeholder stands for what neither has. It is "" where the
    recipe must be edited first.
    """
    words = flags
    for name in layouts.keys_to_remove(best.layout, run.layout):
        words = remove_flag(words, to_flag(name))
    words = [*words, *layouts.flags(best.layout, run.layout)]
    if run_from_flags(words, options.gpus).layout != best.layout:
        return ""
    args = parse_flags(flags)
    if not (args.embedded_data or args.load_hf or args.pretrained_checkpoint or args.load):
        words += ["--load-hf", "HF_MODEL"]
    if not (args.embedded_data or any(getattr(args, name) for name in LONG_DATA)):
        words += ["--data-path", "DATA"]
    if not (args.save or args.save_hf):
        words += ["--save", "extended"]
    return command_line("pretrain_cream", *words, torchrun=torchrun_flags(options, best.layout.tensor))


def remove_flag(words: list[str], flag: str) -> list[str]:
    """Return a command line without a flag and its values."""
    kept, inside = [], False
    for word in words:
        if word.startswith("--"):
            inside = word.partition("=")[0] == flag
        if not inside:
            kept.append(word)
    return kept


def torchrun_flags(options: argparse.Namespace, tensor: int) -> tuple[str, ...]:
    """Return the flags of torchrun: the fewest hosts with equal numbers of ranks, and whole tensor-parallel groups."""
    gpus = options.gpus
    fewest = -(-gpus // options.gpus_per_host)
    hosts = next(count for count in range(fewest, gpus + 1) if gpus % (count * tensor) == 0)
    ranks = f"--nproc_per_node={gpus // hosts}"
    if hosts == 1:
        return (ranks,)
    return (f"--nnodes={hosts}", ranks, "--rdzv_id=run1", "--rdzv_backend=c10d", "--rdzv_endpoint=node0:29500")


def print_full_length(
    terminal: Console,
    options: argparse.Namespace,
    long: Run,
    best: Plan,
    full: list[Plan],
    usable: float,
    around: Cluster,
) -> None:
    """Print what training at the target length would need, if the run uses shorter samples."""
    if full:
        report_time.print_full(terminal, long, best, full, options.price)
    elif long.target_length > best.layout.seq_length:
        why = report.explain_no_fit(long, usable, MAX_GPUS, around)
        terminal.print(f"at full length ({long.target_length:,} tokens) {why}", soft_wrap=True, highlight=False)


def console() -> Console:
    """Return the console for tables; 120 columns wide if it is not a terminal."""
    result = Console()
    if not result.is_terminal:
        result.width = 120
    return result


def cluster(options: argparse.Namespace) -> Cluster:
    """Return the GPUs and links that the flags describe."""
    gpu = GPUS[options.gpu]
    inside = {"nvlink": gpu.nvlink, "pcie": gpu.pcie}.get(options.host_link, options.host_link)
    between = options.network * 1e9 / 8 if options.network else gpu.network
    return Cluster(gpu=gpu, host=options.gpus_per_host, inside=inside, between=between)


def size(text: str) -> float:
    """Return the bytes of a size such as 80GiB; a type for `add_argument`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of GiB such as 80, or 80GiB, or 86GB")
    return float(match[1]) * (1e9 if (match[2] or "").upper() == "GB" else GIB)


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_GPUS:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 to {MAX_GPUS}")
    return int(text)


def link(text: str) -> str | float:
    """Return the name of a link, or its bytes per second; a type for `add_argument`."""
    return text if text in ("nvlink", "pcie") else 1e9 * above_zero(text)


def above_zero(text: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return float(text)


def parser() -> argparse.ArgumentParser:
    class OneLine(argparse.ArgumentParser):
        def error(self, message: str):
            raise UsageError(message)

    result = OneLine(
        description=__doc__,
        epilog=layouts.RULES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--gpus", type=positive, metavar="N", help="number of GPUs in total")
    result.add_argument(
        "--gpu", choices=GPUS, default="H100", help="GPU model (default: %(default)s); sets the defaults below"
    )
    result.add_argument(
        "--gpu-memory", type=size, metavar="GIB", help="memory of each GPU (default: 140 for H200, else 80)"
    )
    result.add_argument("--gpus-per-host", type=positive, default=8, metavar="N", help="default: %(default)s")
    result.add_argument(
        "--host-link",
        type=link,
        default="nvlink",
        metavar="LINK",
        help="link between the GPUs of a host: nvlink (default), pcie, or GB/s per direction",
    )
    result.add_argument(
        "--network",
        type=above_zero,
        metavar="GBIT",
        help="Gbit/s between hosts for each GPU (default: 400 for H100 and H200, 200 for A100)",
    )
    result.add_argument("--price", type=above_zero, help="price of one GPU for an hour, to show the cost of the run")
    result.add_argument(
        "--picture", type=path, metavar="FILE", help="draw the parts of a step's time for each layout listed"
    )
    result.add_argument("--check", action="store_true", help="compare predictions with measured runs, and make no plan")
    result.add_argument("--json", action="store_true", help="print the whole plan as JSON, memory in bytes")
    return result
