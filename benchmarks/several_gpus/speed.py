"""Speed of the 7B, of full length and of a 70B's layers, beside one GPU and beside the plan."""

import re
import statistics
from dataclasses import replace

from benchmarks.several_gpus import plan, report
from benchmarks.several_gpus.layouts import (
    BESIDE,
    CONFIG,
    CP,
    DEPTHS,
    FP8,
    HALF,
    LONG,
    MORE,
    OVERLAP,
    SEVEN_B,
    SEVENTY_B_LAYOUTS,
    SEVENTY_B_LORA,
    SPEED,
    TP,
    TUNING,
    Timed,
    list_sizes,
    long_flags,
    seventy_b_flags,
)
from benchmarks.several_gpus.runs import JOB, Job, Runs

STEP = re.compile(r"^step (\d+)/.*? ([\d,]+) tokens/s/\w+ \| (?:MFU ([\d.]+) % \| )?.*?([\d.]+) GiB$", re.M)
WITHOUT_TE = ("benchmarks/train_step.py", "child", "without")


def one(runs: Runs) -> list[Job]:
    """Time one GPU: the whole 7B if it fits, and 16 and 8 of its layers; each GPU has a run at the same time."""
    flags = f"{SEVEN_B} {HALF}"
    shapes = [("7b one", flags)] if plan.fits(runs.machine, "7b one", 1, _with(runs, flags)) else []
    shapes += [(f"{layers} layers one", f"{flags} --num-layers {layers}") for layers in BESIDE]
    jobs = []
    for gpu in range(runs.machine.count - (runs.machine.count > 4)):  # the last of eight is left for other runs
        name, given = shapes[gpu % len(shapes)]
        name = name if gpu < len(shapes) else f"{name}, GPU {gpu}"
        jobs.append(_job(runs, name, 1, given, gpus=(gpu,), limit=120))
    return jobs


def seven_b(runs: Runs) -> list[Job]:
    """Time each layout with the paper's global batch, 32 samples of 4096 tokens."""
    count = runs.machine.count
    jobs = [_largest(runs, "7b", timed, count) for timed in SPEED[count]]
    if count == 2:
        fp8 = f"{SEVEN_B} {HALF} {FP8} --use-precision-aware-optimizer"
        if plan.fits(runs.machine, "7b one, FP8", 1, _with(runs, fp8)):
            jobs.append(_job(runs, "7b one, FP8", 1, fp8, gpus=(0,)))
    return [job for job in jobs if job]


def seven_b_more(runs: Runs) -> list[Job]:
    """Time further layouts of the 7B."""
    jobs = [_largest(runs, "7b", timed, runs.machine.count) for timed in MORE.get(runs.machine.count, [])]
    return [job for job in jobs if job]


def tuning4(runs: Runs) -> list[Job]:
    """Time variants of TP 4 and PP 4, on GPUs 0 to 3 and 4 to 7 at the same time."""
    halves = [tuple(range(4)), tuple(range(4, 8)) if runs.machine.count >= 8 else tuple(range(4))]
    jobs = [_largest(runs, "7b", timed, 4, gpus=half) for pair in TUNING for timed, half in zip(pair, halves)]
    return [job for job in jobs if job]


def long(runs: Runs) -> list[Job]:
    """Time one sample of full length a step, and CREAM's samples of 4096 tokens, one on each GPU."""
    count = runs.machine.count
    prefix = runs.folder / "documents"
    jobs = [] if prefix.with_suffix(".idx").is_file() else [documents(runs, gpus=tuple(range(count)))]
    jobs.append(
        _job(runs, f"{count} samples: cream, dp{count}", count, f"{SEVEN_B} --global-batch-size {count} {OVERLAP}")
    )
    for name, how in ((f"cp{count}", CP[count]), (f"tp{count}", TP[count])):
        if plan.fits(runs.machine, f"full, {name}", count, _with(runs, long_flags(count, how))):
            job = _job(runs, f"full, {name}", count, long_flags(count, how), limit=110)
            data = ["--config", "benchmarks/several_gpus/long.yaml", "--data-path", prefix]
            return [*jobs, replace(job, flags=[*data, *job.flags[2:]])]
    return jobs


