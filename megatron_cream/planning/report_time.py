"""The planner's report of time: parts of a step, cost of a run, and assumptions."""

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from megatron_cream.planning import communication, layouts
from megatron_cream.planning.hardware import FP8_PARAMETERS, GIB, LINKS, OVERLAP_COST, PASSES, RING, Cluster
from megatron_cream.planning.layouts import Plan, rank_plan
from megatron_cream.planning.outside import is_close
from megatron_cream.planning.report import format_layout
from megatron_cream.planning.run import Run
from megatron_cream.planning.step_time import Speed, Time, attention_share, launch_seconds, product_share

NOTES = {
    "products": "the linears' matrix products, forward and backward",
    "attention": "forward and backward",
    "passes": "norms, residual sums, rotary, SwiGLU, loss, embedding, casts",
    "recompute": "forward passes repeated in the backward pass",
    "tensor": "waiting for tensor-parallel ranks",
    "context": "waiting for context-parallel ranks",
    "pipeline": "waiting for activations and gradients between stages",
    "bubble": "stages waiting at the beginning and end of a step",
    "data": "waiting for gradients and weights",
    "optimizer": "AdamW, setting gradients to zero",
    "idle": "waiting for the host",
}


def print_time(console: Console, run: Run, speed: Speed, price: float | None) -> None:
    """Print the parts of a step in the run's own layout, and the time and cost of all steps."""
    table = Table(title="time of a step in this layout", title_justify="left")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", style="dim")
    for field in fields(Time):
        value = getattr(speed.time, field.name)
        if value > 0.5e-4:
            note = NOTES[field.name] + _format_volume(run, field.name)
            table.add_row(field.name, f"{1e3 * value:,.1f}", f"{value / speed.time.step:.1%}", note)
    table.add_row("step", f"{1e3 * speed.time.step:,.1f}", "", rates(speed))
    console.print(table)
    console.print(cost(run, speed, run.layout.gpus, price), soft_wrap=True, highlight=False)


def print_cost(console: Console, run: Run, fastest: Plan, price: float | None) -> None:
    """Print the time and cost of all steps in the fastest layout."""
    console.print(f"layout 1: {cost(run, fastest.speed, fastest.layout.gpus, price)}", soft_wrap=True, highlight=False)


def _format_volume(run: Run, part: str) -> str:
    """Return the gigabytes that a rank's group exchanges in a step, overlapped or not."""
    group = {"tensor": "tp", "context": "cp", "pipeline": "pp", "data": "dp"}.get(part)
    if group is None:
        return ""
    volumes = communication.count_bytes(run.model, run.layout, run.engine, 0)
    nbytes = sum(value for (where, _), value in volumes.items() if where == group)
    return f"; {nbytes / 1e9:,.1f} GB in all"


def rates(speed: Speed) -> str:
    """Return tokens/s of each GPU and MFU as text."""
    return f"{speed.tokens_per_second:,.0f} tokens/s/GPU, MFU {speed.utilization:.1%}"


def cost(run: Run, speed: Speed, gpus: int, price: float | None) -> str:
    """Return one line with the time of the run's steps and their cost.

    Args:
        run: the run; without a number of steps, 1000 are assumed.
        speed: the speed of a step.
        gpus: number of GPUs that are paid for.
        price: price of one GPU for an hour, in any currency; None to omit it.
    """
    steps = run.steps or 1000
    hours = steps * speed.time.step / 3600
    line = f"{steps:,} steps: {3600 * hours:,.0f} s, {hours:,.1f} hours, {hours * gpus:,.1f} GPU-hours"
    return line if price is None else f"{line}, {hours * gpus * price:,.2f} at {price:g} a GPU-hour"


def print_user_buffers(console: Console, run: Run, plans: list[Plan], cluster: Cluster, usable: float) -> None:
    """Print the gain of --tp-comm-overlap for the fastest plan that it makes faster and that still fits with it."""
    for number, plan in enumerate(plans, 1):
        faster = layouts.with_user_buffers(plan, run.model, run.engine, cluster)
        if faster and faster.memory.device <= usable and rank_plan(faster) < rank_plan(plan):
            close = "; it may run out of memory" if is_close(faster.memory.device, usable) else ""
            console.print(
                f"{number} with --tp-comm-overlap: {faster.speed.time.step:.2f} s a step, {rates(faster.speed)}, "
                f"{faster.memory.device / GIB:.1f} GiB (Transformer Engine's user buffers, over NVLink){close}",
                soft_wrap=True,
                highlight=False,
            )
            return


