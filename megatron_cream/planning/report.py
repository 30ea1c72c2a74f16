"""The planner's report: tables of memory and layouts, and a dict for --json.

`report_time` has the tables of time.
"""

from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_cream.planning import layouts
from megatron_cream.planning.hardware import GIB, Cluster
from megatron_cream.planning.layouts import Plan, flags, keys_to_remove, settings
from megatron_cream.planning.memory import FRAGMENTATION, Memory
from megatron_cream.planning.outside import COMMUNICATOR, CONTEXT, ERROR, is_close
from megatron_cream.planning.run import Layout, Run
from megatron_cream.planning.weights import parameters, trained_parameters

MAX_LAYOUTS = 8
"""Maximum number of layouts that are printed and drawn."""


def print_memory(console: Console, run: Run, own: Memory, usable: float) -> None:
    """Print the memory of the run's own layout, part by part."""
    model, layout, engine = run.model, run.layout, run.engine
    one = Layout(seq_length=1, micro_batch=1, global_batch=1)
    whole, trained = parameters(model, one, 0), trained_parameters(model, one, 0)
    lora = f"{trained / 1e6:,.1f} M trained with LoRA, " if model.lora else ""
    console.print(
        f"{whole / 1e9:.2f} B parameters, {lora}vocabulary {model.padded_vocab_size:,} (padded), "
        f"{'Transformer Engine' if engine.transformer_engine else 'local'} layers, {8 * engine.element} bit"
        f"{' with FP8 linears' if engine.fp8 else ''}, {layout.seq_length} tokens x micro-batch {layout.micro_batch}"
    )
    shards = layout.data * layout.context if layout.distributed_optimizer else 1
    where = f"stage {own.stage} of {layout.pipeline}, " if layout.pipeline > 1 else ""
    rows = [
        ("parameters", own.parameters, where + _split(layout)),
        ("gradients", own.gradients, f"{8 * engine.gradient} bit"),
        ("optimizer", own.optimizer, f"{engine.optimizer} bytes a parameter" + f" / {shards}" * (shards > 1)),
        ("of the host", own.host, "optimizer state and gradients of a GPU's rank; not counted below"),
        ("activations", own.activations, f"kept for the backward pass; recompute {_recompute(layout)}"),
        ("logits and loss", own.loss, "with their gradients"),
        ("working", own.working, "temporary tensors of the backward pass"),
        ("buffers", own.buffers, "workspaces, placeholders for gradients, gathered sequences, FP8 weights, graphs"),
        ("torch's peak", own.allocated, f"at: {own.peak_at}"),
        ("on the device", own.device, _outside(own)),
    ]
    table = Table(title="memory of each GPU in this layout", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    table.add_column("", style="dim")
    for name, value, note in rows:
        if value:
            table.add_row(name, f"{value / GIB:.1f}", note)
    console.print(table)
    console.print(_verdict(own, usable))


def print_layouts(console: Console, plans: list[Plan], base: Layout, usable: float) -> None:
    """Print the layouts that fit, fastest first, with the flags of each, and mark those that may not."""
    table = Table(title="layouts that fit, fastest first", title_justify="left")
    names = ("", "TP", "PP", "CP", "DP", "micro-batch", "recompute", "GiB", "left", "s/step", "tokens/s/GPU", "MFU")
    for name in names:
        table.add_column(name, justify="left" if name == "recompute" else "right")
    for number, plan in enumerate(plans[:MAX_LAYOUTS], 1):
        layout, needed, speed = plan.layout, plan.memory.device, plan.speed
        sizes = (number, layout.tensor, layout.pipeline, layout.context, layout.data, layout.micro_batch)
        left = f"{(usable - needed) / GIB:.1f}" + "*" * is_close(needed, usable)
        table.add_row(
            *map(str, sizes),
            _recompute(layout),
            f"{needed / GIB:.1f}",
            left,
            f"{speed.time.step:.2f}",
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.utilization:.1%}",
        )
    console.print(table)
    if any(is_close(plan.memory.device, usable) for plan in plans[:MAX_LAYOUTS]):
        console.print(f"* within the plan's error of {ERROR / GIB:.0f} GiB: it may run out of memory")
    console.print("flags to add for each layout:")
    for number, plan in enumerate(plans[:MAX_LAYOUTS], 1):
        console.print(f"{number}: {_difference(plan.layout, base)}", soft_wrap=True, highlight=False)
    if len(plans) > MAX_LAYOUTS:
        console.print(f"{len(plans) - MAX_LAYOUTS} more fit (--json lists all)")


