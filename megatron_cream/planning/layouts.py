"""Layouts that fit: enumerated, checked by what Megatron accepts, ordered by simple rules of speed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_cream.planning import Engine, Layout, Model
from megatron_cream.planning.memory import Memory, layer_weights, predict

GPUS_OF_A_HOST = 8
"""Tensor parallelism stays inside: it needs NVLink."""

MICRO_BATCHES = (1, 2, 4, 8, 16)

OF_DRIVER = 0.01
"""Share of a GPU's memory that its driver keeps; an "80 GB" A100 or H100 gives programs 79.2 GiB."""

RULES = """\
Layouts are ordered by what usually costs least time: the smaller share of the forward pass repeated (no
recompute, then --recompute-modules mlp or full recompute of as few layers as needed), then less model
parallelism (TP x PP x CP), TP before PP before CP, then the larger micro-batch. TP stays within 8 GPUs and
always has --sequence-parallel; a micro-batch above 1 leaves a pipeline 4 x PP micro-batches or more."""


@dataclass(frozen=True)
class Plan:
    layout: Layout
    memory: Memory


def usable(gpu_memory: float) -> float:
    """What of a GPU's memory a process can have; both in bytes."""
    return gpu_memory * (1 - OF_DRIVER)


def refused(model: Model, layout: Layout) -> str | None:
    """Why Megatron would not run this layout, naming the flag; None if it would."""
    tp, pp, cp, virtual = layout.tensor, layout.pipeline, layout.context, layout.virtual_pipeline
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % tp or (groups % tp and tp % groups):
        return (
            f"--tensor-model-parallel-size {tp}: must divide --num-attention-heads {heads}, and divide or be a "
            f"multiple of --num-query-groups {groups}"
        )
    if model.ffn_hidden_size % tp:
        return f"--tensor-model-parallel-size {tp}: must divide --ffn-hidden-size {model.ffn_hidden_size}"
    ends = [count for count in (layout.first_stage, layout.last_stage) if count is not None]
    others = pp - len(ends)
    rest = model.num_layers - sum(ends)
    if rest < 0 or (rest % (others * virtual) if others else rest):
        return (
            f"--pipeline-model-parallel-size {pp}: --num-layers {model.num_layers} cannot be shared evenly by its "
            f"{others * virtual} stages"
        )
    if layout.seq_length % (2 * cp if cp > 1 else 1):
        return f"--seq-length {layout.seq_length}: must be a multiple of 2 x --context-parallel-size {cp}"
    if layout.sequence_parallel and layout.seq_length % (tp * cp):
        return (
            f"--seq-length {layout.seq_length}: must be a multiple of --tensor-model-parallel-size {tp} under "
            "--sequence-parallel"
        )
    samples = layout.micro_batch * layout.data
    if layout.global_batch % samples:
        return (
            f"--global-batch-size {layout.global_batch}: must be a multiple of --micro-batch-size "
            f"{layout.micro_batch} x {layout.data} data-parallel ranks = {samples}"
        )
    if virtual > 1 and layout.micro_batches % pp:
        return (
            f"--global-batch-size {layout.global_batch}: its {layout.micro_batches} micro-batches must be a multiple "
            f"of --pipeline-model-parallel-size {pp} with virtual stages"
        )
    return None


def fitting(model: Model, base: Layout, engine: Engine, gpus: int, memory: float) -> list[Plan]:
    """Layouts on `gpus` GPUs of `memory` usable bytes each, best first.

    Of each TP x PP x CP those that repeat least: no micro-batch is worth more recompute than another's.

    Args:
        base: gives sequence length and global batch.
    """
    plans = [
        Plan(layout, predicted)
        for splits in _splits(model, base, gpus)
        for layout in _recomputed(model, splits)
        if (predicted := predict(model, layout, engine)).device <= memory
    ]
    plans.sort(key=lambda plan: preference(model, plan.layout))
    best: dict[tuple[int, int, int], float] = {}
    for plan in plans:
        best.setdefault(_split(plan.layout), repeated(model, plan.layout))
    return [plan for plan in plans if repeated(model, plan.layout) == best[_split(plan.layout)]]


