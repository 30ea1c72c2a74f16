"""Run the benchmarks of benchmarks/two_gpus.sh, which sets the environment, and print their table."""

import argparse
import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its profile.py hides the standard library's

from megatron_cream.common import devices
from megatron_cream.patches import platform

platform.setup()  # before any import of Megatron

import torch

from benchmarks.stopping import leave_no_ranks
from megatron_cream.common.errors import UsageError
from megatron_cream.model.attention import has_transformer_engine
from megatron_cream.planning import measured
from megatron_cream.planning.hardware import GPUS
from megatron_cream.training.quickstart import read_last_perplexity
from tests.faults import kill
from tests.launch import write_documents

JOB = ["pretrain_cream.py"]
STEP = re.compile(r"^step (\d+)/.*? ([\d,]+) tokens/s/\w+ \| (?:MFU ([\d.]+) % \| )?.*?([\d.]+) GiB$", re.M)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("stages", nargs="*", default=list(STAGES), metavar="STAGE", help=", ".join(STAGES))
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if unknown := set(args.stages) - STAGES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such stage; choose from {', '.join(STAGES)}")
    leave_no_ranks()
    runs = Runs(args.output.absolute(), extra)
    for stage in args.stages:
        started = time.monotonic()
        print(f"== {stage}", flush=True)
        STAGES[stage](runs)
        print(f"   {time.monotonic() - started:.0f} s", flush=True)
    print("\n".join(table(runs)))
    return 1 if runs.failed else 0


class Runs:
    """Launcher of runs; it stores one line per run in OUTPUT/results.jsonl and logs in OUTPUT/logs."""

    def __init__(self, folder: Path, extra: list[str]):
        self.folder, self.extra, self.failed = folder, extra, []
        self.file = folder / "results.jsonl"
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.results: dict[str, dict] = {result["run"]: result for result in map(json.loads, lines)}

    def keep(self, name: str, **found) -> None:
        self.results[name] = {"run": name, **found}
        with self.file.open("a") as file:
            file.write(json.dumps(self.results[name]) + "\n")
        shown = {key: value for key, value in found.items() if key not in ("losses", "flags")}
        print(f"{name:24} {shown}", flush=True)

    def launch(self, name: str, ranks: int, flags: list, *, script=JOB, gpu: int | None = None) -> str | None:
        """Run `torchrun --nproc_per_node=ranks pretrain_cream.py flags` and return its log.

        Returns None if the run failed, or if it already has a result.

        Args:
            gpu: the GPU of a run with one rank; None: the first.
        """
        if name in self.results:
            return None
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        environment = dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
        log = self.folder / "logs" / f"{re.sub(r'[^a-z0-9-]+', '_', name)}.txt"
        with log.open("w") as file:
            code = subprocess.run(
                [*command, *script, *map(str, flags)], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
            ).returncode
        text = log.read_text()
        if code:
            self.failed.append(name)
            said = [line for line in text.splitlines() if "Error" in line or "error:" in line]
            print(f"{name:24} failed: {(said or [text[-300:]])[0][:300]}", flush=True)
            return None
        return text


def default(runs: Runs) -> None:
    """Run pretrain_cream.py without flags."""
    started = time.monotonic()
    if runs.launch("default", 2, []) is not None:
        folder = max((ROOT / "runs").glob("quickstart-*"))
        before, after = (read_last_perplexity(folder / part) for part in ("base", "cream"))
        runs.keep("default", seconds=round(time.monotonic() - started, 1), before=before, after=after)


# ---------------------------------------------------------------- parity

SMALL = (
    "--num-layers 4 --hidden-size 512 --ffn-hidden-size 1376 --num-attention-heads 8 --seq-length 512 "
    "--target-length 4096 --rope-scaling-type linear --micro-batch-size 1 --global-batch-size 8 --lr 3e-4 "
    "--embedded-data --eval-iters 0 --num-workers 1 --seed 7"
).split()
LAYOUTS = {
    "one": (1, ""),
    "one, micro-batch 4": (1, "--micro-batch-size 4"),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "cp2": (2, "--context-parallel-size 2 --use-distributed-optimizer"),
    "dp2": (2, "--use-distributed-optimizer --no-overlap-grad-reduce"),
    "dp2, overlap": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
}
PRECISIONS = {
    "fp32": ("--fp32 --attention-backend sdpa", list(LAYOUTS)),
    "bf16": ("--attention-backend flash", list(LAYOUTS)),
    "bf16, te": ("--attention-backend te", ["one", "cp2"]),  # te: its ring attention
}


