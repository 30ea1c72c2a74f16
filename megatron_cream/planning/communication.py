"""What the GPUs of a run say to each other, in bytes, and how long that takes over given links.

Ranks are numbered as Megatron does it (tp-cp-ep-dp-pp): tensor-parallel ranks are neighbours, then come
context-, data- and pipeline-parallel ones. tests/planning/test_traffic.py counts the same bytes in real runs.
"""

from collections import Counter
from dataclasses import dataclass

from megatron_cream.planning.hardware import HOP_BETWEEN, HOP_INSIDE, LINKS, Cluster
from megatron_cream.planning.memory import layer_weights, parameters, stage_layers, tokens_of_rank
from megatron_cream.planning.run import Engine, Layout, Model
from megatron_cream.planning.work import repeated_layers

BUCKET = 40e6
"""Parameters of one bucket of gradients, at least, and 1e6 for each rank: Megatron's default."""


@dataclass(frozen=True)
class Transfer:
    """One operation among the ranks of a group.

    group: tp, cp, pp; dp, the data-parallel ranks with the context-parallel ones; ends, first and last stage.
    operation: all_gather, reduce_scatter, all_reduce, broadcast or send.
    nbytes: of the whole tensor: gathered, to be scattered, reduced, or sent.
    at: the module it belongs to.
    beside: it runs beside the computation of `at`, which waits only if that is done first.
    """

    group: str
    operation: str
    nbytes: float
    at: str
    beside: bool = False


def layer_forward(model: Model, layout: Layout, engine: Engine) -> list[Transfer]:
    """Of one layer's forward pass, for a micro-batch."""
    return [*_layer_tp(model, layout, engine), *_layer_cp(model, layout, engine, backward=False)]


def layer_backward(model: Model, layout: Layout, engine: Engine) -> list[Transfer]:
    """Of one layer's backward pass; what recompute or `gathered_again` repeats of the forward pass is not in it."""
    cp = _layer_cp(model, layout, engine, backward=True)
    if layout.tensor == 1:
        return cp
    hidden = _hidden(model, layout, engine)
    if not layout.sequence_parallel:
        tp = [Transfer("tp", "all_reduce", hidden, at, beside=True) for at in ("qkv", "fc1")]
    else:
        tp = [Transfer("tp", "all_gather", hidden, at, layout.overlap_tensor) for at in ("proj", "fc2")]
        # The input, kept in parts, for the weight's gradient; and the input's gradient.
        for operation in ("all_gather", "reduce_scatter"):
            tp += [Transfer("tp", operation, hidden, at, beside=True) for at in ("qkv", "fc1")]
    if model.num_query_groups < layout.tensor:
        tp.append(Transfer("tp", "reduce_scatter", _all_heads(model, layout, engine), "qkv"))
    return [*tp, *cp]


def gathered_again(model: Model, layout: Layout, engine: Engine) -> list[Transfer]:
    """Keys and values, which no layer keeps, in the backward pass of one that full recompute leaves alone."""
    return _layer_cp(model, layout, engine, backward=False) if engine.gathers_keys else []


def ends_forward(model: Model, layout: Layout, engine: Engine, first: bool, last: bool) -> list[Transfer]:
    """Of data, embedding (first stage), head and loss (last stage), for a micro-batch."""
    if layout.tensor == 1:
        return []
    tokens, _ = tokens_of_rank(layout)
    hidden = _hidden(model, layout, engine)
    # Tokens, labels, mask and positions, int64, before context parallelism takes its part.
    transfers = [Transfer("tp", "broadcast", 4 * 8 * tokens * layout.context, "data")]
    if first:
        transfers.append(Transfer("tp", _joined(layout), hidden, "embedding"))
    if last:
        if layout.sequence_parallel:
            transfers.append(Transfer("tp", "all_gather", hidden, "head"))
        # Of each token the largest logit, the sum of exponentials, and the label's.
        transfers.append(Transfer("tp", "all_reduce", 3 * 4 * tokens, "loss"))
    return transfers


