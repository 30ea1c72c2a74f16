"""Predictions beside what was measured: the runs of megatron_cream/planning/measured_runs.json."""

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
    """One measured run.

    row: as the file has it. config, flags: what was started; gpus (default: 1) of the kind gpu; engine: fields of
        `Engine` that no flag sets, for Megatron's own model and this project's earlier kernels;
        tokens_per_second: of each GPU; peak_gib: of torch's allocator, on the fullest pipeline stage or on `stage`;
        fits: the constants of `hardware` that it gave, beside: where they are of two runs, the other one; off: why
        the time predicted is; profile: milliseconds of a traced step by kind of kernel.
    speed, peak_gib: predicted.
    """

    row: dict
    speed: Speed
    peak_gib: float

    @property
    def memory_error(self) -> float:
        return self.peak_gib / self.row["peak_gib"] - 1

    @property
    def time_error(self) -> float:
        """Of the tokens a second."""
        return self.speed.tokens_per_second / self.row["tokens_per_second"] - 1


def load() -> list[dict]:
    return json.loads(RUNS.read_text())


def run(row: dict) -> Run:
    """What ran, from its flags."""
    flagged = run_from_flags(["--config", row["config"], *row["flags"]], row.get("gpus", 1))
    return replace(flagged, engine=replace(flagged.engine, **row.get("engine", {})))


def cluster(row: dict) -> Cluster:
    """Where it ran."""
    gpu = GPUS[row["gpu"]]
    return Cluster(gpu=gpu, host=8, inside=gpu.nvlink, between=gpu.network)


def check(row: dict) -> Checked:
    """Predict a measured run."""
    ran, around = run(row), cluster(row)
    needed = memory.predict(ran.model, ran.layout, ran.engine, row.get("stage"))
    return Checked(row, step_time.predict(ran.model, ran.layout, ran.engine, around), needed.allocated / GIB)


def print_check(console: Console) -> None:
    """Every measured run: tokens a second of each GPU and torch's peak, predicted and measured."""
    table = Table(title="predicted beside measured", title_justify="left")
    table.add_column("run")
    for name in ("tokens/s", "measured", "error", "GiB", "measured", "error"):
        table.add_column(name, justify="right")
    table.add_column("gave", style="dim")
    for row in load():
        found = check(row)
        time = (
            f"{found.speed.tokens_per_second:,.0f}", f"{row['tokens_per_second']:,}", f"{found.time_error:+.1%}"
        )  # fmt: skip
        space = (
            f"{found.peak_gib:.1f}", f"{row['peak_gib']:.1f}", f"{found.memory_error:+.1%}"
        )  # fmt: skip
        note = f"off: {row['off']}" if "off" in row else row.get("fits", "")
        table.add_row(row["what"], *time, *space, note)
    console.print(table)
    console.print(
        "gave: the constants of megatron_cream/planning/hardware.py fitted on that run; all others are checks"
    )