def parity(runs: Runs) -> None:
    """Measure losses of 20 steps from one checkpoint in each layout and precision; several runs at a time."""
    start, precisions = runs.folder / "start", PRECISIONS
    if not devices.has_cuda():
        precisions = {"fp32": PRECISIONS["fp32"]}
    elif not has_transformer_engine():
        precisions = {name: how for name, how in PRECISIONS.items() if not name.endswith("te")}
    if not (start / "latest_checkpointed_iteration.txt").is_file():
        flags = [
            *SMALL,
            "--train-iters",
            1,
            "--save",
            start,
            "--save-interval",
            1,
            "--attention-backend",
            "sdpa",
            *runs.extra,
        ]
        runs.launch("start", 1, flags)

    def run(precision: str, layout: str) -> None:
        name, (ranks, extra) = f"parity {precision}: {layout}", LAYOUTS[layout]
        board = runs.folder / "boards" / name.replace(" ", "-")
        flags = [*SMALL, "--train-iters", 20, "--pretrained-checkpoint", start, "--tensorboard-dir", board]
        flags += precisions[precision][0].split() + extra.split() + runs.extra
        if runs.launch(name, ranks, flags) is not None:
            runs.keep(name, losses=_losses(board))

    with ThreadPoolExecutor(6 if devices.has_cuda() else 1) as pool:
        list(pool.map(run, *zip(*((p, layout) for p, (_, layouts) in precisions.items() for layout in layouts))))


