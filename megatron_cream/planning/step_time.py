"""Prediction of a training step's time from computation, memory traffic and transfers.

All rates are measured.

`predict` adds up the parts of the slowest pipeline stage. `hardware` has the rates and the runs that they were fitted
on; megatron_cream/planning/measured_runs.json has the runs that predictions are compared with.
"""

import math
from dataclasses import dataclass, fields

from megatron_cream.common.errors import UsageError
from megatron_cream.model.flops import flops_per_token
from megatron_cream.planning import communication, work
from megatron_cream.planning.communication import Transfer
from megatron_cream.planning.hardware import (
    ATTENTION,
    FP8_PARAMETERS,
    HALF_RATE,
    HOST,
    HOST_ADAPTER,
    IDLE,
    OFFLOADED,
    OVERLAP_COST,
    PASSES,
    PRODUCTS,
    RING,
    RINGS_OVERLAP_COST,
    TILE,
    Cluster,
    Gpu,
)
from megatron_cream.planning.run import Engine, Layout, Model
from megatron_cream.planning.weights import (
    joined_adapters,
    stage_layers,
    trained_parameters,
    trains_head,
    trains_linears,
)


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one step of the slowest stage, part by part.

    passes: kernels that only move bytes: norms, residual sums, rotary, SwiGLU, loss, embedding, casts to FP8.
    recompute: repeated parts of the forward pass.
    tensor, context, pipeline, data: waiting for transfers among these ranks, and the slowdown by overlapped ones.
    bubble: waiting for other stages at the beginning and end of a step.
    optimizer: the update, and setting gradients to zero.
    idle: waiting for the host.
    """

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    recompute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0
    idle: float = 0.0

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Speed:
    """A step's time, and the speed that follows from it.

    tokens_per_second: of each GPU.
    utilization: MFU, model FLOPs (without recompute) over the GPU's dense bf16 peak.
    """

    time: Time
    tokens_per_second: float
    utilization: float


def predict(model: Model, layout: Layout, engine: Engine, cluster: Cluster) -> Speed:
    """Return the predicted speed of a training step.

    Raises:
        UsageError: the GPU has no FP8.
    """
    time = _step(model, layout, engine, cluster)
    rate = layout.global_batch * layout.seq_length / time.step / layout.gpus
    flops = flops_per_token(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        num_attention_heads=model.num_attention_heads,
        vocab_size=model.padded_vocab_size,
        seq_length=layout.seq_length,
        frozen_layers=not trains_linears(model),
        frozen_head=not trains_head(model),
    )
    return Speed(time, rate, rate * flops / cluster.gpu.bf16)


def launch_seconds(model: Model, layout: Layout, engine: Engine) -> float:
    """Return the seconds in which the host launches a layer's kernels, forward and backward.

    The time to launch two CUDA graphs is taken as zero: runs with graphs are within 5 % without it.
    """
    if engine.graphs:
        return 0.0
    kind = "tensor parallel" if layout.tensor > 1 else "alone"
    layer = HOST["FP8" if engine.fp8 and layout.tensor == 1 else kind]
    return layer + HOST_ADAPTER[kind] * len(joined_adapters(model, layout.tensor))


def product_seconds(shape: tuple[int, int, int], engine: Engine, gpu: Gpu, fp8: str | None) -> dict[str, float]:
    """Return the seconds of a linear's three products: forward, input and weight.

    input and weight are the products of their gradients; the weight's gradient is accumulated in float32. The time is
    that of the FLOPs of whole tiles at the rate of large products, plus that of moving each operand once.
    """
    m, n, k = shape
    if fp8 and gpu.fp8 is None:
        raise UsageError(f"--fp8-format: an {gpu.name} has no FP8; leave it out, or choose another --gpu")
    peak = gpu.fp8 if fp8 else gpu.fp32 if engine.element == 4 else gpu.bf16
    rate = peak * product_share(gpu, fp8)
    operand, a = 1 if fp8 else engine.element, engine.element
    added = 2 * engine.gradient if engine.fused_weight_gradients else 2 * a + 2 * engine.gradient
    moved = {
        "forward": operand * (m * k + n * k) + a * m * n,
        "input": operand * (m * n + n * k) + a * m * k,
        "weight": operand * (m * n + m * k) + added * n * k,
    }
    rows, outputs, inputs = (math.ceil(size / TILE) * TILE for size in shape)
    tiled = {"forward": rows * outputs * k, "input": rows * n * inputs, "weight": m * outputs * inputs}
    return {name: 2 * tiled[name] / rate + nbytes / (gpu.bandwidth * PASSES) for name, nbytes in moved.items()}


def product_share(gpu: Gpu, fp8: str | None) -> float:
    """Return the share of the peak that matrix products reach, in bf16 or this FP8 recipe."""
    kind = "bf16" if fp8 is None else "fp8 blockwise" if fp8 == "blockwise" else "fp8"
    return PRODUCTS[kind] * gpu.products


def attention_share(kernel: str, seq_length: int) -> float:
    """Return the share of the bf16 peak that attention reaches."""
    return ATTENTION[kernel] * (1 + HALF_RATE / 4096) / (1 + HALF_RATE / seq_length)


@dataclass(frozen=True)
class _MicroBatch:
    """Seconds of a micro-batch on one stage, by the fields of `Time`."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())


