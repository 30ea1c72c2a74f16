"""Losses of 20 steps from one checkpoint in each layout, beside one rank."""

import logging
from pathlib import Path

from benchmarks.several_gpus.layouts import ONE, PARITY, PRECISIONS, SMALL
from benchmarks.several_gpus.runs import Job, Runs


def parity(runs: Runs) -> list[Job]:
    """Measure losses in float32."""
    return start_jobs(runs, ["fp32"]) + layout_jobs(runs, "fp32")


def parity_bf16(runs: Runs) -> list[Job]:
    """Measure losses in bf16, and with Transformer Engine's ring attention; on GPUs only."""
    if not runs.machine.gpu:
        return []
    return start_jobs(runs, ["bf16", "bf16, te"]) + layout_jobs(runs, "bf16") + layout_jobs(runs, "bf16, te")


def start_jobs(runs: Runs, precisions: list[str]) -> list[Job]:
    """Return the runs of one rank: the start's checkpoint, and the losses to compare with. They share the last GPU."""
    gpu = (runs.machine.count - 1,)
    jobs = []
    if not (_start(runs) / "latest_checkpointed_iteration.txt").is_file():
        flags = [*SMALL.split(), "--train-iters", 1, "--save", _start(runs), "--save-interval", 1]
        jobs.append(Job("start", 1, [*flags, "--attention-backend", "sdpa", *runs.extra], lambda text: {}, gpu))
    layouts = ONE if runs.machine.count < 8 else ["one"]
    return jobs + [_job(runs, precision, layout, *ONE[layout], gpu) for precision in precisions for layout in layouts]


def layout_jobs(runs: Runs, precision: str) -> list[Job]:
    """Return the runs of all layouts of several ranks."""
    layouts = PARITY[runs.machine.count]
    if precision == "bf16, te":
        layouts = {name: how for name, how in layouts.items() if name.startswith("cp") and " x " not in name}
    return [_job(runs, precision, name, *how) for name, how in layouts.items()]


def _start(runs: Runs) -> Path:
    return runs.folder / "start"


def _job(runs: Runs, precision: str, layout: str, ranks: int, extra: str, gpus: tuple[int, ...] | None = None) -> Job:
    name = f"parity {precision}: {layout}"
    board = runs.folder / "boards" / name.replace(" ", "-")
    flags = [*SMALL.split(), "--train-iters", 20, "--pretrained-checkpoint", _start(runs), "--tensorboard-dir", board]
    flags += PRECISIONS[precision].split() + extra.split() + runs.extra
    return Job(name, ranks, flags, lambda text: {"losses": _losses(board)}, gpus, limit=60 if runs.machine.gpu else 600)


def _losses(board: Path) -> list[float]:
    """Return the logged loss of each step (float32)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    return [event.value for event in EventAccumulator(str(board)).Reload().Scalars("lm loss")]  # KeyError: no step