def least(model: Model, base: Layout, engine: Engine, gpus: int) -> Plan | None:
    """Of all layouts the one that needs least of each GPU; None if no layout divides this model and batch."""
    plans = (
        Plan(layout, predict(model, layout, engine))
        for splits in _splits(model, base, gpus)
        for layout in _recomputed(model, splits)
    )
    return min(plans, key=lambda plan: plan.memory.device, default=None)


def preference(model: Model, layout: Layout) -> tuple:
    """Sorts layouts by expected speed, fastest first: RULES, and the place for a model of time."""
    parallel = layout.tensor * layout.pipeline * layout.context
    return repeated(model, layout), parallel, layout.context, layout.pipeline, -layout.micro_batch


def repeated(model: Model, layout: Layout) -> float:
    """Share of the layers' matrix products that recompute does a second time."""
    if layout.recompute == "full":
        if layout.recompute_method == "uniform":
            return 1.0
        return min(layout.recompute_layers * layout.pipeline / model.num_layers, 1.0)
    if "mlp" in layout.recompute_modules:
        weights = layer_weights(model, 1)
        return (weights["fc1"] + weights["fc2"]) / sum(weights.values())
    return 0.0


def _splits(model: Model, base: Layout, gpus: int) -> Iterator[Layout]:
    """Every split of `gpus` GPUs that Megatron accepts, by every micro-batch."""
    for tp in _divisors(gpus):
        if tp > GPUS_OF_A_HOST:
            continue
        for pp in _divisors(gpus // tp):
            for cp in _divisors(gpus // (tp * pp)):
                for micro_batch in MICRO_BATCHES:
                    layout = Layout(
                        tensor=tp, pipeline=pp, context=cp, data=gpus // (tp * pp * cp), sequence_parallel=tp > 1,
                        seq_length=base.seq_length, micro_batch=micro_batch, global_batch=base.global_batch,
                    )  # fmt: skip
                    starved = pp > 1 and micro_batch > 1 and layout.micro_batches < 4 * pp
                    if not starved and refused(model, layout) is None:
                        yield layout


def _recomputed(model: Model, layout: Layout) -> Iterator[Layout]:
    yield layout
    yield replace(layout, recompute="selective", recompute_modules=("mlp",))
    for layers in range(1, model.num_layers // layout.pipeline + 1):
        yield replace(layout, recompute="full", recompute_method="block", recompute_layers=layers)


def _split(layout: Layout) -> tuple[int, int, int]:
    return layout.tensor, layout.pipeline, layout.context


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


# As a user writes it.


def settings(layout: Layout) -> dict[str, int | bool | str | list[str] | None]:
    """The layout as lines of a recipe; None undoes what a recipe says."""
    selective, full = layout.recompute == "selective", layout.recompute == "full"
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "use_distributed_optimizer": layout.distributed_optimizer,
        "micro_batch_size": layout.micro_batch,
        "recompute_granularity": layout.recompute if selective or full else None,
        "recompute_modules": list(layout.recompute_modules) if selective else None,
        "recompute_method": layout.recompute_method if full else None,
        "recompute_num_layers": layout.recompute_layers if full else None,
    }


def flags(layout: Layout, base: Layout | None = None) -> list[str]:
    """The layout as flags; those in which it differs from `base`, if that is given."""
    given = settings(base) if base else {}
    words = []
    for name, value in settings(layout).items():
        if not value or given.get(name) == value:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return words


def undone(layout: Layout, base: Layout) -> list[str]:
    """Names that the recipe of `base` sets and `layout` must not have; no flag takes them back."""
    wanted, given = settings(layout), settings(base)
    return [name for name in wanted if wanted[name] is None and given[name] is not None]