def _step(model: Model, layout: Layout, engine: Engine, cluster: Cluster) -> Time:
    last = layout.pipeline - 1
    kinds = [0] + [1] * (last - 1) + [last] * (last > 0)  # all stages between the first and the last are equal
    known = {stage: _micro_batch(model, layout, engine, cluster, stage) for stage in set(kinds)}
    slowest = max(known, key=lambda stage: known[stage].total)
    one = known[slowest]
    parts = {
        name: layout.micro_batches * (one.forward.get(name, 0.0) + one.backward.get(name, 0.0))
        for name in one.forward | one.backward
    }
    parts["bubble"] = bubble([known[stage].total for stage in kinds], layout.virtual_pipeline)
    moved = work.step_bytes(model, layout, engine, slowest)
    through_memory = cluster.gpu.bandwidth * PASSES
    parts["optimizer"] = (moved["optimizer"] + moved["zero gradients"]) / through_memory
    parts["passes"] += moved.get("cast to FP8", 0.0) / through_memory
    shards = layout.data * layout.context if layout.distributed_optimizer else 1
    offloaded = engine.optimizer_offload * trained_parameters(model, layout, slowest) / shards
    parts["optimizer"] += OFFLOADED * offloaded
    layers = stage_layers(model, layout)[slowest]
    if engine.fp8_parameters and trains_linears(model):
        parts["optimizer"] += layers * FP8_PARAMETERS
    passes = layers + work.repeated_layers(layout, layers) / 2  # a forward pass has about half of the launches
    launched = passes * launch_seconds(model, layout, engine)
    parts["idle"] = IDLE + layout.micro_batches * max(launched - one.total, 0.0)
    for transfer in communication.step_transfers(model, layout, engine, slowest):
        name = "data" if transfer.group == "dp" else "tensor" if transfer.group == "tp" else "pipeline"
        parts[name] = parts.get(name, 0.0) + _step_transfer_cost(transfer, model, layout, cluster, slowest, one)
    return Time(**parts)


def bubble(stages: list[float], virtual: int) -> float:
    """Return the seconds in which the slowest stage has nothing to do in a step.

    One micro-batch passes through all stages and back, and the others follow at the pace of the slowest stage. With
    interleaved stages the waiting time is divided by the number of chunks in a stage.

    Args:
        stages: seconds of a micro-batch on each stage, forward and backward.
        virtual: number of chunks in each stage.
    """
    return (sum(stages) - max(stages)) / virtual


def _step_transfer_cost(
    transfer: Transfer, model: Model, layout: Layout, cluster: Cluster, stage: int, one: _MicroBatch
) -> float:
    """Return the seconds that a transfer of gradients or weights adds to a step.

    Gradients overlap with the last micro-batch's backward pass, weights with the first micro-batch's forward pass.
    """
    duration = communication.transfer_seconds(transfer, layout, cluster)
    if not transfer.overlapped:
        return duration
    exposed = communication.bucket_share(layout, trained_parameters(model, layout, stage)) * duration
    computed = sum((one.backward if transfer.at == "gradients" else one.forward).values())
    return _cost(duration, min(computed, duration - exposed), _overlap_cost(transfer, layout))


def _cost(duration: float, overlapped: float, share: float) -> float:
    """Return the seconds that a transfer adds if `overlapped` seconds of it overlap."""
    return duration - overlapped + share * overlapped


def _overlap_cost(transfer: Transfer, layout: Layout) -> float:
    """Return the share of an overlapped transfer's time by which it slows computation.

    For transfers without user buffers, LINKS and RING were fitted together with the share of a pair.
    """
    if transfer.group == "tp" and layout.rings:
        return RINGS_OVERLAP_COST
    size, _ = communication.group_shape(layout, transfer.group)
    wide = size > 2 and (layout.overlap_tensor if transfer.group == "tp" else transfer.group == "dp")
    return OVERLAP_COST["more" if wide else "pair"]