def ends_backward(model: Model, layout: Layout, engine: Engine, first: bool, last: bool) -> list[Transfer]:
    """The same of the backward pass."""
    if layout.tensor == 1:
        return []
    hidden = _hidden(model, layout, engine)
    transfers = []
    if last:
        operations = ["all_gather", "reduce_scatter"] if layout.sequence_parallel else ["all_reduce"]
        transfers += [Transfer("tp", operation, hidden, "head", beside=True) for operation in operations]
    if first and layout.sequence_parallel:
        transfers.append(Transfer("tp", "all_gather", hidden, "embedding"))
    return transfers


def between_stages(model: Model, layout: Layout, engine: Engine) -> Transfer:
    """One activation, or one gradient, from a stage to its neighbour. Interleaved stages send while they compute."""
    _, between = tokens_of_rank(layout)
    nbytes = engine.element * between * model.hidden_size
    return Transfer("pp", "send", nbytes, "stage", beside=layout.virtual_pipeline > 1)


def sends(layout: Layout, stage: int) -> int:
    """How many activations and gradients a rank of `stage` sends for each micro-batch."""
    if layout.pipeline == 1:
        return 0
    first, last = stage == 0, stage == layout.pipeline - 1
    return 2 * layout.virtual_pipeline - first - last


def step(model: Model, layout: Layout, engine: Engine, stage: int) -> list[Transfer]:
    """Once a step: gradients and weights of a stage's rank."""
    transfers = []
    count = parameters(model, layout, stage)
    last = stage == layout.pipeline - 1
    if layout.data * layout.context > 1:
        if layout.distributed_optimizer:
            weights = engine.element * count
            if engine.fp8_parameters:
                linears = stage_layers(model, layout)[stage] * sum(layer_weights(model, layout.tensor).values())
                weights -= (engine.element - 1) * linears
            transfers += [
                Transfer("dp", "reduce_scatter", engine.gradient * count, "gradients", layout.overlap_grad_reduce),
                Transfer("dp", "all_gather", weights, "weights", layout.overlap_param_gather),
            ]
        else:
            transfers.append(
                Transfer("dp", "all_reduce", engine.gradient * count, "gradients", layout.overlap_grad_reduce)
            )
    if layout.sequence_parallel and layout.tensor > 1:
        norms = 2 * stage_layers(model, layout)[stage] + last
        transfers.append(Transfer("tp", "all_reduce", engine.gradient * norms * model.hidden_size, "norms"))
    if model.tied and layout.pipeline > 1 and (stage == 0 or last):
        table = model.padded_vocab_size * model.hidden_size // layout.tensor
        transfers.append(Transfer("ends", "all_reduce", engine.gradient * table, "tied embedding"))
    return transfers


def of_mlp(transfers: list[Transfer]) -> list[Transfer]:
    """Those that recompute of the MLP repeats."""
    return [transfer for transfer in transfers if transfer.at in ("fc1", "fc2")]


def volumes(model: Model, layout: Layout, engine: Engine, stage: int) -> Counter[tuple[str, str]]:
    """(group, operation) -> bytes of the whole tensors that a rank of `stage` gathers, reduces and sends in a step.

    Of an operation among n ranks each rank sends (n - 1) / n of the bytes, and twice that to reduce them for all.
    """
    layers = stage_layers(model, layout)[stage]
    first, last = stage == 0, stage == layout.pipeline - 1
    total: Counter[tuple[str, str]] = Counter()

    def add(transfers: list[Transfer], times: int) -> None:
        for transfer in transfers:
            total[transfer.group, transfer.operation] += times * transfer.nbytes

    ahead = layer_forward(model, layout, engine)
    each = layout.micro_batches
    add(ahead, each * (layers + repeated_layers(layout, layers)))
    add(gathered_again(model, layout, engine), each * (layers - repeated_layers(layout, layers)))
    add(of_mlp(ahead), each * layers * ("mlp" in layout.recompute_modules))
    add(layer_backward(model, layout, engine), each * layers)
    add(ends_forward(model, layout, engine, first, last), each)
    add(ends_backward(model, layout, engine, first, last), each)
    add([between_stages(model, layout, engine)], each * sends(layout, stage))
    add(step(model, layout, engine, stage), 1)
    return +total