def explain_no_fit(run: Run, usable: float, max_gpus: int, cluster: Cluster) -> str:
    """Return one line with the memory or the number of GPUs that the run would need."""
    smallest = layouts.find_smallest(run.model, run.layout, run.engine, run.gpus, cluster.host)
    if smallest is None:
        line = _explain_no_split(run, usable, cluster)
    else:
        line = f"no layout fits into {usable / GIB:.1f} usable GiB of each of {run.gpus} GPU{'s' * (run.gpus > 1)}"
        line += f"; the smallest needs {smallest[1].device / GIB:.1f} GiB, with {format_layout(smallest[0])}"
    more = 1 << (run.gpus.bit_length() - 1)
    while (more := 2 * more) <= max_gpus:
        found = layouts.find_fitting(run.model, run.layout, run.engine, more, usable, cluster)
        if found:
            return f"{line}; {more} GPUs are enough, with {format_layout(found[0].layout)}"
    return f"{line}; at this global batch and length even {max_gpus} GPUs are not enough"


def _explain_no_split(run: Run, usable: float, cluster: Cluster) -> str:
    """Return that nothing can be divided over this number of GPUs, and a larger global batch that can.

    Each data-parallel rank has a share of a multiple of the number of GPUs.
    """
    model, layout = run.model, run.layout
    line = (
        f"--gpus {run.gpus}: no layout divides the {model.num_layers} layers, {model.num_attention_heads} heads, "
        f"{layout.seq_length} tokens and --global-batch-size {layout.global_batch} over them"
    )
    batch = -(-layout.global_batch // run.gpus) * run.gpus
    larger = replace(layout, global_batch=batch)
    if layouts.find_fitting(run.model, larger, run.engine, run.gpus, usable, cluster):
        line += f"; with --global-batch-size {batch} one fits"
    return line


def as_dict(
    run: Run, cluster: Cluster, own: Plan | None, plans: list[Plan], full: list[Plan], gpu_memory: float, usable: float
) -> dict[str, Any]:
    """Return the whole plan as plain values, memory in bytes and times in seconds.

    Args:
        run: the run of the flags.
        cluster: the assumed cluster.
        own: the run's own layout; None if it cannot run on this number of GPUs.
        plans: layouts that fit, fastest first.
        full: layouts for training at the target length.
        gpu_memory: bytes of a GPU.
        usable: bytes of it that a layout may use.
    """
    return {
        "gpus": run.gpus,
        "gpu_memory": round(gpu_memory),
        "usable": round(usable),
        "model": asdict(run.model),
        "engine": asdict(run.engine),
        "cluster": asdict(cluster),
        "steps": run.steps,
        "own": _plan(own, usable) | {"fits": own.memory.device <= usable} if own else None,
        "layouts": [_plan(plan, usable) for plan in plans],
        "full": [_plan(plan, usable) for plan in full],
    }


def _plan(plan: Plan, usable: float) -> dict[str, Any]:
    totals = {"allocated": plan.memory.allocated, "device": plan.memory.device}
    return {
        "layout": asdict(plan.layout),
        "memory": asdict(plan.memory) | totals,
        "is_close": is_close(plan.memory.device, usable),
        "settings": settings(plan.layout),
        "time": asdict(plan.speed.time) | {"step": plan.speed.time.step},
        "tokens_per_second": plan.speed.tokens_per_second,
        "utilization": plan.speed.utilization,
    }


def _difference(layout: Layout, base: Layout) -> str:
    parts = [" ".join(flags(layout, base))] if flags(layout, base) else []
    if removed := keys_to_remove(layout, base):
        parts.append(f"leave out, or set in the recipe, {', '.join(f'{name}: null' for name in removed)}")
    return "; ".join(parts) or "none: this is the layout above"


def _verdict(own: Memory, usable: float) -> str:
    left = (usable - own.device) / GIB
    if left >= 0:
        said = f"fits: {left:.1f} of {usable / GIB:.1f} GiB are left"
        if is_close(own.device, usable):
            said += f", within the plan's error of {ERROR / GIB:.0f} GiB: it may run out of memory"
        return said
    return f"does not fit: needs {-left:.1f} GiB more than the {usable / GIB:.1f} usable GiB of a GPU"


def format_layout(layout: Layout) -> str:
    """Return the layout as text for a person."""
    return f"{_split(layout)}, micro-batch {layout.micro_batch}, recompute {_recompute(layout)}"


def _split(layout: Layout) -> str:
    return f"TP {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, DP {layout.data}"


def _recompute(layout: Layout) -> str:
    if layout.recompute == "selective":
        return " ".join(layout.recompute_modules)
    if layout.recompute == "full":
        if layout.recompute_method == "uniform":
            return "full"
        return f"full, {layout.recompute_layers} layers a stage"
    return "none"


def _outside(own: Memory) -> str:
    parts = [f"{FRAGMENTATION:.0%} unused pieces", f"{CONTEXT / GIB:.1f} CUDA"]
    if own.communicators:
        parts.append(f"{own.communicators * COMMUNICATOR / GIB:.1f} NCCL")
    if own.user_buffers:
        parts.append(f"{own.user_buffers / GIB:.1f} user buffers")
    return ", ".join(parts)