def _micro_batch(model: Model, layout: Layout, engine: Engine, cluster: Cluster, stage: int) -> _MicroBatch:
    layers = stage_layers(model, layout)[stage]
    one = _layer(model, layout, engine, cluster)
    forward = {name: layers * value for name, value in one.forward.items()}
    backward = {name: layers * value for name, value in one.backward.items()}
    repeated = work.repeated_layers(layout, layers)
    backward["recompute"] += repeated * sum(one.forward.values())
    again = communication.regather_transfers(model, layout, engine)
    backward["context"] += (layers - repeated) * _total_cost(again, "cp", {}, layout, cluster)

    first, last = stage == 0, stage == layout.pipeline - 1
    through_memory = cluster.gpu.bandwidth * PASSES
    moved = work.end_bytes(model, layout, engine, first, last).values()
    forward["passes"] += sum(ahead for ahead, _ in moved) / through_memory
    backward["passes"] += sum(back for _, back in moved) / through_memory
    head = 0.0
    if last:
        products = product_seconds(work.head_product(model, layout), engine, cluster.gpu, fp8=None)
        head = products["input"] + (products["weight"] if trains_head(model) else 0.0)
        forward["products"] += products["forward"]
        backward["products"] += head
    sent = communication.end_forward_transfers(model, layout, engine, first, last)
    sent_back = communication.end_backward_transfers(model, layout, engine, first, last)
    forward["tensor"] += _total_cost(sent, "tp", {}, layout, cluster)
    backward["tensor"] += _total_cost(sent_back, "tp", {"head": head}, layout, cluster)
    if layout.pipeline > 1:
        transfer = communication.stage_transfer(model, layout, engine)
        duration = communication.transfer_seconds(transfer, layout, cluster)
        cost = _cost(duration, duration if transfer.overlapped else 0.0, _overlap_cost(transfer, layout))
        forward["pipeline"] = backward["pipeline"] = layout.virtual_pipeline * cost
    return _MicroBatch(forward, backward)


def _layer(model: Model, layout: Layout, engine: Engine, cluster: Cluster) -> _MicroBatch:
    """Return the seconds of one layer for a micro-batch, with selective recompute."""
    gpu, through_memory = cluster.gpu, cluster.gpu.bandwidth * PASSES
    shapes = work.layer_products(model, layout)
    products = {at: product_seconds(shape, engine, gpu, engine.fp8) for at, shape in shapes.items()}
    peak = gpu.fp32 if engine.element == 4 else gpu.bf16
    attention = work.attention_flops(model, layout) / (peak * attention_share(engine.attention, layout.seq_length))
    if layout.context > 1 and not engine.gathers_keys:
        attention /= RING
    moved = work.layer_bytes(model, layout, engine)
    sent = communication.layer_forward_transfers(model, layout, engine)
    sent_back = communication.layer_backward_transfers(model, layout, engine)

    ahead = {at: each["forward"] for at, each in products.items()}
    trained = 1 if trains_linears(model) else 0
    back = {at: each["input"] + trained * each["weight"] for at, each in products.items()}
    for at, added in work.adapter_products(model, layout).items():
        each = [product_seconds(shape, engine, gpu, fp8=None) for shape in added]
        ahead[at] += sum(one["forward"] for one in each)
        back[at] += sum(one["input"] + one["weight"] for one in each)
    repeated = attention if "core_attn" in layout.recompute_modules else 0.0
    if "mlp" in layout.recompute_modules:
        repeated += ahead["fc1"] + ahead["fc2"] + moved["SwiGLU"][0] / through_memory
        repeated += _total_cost(communication.select_mlp(sent), "tp", ahead, layout, cluster)
    forward = {
        "products": sum(ahead.values()),
        "attention": attention,
        "passes": sum(a for a, _ in moved.values()) / through_memory,
        "tensor": _total_cost(sent, "tp", ahead, layout, cluster),
        "context": _total_cost(sent, "cp", {"attention": attention}, layout, cluster),
    }
    backward = {
        "products": sum(back.values()),
        "attention": 2 * attention,
        "passes": sum(b for _, b in moved.values()) / through_memory,
        "tensor": _total_cost(sent_back, "tp", back, layout, cluster),
        "context": _total_cost(sent_back, "cp", {"attention": 2 * attention}, layout, cluster),
        "recompute": repeated,
    }
    return _MicroBatch(forward, backward)


def _total_cost(
    transfers: list[Transfer], group: str, computed: dict[str, float], layout: Layout, cluster: Cluster
) -> float:
    """Return the seconds that the transfers of a group add.

    Args:
        transfers: the transfers of all groups.
        group: "tp" or "cp".
        computed: seconds that each module computes. In a linear's backward pass each of the two products overlaps with
            one transfer: the input's gradient with gathering the input, the weight's gradient with reducing the
            input's gradient.
        layout: the layout of the run.
        cluster: the speeds of its links.
    """
    total = 0.0
    for transfer in transfers:
        if transfer.group == group:
            duration = communication.transfer_seconds(transfer, layout, cluster)
            hidden = computed[transfer.at] / (2 if group == "tp" else 1) if transfer.overlapped else 0.0
            total += _cost(duration, min(hidden, duration), _overlap_cost(transfer, layout))
    return total
