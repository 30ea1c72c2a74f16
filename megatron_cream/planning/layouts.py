"""Search for layouts that Megatron accepts and that fit, ordered by predicted step time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_cream.common.cli import to_flag
from megatron_cream.config.checks.layout import find_interleaving_conflict
from megatron_cream.model.user_buffers import is_ring_faster
from megatron_cream.planning import memory, step_time
from megatron_cream.planning.hardware import Cluster
from megatron_cream.planning.memory import Memory
from megatron_cream.planning.run import Engine, Layout, Model
from megatron_cream.planning.step_time import Speed

MICRO_BATCHES = (1, 2, 4, 8, 16)

DRIVER_SHARE = 0.01
"""Share of a GPU's memory that the driver keeps; an "80 GB" A100 or H100 leaves 79.2 GiB for programs."""

RULES = """\
Layouts are ordered by predicted step time. For each TP x PP x CP the fastest is listed, among all micro-batches with
no recompute, --recompute-modules mlp, or full recompute of as few layers as needed. TP stays within a host and always
has --sequence-parallel; transfers of gradients and weights overlap with computation."""


@dataclass(frozen=True)
class Plan:
    """A layout with its predicted memory and speed."""

    layout: Layout
    memory: Memory
    speed: Speed


def usable(gpu_memory: float) -> float:
    """Return the bytes of a GPU's memory that a process can use, from its bytes in all."""
    return gpu_memory * (1 - DRIVER_SHARE)


def find_conflict(model: Model, layout: Layout) -> str | None:
    """Return why Megatron rejects this layout, beginning with the flag, or None."""
    tp, pp, cp, virtual = layout.tensor, layout.pipeline, layout.context, layout.virtual_pipeline
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % tp or (groups % tp and tp % groups):
        return (
            f"--tensor-model-parallel-size {tp}: must divide --num-attention-heads {heads}, and divide or be a "
            f"multiple of --num-query-groups {groups}"
        )
    if model.lora and groups % tp:
        return f"--tensor-model-parallel-size {tp}: must divide --num-query-groups {groups} with --lora-rank"
    if model.ffn_hidden_size % tp:
        return f"--tensor-model-parallel-size {tp}: must divide --ffn-hidden-size {model.ffn_hidden_size}"
    ends = [count for count in (layout.first_stage, layout.last_stage) if count is not None]
    others = pp - len(ends)
    rest = model.num_layers - sum(ends)
    if rest < 0 or (rest % (others * virtual) if others else rest):
        return (
            f"--pipeline-model-parallel-size {pp}: --num-layers {model.num_layers} cannot be divided evenly over its "
            f"{others * virtual} stages"
        )
    if layout.seq_length % (2 * cp if cp > 1 else 1):
        return f"--seq-length {layout.seq_length}: must be a multiple of 2 x --context-parallel-size {cp}"
    if layout.sequence_parallel and layout.seq_length % (tp * cp):
        return (
            f"--seq-length {layout.seq_length}: must be a multiple of --tensor-model-parallel-size {tp} x "
            f"--context-parallel-size {cp} with --sequence-parallel"
        )
    samples = layout.micro_batch * layout.data
    if layout.global_batch % samples:
        return (
            f"--global-batch-size {layout.global_batch}: must be a multiple of --micro-batch-size "
            f"{layout.micro_batch} x {layout.data} data-parallel ranks = {samples}"
        )
    if virtual > 1:
        return find_interleaving_conflict(pp, layout.global_batch, layout.micro_batches, layout.micro_batch_group)
    return None


def find_fitting(
    model: Model, base: Layout, engine: Engine, gpus: int, usable_memory: float, cluster: Cluster
) -> list[Plan]:
    """Return the layouts that fit, fastest first: the best of each TP x PP x CP.

    Args:
        model: sizes of the model.
        base: layout with the sequence length and the global batch.
        engine: the layers, kernels and number formats that the run uses.
        gpus: number of GPUs of the whole job.
        usable_memory: bytes that a process can use on each GPU.
        cluster: speeds of GPUs and links, and GPUs in a host.
    """
    best: dict[tuple[int, int, int], Plan] = {}
    for split in _splits(model, base, gpus, cluster.host):
        for layout, needed in _fits(model, split, engine, usable_memory):
            plan = Plan(layout, needed, step_time.predict(model, layout, engine, cluster))
            key = layout.tensor, layout.pipeline, layout.context
            best[key] = min(best.get(key, plan), plan, key=rank_plan)
    return sorted(best.values(), key=rank_plan)


def find_smallest(model: Model, base: Layout, engine: Engine, gpus: int, host: int) -> tuple[Layout, Memory] | None:
    """Return the layout that needs the least memory of a GPU, and its memory.

    The result is None if no layout divides this model and batch.
    """
    found = (
        (layout, memory.predict(model, layout, engine))
        for split in _splits(model, base, gpus, host)
        for layout in (split, *_recomputed(model, split, engine))
    )
    return min(found, key=lambda each: each[1].device, default=None)