def _losses(board: Path) -> list[float]:
    """Return the logged loss of each step (float32)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.WARNING)

    return [event.value for event in EventAccumulator(str(board)).Reload().Scalars("lm loss")]


# ---------------------------------------------------------------- faults


def faults(runs: Runs) -> None:
    """Kill one of two ranks in a step, and one during a checkpoint write; torchrun restarts both ranks."""
    if "faults" in runs.results:
        return
    folder, steps = runs.folder / "faults", 100
    shutil.rmtree(folder, ignore_errors=True)  # from an earlier attempt
    folder.mkdir()
    documents = write_documents(folder / "documents", documents=20)
    flags = ["--hidden-size", 256, "--ffn-hidden-size", 688, "--kv-channels", 64, "--attention-backend", "sdpa"]
    flags += ["--deterministic", "--save-interval", 20]
    alone, killed, log = folder / "alone", folder / "killed", runs.folder / "logs" / "killed.txt"
    left_alone = kill.launch(documents, alone, steps, folder / "alone.txt", flags=[*flags, "--save", alone])
    process = kill.launch(documents, killed, steps, log, "--max-restarts=4", flags=[*flags, "--save", killed])
    known = 0
    for place in ("step", "checkpoint"):
        kill.wait_for(lambda: kill.newest(killed) > known, process)
        known = kill.newest(killed)
        if place == "step":
            time.sleep(0.05)
        else:
            kill.wait_for(lambda: kill.writing(killed, known), process)
        while not (running := kill.ranks(process)):
            time.sleep(0.1)
        running[-1].kill()
        print(f"killed one of {len(running)} ranks in a {place}, newest checkpoint {known}", flush=True)
    ended = process.wait() == 0 and left_alone.wait() == 0 and kill.newest(killed) == steps
    if not ended:
        runs.failed.append("faults")
        print(log.read_text()[-3000:])
        return
    kill.compare(alone, killed, steps)
    starts = len(list((killed / "runs").iterdir()))
    runs.keep("faults", starts=starts, same_bits=True, steps=steps)


# ---------------------------------------------------------------- 7B

CONFIG = "llama_7b_width"
SEVEN_B = "--num-layers 32 --micro-batch-size 1 --attention-backend flash --train-iters 5 --eval-iters 0".split()
FP8 = "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max".split()
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()
OVERLAP = "--overlap-grad-reduce --overlap-param-gather".split()
NO_OVERLAP = "--no-overlap-grad-reduce --no-overlap-param-gather".split()
# Megatron's own linear layers overlap sending with compute; Transformer Engine's do so only with user buffers.
OWN_LAYERS = [*TP2, "--transformer-impl", "local"]
# User buffers send each part of a product while the next part is computed.
SENDS_BESIDE = [*TP2, "--tp-comm-overlap"]
WITHOUT_TE = dict(script=["benchmarks/train_step.py", "child", "without"])
# Layout, its flags, the largest micro-batch, launch options. TP halves each product on a GPU; a larger micro-batch
# restores the size of the kernels.
LAYOUTS_OF_7B = [
    ("dp2", OVERLAP, 1, {}),
    ("tp2-sp, user buffers", SENDS_BESIDE, 8, {}),
    ("pp2", ["--pipeline-model-parallel-size", "2"], 1, {}),
    ("tp2-sp", TP2, 1, {}),
    ("tp2-sp, CUDA graphs", [*TP2, "--cuda-graph-impl", "local", "--te-rng-tracker"], 1, {}),
    ("dp2, no overlap", NO_OVERLAP, 1, {}),
    ("tp2-sp, own layers", OWN_LAYERS, 4, WITHOUT_TE),
    ("tp2-sp", TP2, 4, {}),
    ("tp2-sp, own layers", OWN_LAYERS, 1, WITHOUT_TE),
    ("dp2", OVERLAP, 2, {}),
]


def seven_b(runs: Runs) -> None:
    """Measure tokens/s/GPU of each layout with the paper's global batch (one GPU: half of it).

    If the whole model does not fit on one GPU, eight of its layers serve to compare layouts with one GPU.
    """
    batch = ["--global-batch-size", "32"]
    half = ["--global-batch-size", "16"]
    whole = fits(runs, "7b one", 1, [*SEVEN_B, *half])
    name, shape = ("7b", SEVEN_B) if whole else ("8 layers", [*SEVEN_B, "--num-layers", "8"])
    if not whole:
        for layout, flags, largest, how in LAYOUTS_OF_7B:
            _largest(runs, f"7b {layout}", [*SEVEN_B, *batch, *flags], largest, **how)
    with ThreadPoolExecutor(2) as both:
        one = both.submit(timed, runs, f"{name} one", 1, [*shape, *half], gpu=0)
        fp8 = [*shape, *half, *FP8, "--use-precision-aware-optimizer"]
        other = both.submit(timed, runs, f"{name} one, FP8", 1, fp8, gpu=1)
    one.result(), other.result()
    for layout, flags, largest, how in LAYOUTS_OF_7B:
        _largest(runs, f"{name} {layout}", [*shape, *batch, *flags], largest, **how)


def _largest(runs: Runs, name: str, flags: list[str], largest: int, **how) -> None:
    """Call `timed` with the largest micro-batch up to `largest` that fits."""
    for size in (size for size in (8, 4, 2, 1) if size <= largest):
        given = [*flags, "--micro-batch-size", str(size)]
        if size == 1 or fits(runs, f"{name}, micro-batch {size}", 2, given):
            return timed(runs, name if size == 1 else f"{name}, micro-batch {size}", 2, given, **how)


def full(runs: Runs) -> None:
    """Measure four samples a step: 32K tokens at all positions, and 4K tokens at CREAM's positions."""
    few = [*SEVEN_B, "--train-iters", "5", "--global-batch-size", "4"]
    long = [*few, *"--seq-length 32768 --position-sampler full".split()]
    long += "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    if fits(runs, "full, cp2", 2, [*long, "--context-parallel-size", "2"]):
        timed(runs, "4 samples: cream, dp2", 2, few)
        timed(runs, "4 samples: full, cp2", 2, [*long, "--context-parallel-size", "2"])
        ring = "--context-parallel-size 2 --attention-backend te --cp-comm-type p2p".split()
        timed(runs, "4 samples: full, cp2, te's ring", 2, [*long, *ring])
    else:
        timed(runs, "4 samples: cream, tp2-sp", 2, [*few, *TP2])
        timed(runs, "4 samples: full, tp2-sp", 2, [*long, *TP2])


def fits(runs: Runs, name: str, gpus: int, flags: list[str]) -> bool:
    """Return whether the run fits by the planner's estimate, with the flags after -- included."""
    memory = torch.cuda.get_device_properties(0).total_memory if devices.has_cuda() else 2**40
    try:
        needed = planned(name, gpus, [*flags, *runs.extra, "--use-distributed-optimizer"]).peak_gib
    except UsageError as error:  # flags after -- that this layout rejects
        print(f"{name:24} left out: {error}", flush=True)
        return False
    if needed * 2**30 > 0.97 * memory:
        print(f"{name:24} left out: the planner says that it takes {needed:.1f} GiB", flush=True)
        return False
    return True


