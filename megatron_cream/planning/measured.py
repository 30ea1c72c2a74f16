"""Comparison of predictions with the measured runs of measured_runs.json."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_cream.planning import memory, step_time
from megatron_cream.planning.flags import run_from_flags
from megatron_cream.planning.hardware import GIB, GPUS, Cluster
from megatron_cream.planning.run import Run
from megatron_cream.planning.step_time import Speed

RUNS = Path(__file__).with_name("measured_runs.json")


@dataclass(frozen=True)
class Checked:
    """One measured run and its prediction.

    row: the entry of the file, with these keys.
        config, flags: the command line; gpus: number of GPUs (default: 1); gpu: their kind.
        engine: fields of `Engine` that no flag sets, for Megatron's own model and this project's earlier kernels.
        model: fields of `Model` that differ from the recipe and have no flag.
        tokens_per_second: of each GPU.
        peak_gib: peak of torch's allocator, on the fullest pipeline stage or on `stage`.
        fits: the constants of `hardware` that were fitted on it.
        off: why the predicted time is wrong.
        slow: what was slow on that host; no constant is fitted on the run.
        profile: milliseconds of a traced step by kind of kernel.
    speed, peak_gib, device_gib: the prediction.
    """

    row: dict
    speed: Speed
    peak_gib: float
    device_gib: float

    @property
    def memory_error(self) -> float:
        """Relative error of the predicted peak memory."""
        return self.peak_gib / self.row["peak_gib"] - 1

    @property
    def time_error(self) -> float:
        """Relative error of the predicted tokens per second."""
        return self.speed.tokens_per_second / self.row["tokens_per_second"] - 1


def load_runs() -> list[dict]:
    """Return the rows of measured_runs.json."""
    return json.loads(RUNS.read_text())


def build_run(row: dict) -> Run:
    """Return the run of a row, from its flags, its `engine` and its `model`."""
    found = run_from_flags(["--config", row["config"], *row["flags"]], row.get("gpus", 1))
    engine, model = (replace(getattr(found, name), **row.get(name, {})) for name in ("engine", "model"))
    return replace(found, engine=engine, model=model)


def build_cluster(row: dict) -> Cluster:
    """Return the cluster of a row: hosts of eight GPUs with NVLink."""
    gpu = GPUS[row["gpu"]]
    return Cluster(gpu=gpu, host=8, inside=gpu.nvlink, between=gpu.network)


def check_run(row: dict) -> Checked:
    """Predict a measured run."""
    ran, around = build_run(row), build_cluster(row)
    needed = memory.predict(ran.model, ran.layout, ran.engine, row.get("stage"))
    speed = step_time.predict(ran.model, ran.layout, ran.engine, around)
    return Checked(row, speed, needed.allocated / GIB, needed.device / GIB)


def print_check(console: Console) -> None:
    """Print predicted and measured tokens/s of each GPU and peak memory of every run."""
    table = Table(title="predicted and measured", title_justify="left")
    table.add_column("run")
    for name in ("tokens/s", "measured", "error", "GiB", "measured", "error"):
        table.add_column(name, justify="right")
    table.add_column("fitted", style="dim")
    for row in load_runs():
        found = check_run(row)
        time = (f"{found.speed.tokens_per_second:,.0f}", f"{row['tokens_per_second']:,}", f"{found.time_error:+.1%}")
        space = (f"{found.peak_gib:.1f}", f"{row['peak_gib']:.1f}", f"{found.memory_error:+.1%}")
        note = f"off: {row['off']}" if "off" in row else row.get("slow", row.get("fits", ""))
        table.add_row(row["what"], *time, *space, note)
    console.print(table)
    console.print(
        "fitted: the constants of megatron_cream/planning/hardware.py that were fitted on that run; the other runs are "
        "checks"
    )