def with_user_buffers(plan: Plan, model: Model, engine: Engine, cluster: Cluster) -> Plan | None:
    """Return the plan with --tp-comm-overlap, or None if user buffers cannot help.

    Transformer Engine's user buffers need tensor parallelism and NVLink.
    """
    layout = plan.layout
    if layout.tensor == 1 or layout.overlap_tensor or not engine.transformer_engine:
        return None
    if cluster.inside < cluster.gpu.nvlink:
        return None
    rings = is_ring_faster(layout.tensor, engine.fp8 is not None)
    layout = replace(layout, overlap_tensor=True, rings=rings)
    return Plan(layout, memory.predict(model, layout, engine), step_time.predict(model, layout, engine, cluster))


def rank_plan(plan: Plan) -> tuple[float, int]:
    """Return a sort key that puts the fastest plan first, then the smallest."""
    return plan.speed.time.step, plan.memory.device


def _fits(model: Model, split: Layout, engine: Engine, usable_memory: float) -> Iterator[tuple[Layout, Memory]]:
    """Yield the split if it fits, else with each kind of recompute, as little as fits."""
    for layout in (split, *_recomputed(model, split, engine)):
        needed = memory.predict(model, layout, engine)
        if needed.device <= usable_memory:
            yield layout, needed
            if layout.recompute != "selective":
                return


def _splits(model: Model, base: Layout, gpus: int, host: int) -> Iterator[Layout]:
    """Yield every split of `gpus` GPUs that Megatron accepts, with every micro-batch size."""
    for tp in _divisors(gpus):
        if tp > host:
            continue
        for pp in _divisors(gpus // tp):
            for cp in _divisors(gpus // (tp * pp)):
                for micro_batch in MICRO_BATCHES:
                    is_sharded = gpus > tp * pp
                    layout = Layout(
                        tensor=tp,
                        pipeline=pp,
                        context=cp,
                        data=gpus // (tp * pp * cp),
                        sequence_parallel=tp > 1,
                        seq_length=base.seq_length,
                        micro_batch=micro_batch,
                        global_batch=base.global_batch,
                        overlap_grad_reduce=is_sharded,
                        overlap_param_gather=is_sharded,
                        overlap_tensor=base.overlap_tensor and tp > 1,
                        rings=base.rings and is_ring_faster(tp, fp8=False),
                    )
                    if find_conflict(model, layout) is None:
                        yield layout


def _recomputed(model: Model, layout: Layout, engine: Engine) -> Iterator[Layout]:
    """Yield the layout with selective recompute, then full recompute of ever more layers.

    Megatron rejects full recompute with CUDA graphs of single layers.
    """
    yield replace(layout, recompute="selective", recompute_modules=("mlp",))
    if engine.graphs:
        return
    for layers in range(1, model.num_layers // layout.pipeline + 1):
        yield replace(layout, recompute="full", recompute_method="block", recompute_layers=layers)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


# Layouts as recipes and flags.


def settings(layout: Layout) -> dict[str, int | bool | str | list[str] | None]:
    """Return the layout as {key: value} of a recipe; None removes a setting of a recipe."""
    selective, full = layout.recompute == "selective", layout.recompute == "full"
    stages = layout.virtual_pipeline if layout.virtual_pipeline > 1 and not layout.layers_per_chunk else None
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "tp_comm_overlap": layout.overlap_tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "num_virtual_stages_per_pipeline_rank": stages,
        "num_layers_per_virtual_pipeline_stage": layout.layers_per_chunk,
        "microbatch_group_size_per_vp_stage": layout.micro_batch_group,
        "decoder_first_pipeline_num_layers": layout.first_stage,
        "decoder_last_pipeline_num_layers": layout.last_stage,
        "context_parallel_size": layout.context,
        "use_distributed_optimizer": layout.distributed_optimizer,
        "overlap_grad_reduce": layout.overlap_grad_reduce,
        "overlap_param_gather": layout.overlap_param_gather,
        "micro_batch_size": layout.micro_batch,
        "recompute_granularity": layout.recompute if selective or full else None,
        "recompute_modules": list(layout.recompute_modules) if selective else None,
        "recompute_method": layout.recompute_method if full else None,
        "recompute_num_layers": layout.recompute_layers if full else None,
    }


def flags(layout: Layout, base: Layout | None = None) -> list[str]:
    """Return the layout as flags; with `base`, only the flags in which the two differ."""
    given = settings(base) if base else {}
    words = []
    for name, value in settings(layout).items():
        if not value or given.get(name) == value:
            continue
        words.append(to_flag(name))
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return words


def keys_to_remove(layout: Layout, base: Layout) -> list[str]:
    """Return the settings of `base` that `layout` must not have and no flag can undo."""
    wanted, given = settings(layout), settings(base)
    return [name for name in wanted if wanted[name] is None and given[name] is not None]