def planned(name: str, gpus: int, flags: list[str]) -> measured.Checked:
    with _PLANNING:  # Megatron's flag parser reads sys.argv, so one at a time
        return measured.check_run(
            dict(what=name, gpu=_kind(), config=CONFIG, flags=flags, gpus=gpus, tokens_per_second=1, peak_gib=1.0)
        )


def _kind() -> str:
    """Return the planner's name for this machine's GPU; H200 if it knows none."""
    return next((kind for kind in GPUS if devices.has_cuda() and kind in torch.cuda.get_device_name()), "H200")


_PLANNING = Lock()


def timed(runs: Runs, name: str, gpus: int, flags: list[str], **how) -> None:
    """Run the 7B once; store its speed and memory, and the planner's estimates."""
    if name in runs.results or not fits(runs, name, gpus, flags):
        return
    flags = [*flags, *runs.extra, "--use-distributed-optimizer"]
    text = runs.launch(name, gpus, ["--config", CONFIG, *flags], **how)
    if text is None:
        return
    steps = [(float(m[2].replace(",", "")), float(m[3] or 0), float(m[4])) for m in STEP.finditer(text)][1:]
    rates, shares, peaks = zip(*steps)
    loss = float(re.findall(r"\| loss ([\d.]+)", text)[-1])
    plan = planned(name, gpus, flags)
    runs.keep(
        name,
        gpus=gpus,
        gpu=_kind(),
        tokens_per_second=statistics.median(rates),
        mfu=statistics.median(shares),
        peak_gib=max(peaks),
        loss=loss,
        planned_tokens_per_second=round(plan.speed.tokens_per_second),
        planned_gib=round(plan.peak_gib, 1),
        flags=flags,
    )


STAGES = {"default": default, "parity": parity, "faults": faults, "7b": seven_b, "full": full}


# ---------------------------------------------------------------- the table


def table(runs: Runs) -> list[str]:
    """Return the results as Markdown."""
    found, lines = runs.results, []
    if run := found.get("default"):
        lines += [f"default run: {run['seconds']} s", "", "| context | before | after |", "|---|---|---|"]
        lines += [f"| {n} | {run['before'][n]:.1f} | {run['after'][n]:.1f} |" for n in run["before"]] + [""]
    if any(name.startswith("parity") for name in found):
        lines += ["| 20 steps, largest relative difference of the loss from one GPU | " + " | ".join(PRECISIONS) + " |"]
        lines += ["|---" * (1 + len(PRECISIONS)) + "|"]
        for layout in LAYOUTS:
            cells = [_difference(found, precision, layout) for precision in PRECISIONS]
            if layout != "one" and any(cells):
                lines.append(f"| {layout} | " + " | ".join(cells) + " |")
        lines.append("")
    if run := found.get("faults"):
        lines += [
            f"killed twice, {run['starts']} starts, the same bits after {run['steps']} steps: {run['same_bits']}",
            "",
        ]
    rows = [run for name, run in found.items() if "tokens_per_second" in run]
    if rows:
        head = "| run | tokens/s/GPU | beside one GPU | MFU | GiB | planned tokens/s | planned GiB | loss |"
        lines += [head, "|---" * 8 + "|"]
        for run in rows:
            one = found.get(re.sub(r"^(7b|8 layers) .*", r"\1 one", run["run"]), {}).get("tokens_per_second")
            beside = f"{run['tokens_per_second'] / one:.3f}" if one and not run["run"].startswith("4 samples") else ""
            lines.append(
                f"| {run['run']} | {run['tokens_per_second']:,.0f} | {beside} | {run['mfu']:.1f} % | "
                f"{run['peak_gib']:.1f} | {run['planned_tokens_per_second']:,} | {run['planned_gib']} | {run['loss']} |"
            )
    return lines


def _difference(found: dict[str, dict], precision: str, layout: str) -> str:
    one, other = (found.get(f"parity {precision}: {name}", {}).get("losses") for name in ("one", layout))
    if not one or not other or len(one) != len(other):
        return ""
    return f"{max(abs(x - y) / y for x, y in zip(other, one)):.1e}"


if __name__ == "__main__":
    sys.exit(main())