def _layer_tp(model: Model, layout: Layout, engine: Engine) -> list[Transfer]:
    if layout.tensor == 1:
        return []
    hidden = _hidden(model, layout, engine)
    beside = layout.overlap_tensor
    transfers = [Transfer("tp", _joined(layout), hidden, at, beside) for at in ("proj", "fc2")]
    if layout.sequence_parallel:
        transfers += [Transfer("tp", "all_gather", hidden, at, beside) for at in ("qkv", "fc1")]
    if model.num_query_groups < layout.tensor:  # each rank computes a part of a head, and all are put together
        transfers.append(Transfer("tp", "all_gather", _all_heads(model, layout, engine), "qkv"))
    return transfers


def _layer_cp(model: Model, layout: Layout, engine: Engine, backward: bool) -> list[Transfer]:
    if layout.context == 1:
        return []
    tokens, _ = tokens_of_rank(layout)
    groups = max(model.num_query_groups // layout.tensor, 1)
    whole = engine.element * tokens * layout.context * groups * model.kv_channels
    if engine.gathers_keys:
        operation = "reduce_scatter" if backward else "all_gather"
        return [Transfer("cp", operation, whole, "attention") for _ in ("key", "value")]
    # Around the ring beside the attention; on the way back with their gradients.
    part = 2 * whole * (layout.context - 1) / layout.context
    return [Transfer("cp", "send", 2 * part if backward else part, "attention", beside=True)]


def _hidden(model: Model, layout: Layout, engine: Engine) -> int:
    tokens, _ = tokens_of_rank(layout)
    return engine.element * tokens * model.hidden_size


def _all_heads(model: Model, layout: Layout, engine: Engine) -> int:
    tokens, _ = tokens_of_rank(layout)
    return engine.element * tokens * (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels


def _joined(layout: Layout) -> str:
    return "reduce_scatter" if layout.sequence_parallel else "all_reduce"


# How long it takes.


def group_shape(layout: Layout, group: str) -> tuple[int, int]:
    """(number of ranks, distance from one to the next) of a group."""
    tp, cp, dp = layout.tensor, layout.context, layout.data
    stage = tp * cp * dp
    return {
        "tp": (tp, 1),
        "cp": (cp, tp),
        "dp": (cp * dp, tp),
        "pp": (layout.pipeline, stage),
        "ends": (2, stage * (layout.pipeline - 1)),
    }[group]


def seconds(transfer: Transfer, layout: Layout, cluster: Cluster) -> float:
    """Duration of one transfer that has its links for itself: a ring over the ranks of its group.

    Within a host a ring runs at the speed of the links inside; across hosts it can use the network adapters of
    all its ranks in a host.
    """
    size, distance = group_shape(layout, transfer.group)
    in_a_host = max(min(size, cluster.host // distance), 1)
    crosses = in_a_host < size
    hop = HOP_BETWEEN if crosses else HOP_INSIDE
    inside, between = LINKS["inside"] * cluster.inside, LINKS["between"] * cluster.between
    if transfer.operation == "send":
        return hop + transfer.nbytes / (between if crosses else inside)
    speed = min(inside, in_a_host * between) if crosses else inside
    rounds = 2 if transfer.operation == "all_reduce" else 1
    return rounds * (size - 1) * (hop + transfer.nbytes / size / speed)


def bucket_share(layout: Layout, count: int) -> float:
    """Share of a stage's `count` parameters in the one bucket that nothing can hide."""
    return min(max(BUCKET, 1e6 * layout.data * layout.context) / count, 1.0)