def print_full(console: Console, run: Run, best: Plan, full: list[Plan], price: float | None) -> None:
    """Print the cost of training at the target length, relative to the run's best layout."""
    plan = full[0]
    ratio = plan.speed.time.step / best.speed.time.step
    flags = f"--position-sampler full --seq-length {plan.layout.seq_length}"
    console.print(
        f"as many samples at full length ({flags}): {ratio:,.1f} times as long as layout 1, on the same GPUs\n"
        f"  {cost(run, plan.speed, plan.layout.gpus, price)}\n"
        f"  {format_layout(plan.layout)}: {plan.speed.time.step:,.1f} s a step, {rates(plan.speed)}",
        soft_wrap=True,
        highlight=False,
    )


def print_assumptions(console: Console, run: Run, cluster: Cluster) -> None:
    """Print the assumptions behind the predicted times."""
    length = run.layout.seq_length
    gpu, attention = cluster.gpu, attention_share(run.engine.attention, length)
    peaks = f"{gpu.bf16 / 1e12:,.0f} TFLOP/s in bf16" + (f", {gpu.fp8 / 1e12:,.0f} in FP8" if gpu.fp8 else "")
    links = f"{cluster.inside / 1e9:g} GB/s each way between the {cluster.host} GPUs of a host"
    if run.gpus > cluster.host:
        links += f", {cluster.between / 1e9:g} GB/s of network for each GPU"
    lines = [
        f"{gpu.name}: {peaks}, {gpu.bandwidth / 1e12:g} TB/s ({gpu.source})",
        f"shares of these peaks, fitted on runs of {'one H100' if gpu.products != 1 else 'one H200'}: products "
        f"{product_share(gpu, None):.0%} (FP8 {product_share(gpu, run.engine.fp8 or 'delayed'):.0%}); fitted on one "
        f"H200 and used for every GPU: attention {attention:.0%} at {length:,} tokens, memory bandwidth {PASSES:.0%}",
    ]
    source = "as in runs with TP 2 on two hosts" if run.layout.tensor > 1 else "as in one run on an H100"
    host = 1e3 * launch_seconds(run.model, run.layout, run.engine)
    if run.engine.graphs:
        lines.append(
            "the host launches a layer's CUDA graphs in negligible time; the memory that they hold is inferred from "
            "the peaks of two models on one GPU"
        )
    else:
        lines.append(f"the host takes {host:.1f} ms to launch a layer, forward and backward, {source}")
    if run.layout.context > 1 and not run.engine.gathers_keys:
        lines.append(f"attention in Transformer Engine's ring at {RING:.0%} of its rate, as in one run on two H100s")
    if run.engine.fp8_parameters:
        lines.append(
            f"{1e3 * FP8_PARAMETERS:.0f} ms a step to cast the FP8 parameters of a layer, as in one run on one GPU"
        )
    if run.gpus > 1:
        lines += [
            f"{links}; a ring reaches {LINKS['pair']:.0%} of it between two GPUs of a host, {LINKS['inside']:.0%} "
            f"among more (one run each on H200s), and {LINKS['between']:.0%} between hosts (not measured)",
            f"overlapped transfers slow computation by {OVERLAP_COST['pair']:.0%} of their time, as in one run with TP "
            f"2, gradients and user buffers among more GPUs by {OVERLAP_COST['more']:.0%}, as in ten runs",
            "all GPUs have the same speed",
            f"gradients are reduced in buckets of {communication.BUCKET / 1e6:g} million parameters or more",
        ]
    lines.append("not included: start, waiting for data, evaluation, checkpoints")
    console.print("assumed:\n" + "\n".join(f"- {line}" for line in lines), soft_wrap=True, highlight=False)