def documents(runs: Runs, gpus: tuple[int, ...] = ()) -> Job:
    """Return the job that writes documents of full length, for which these GPUs wait."""
    script = ("benchmarks.several_gpus.documents",)
    return Job("documents", 0, [runs.folder / "documents"], lambda text: {}, gpus, script, limit=60)


def evaluation(runs: Runs) -> list[Job]:
    """Time one prompt of full length on a 7B of random weights, with tensor and with context parallelism."""
    count = runs.machine.count
    if not runs.machine.gpu:
        return []
    return [
        Job(
            f"prompt, {name}{count}",
            count,
            [f"--{kind}-parallel-size", count, "--length", LONG[count]],
            report.last_json,
            script=("benchmarks/long_ranks.py",),
            limit=150,
        )
        for name, kind in (("tp", "tensor-model"), ("cp", "context"))
    ]


def seventy_b(runs: Runs) -> list[Job]:
    """Time a 70B's layers in each layout, as many as fit, and all of them with adapters."""
    count, memory = runs.machine.count, runs.machine.memory
    jobs = []
    for name, how in SEVENTY_B_LORA.get(count, {}).items():
        name, flags = f"70b {name}", seventy_b_flags(how, DEPTHS[0])
        if plan.fits(runs.machine, name, count, _with(runs, flags)):
            jobs.append(_job(runs, name, count, flags, limit=150))
    for name, how in SEVENTY_B_LAYOUTS[count].items():
        for layers in DEPTHS:
            flags = seventy_b_flags(how, layers)
            if plan.leaves_room(plan.predict(runs.machine.gpu, count, _with(runs, flags)), memory):
                jobs.append(_job(runs, f"70b width {name}, {layers} layers", count, flags, limit=75))
                break
    return jobs


def read_steps(text: str) -> list[tuple[float, float, float]]:
    """Return (tokens/s, MFU in %, GiB) of a log's steps from the third on; of the second if it is the last.

    The first has no speed in the log, and the second is often slower than the rest.
    """
    steps = [(float(m[2].replace(",", "")), float(m[3] or 0), float(m[4])) for m in STEP.finditer(text)]
    return steps[1:] or steps


def _largest(runs: Runs, model: str, timed: Timed, ranks: int, gpus: tuple[int, ...] | None = None) -> Job | None:
    """Return the job with the largest micro-batch that fits."""
    for size, flags in list_sizes(timed):
        name = f"{model} {timed.name}" + (f", micro-batch {size}" if size > 1 else "")
        if plan.fits(runs.machine, name, ranks, _with(runs, flags)):
            script = WITHOUT_TE if timed.own_layers else JOB
            return _job(runs, name, ranks, flags, gpus, script=script)
    return None


def _with(runs: Runs, flags: str) -> str:
    return " ".join([flags, *runs.extra])


def _job(
    runs: Runs,
    name: str,
    ranks: int,
    flags: str,
    gpus: tuple[int, ...] | None = None,
    *,
    script: tuple[str, ...] = JOB,
    limit: float = 75,
) -> Job:
    """Return a timed run of the 7B or a similar model."""
    flags = _with(runs, flags)

    def read(text: str) -> dict:
        rates, shares, peaks = zip(*read_steps(text), strict=True)
        found = plan.predict(runs.machine.gpu, ranks, flags)
        return dict(
            gpus=ranks,
            gpu=runs.machine.gpu,
            tokens_per_second=statistics.median(rates),
            steps=rates,
            mfu=statistics.median(shares),
            peak_gib=max(peaks),
            loss=float(re.findall(r"\| loss ([\d.]+)", text)[-1]),
            planned_tokens_per_second=found.get("tokens_per_second"),
            planned_gib=found.get("gib"),
            planned_device_gib=found.get("device"),
            flags=flags.split(),
        )

    return Job(name, ranks, ["--config", CONFIG, *flags.split()], read, gpus, script, limit)
