"""The communication between the GPUs of a run: bytes, and seconds over given links.

Ranks are numbered as in Megatron (tp-cp-ep-dp-pp): tensor-parallel ranks are neighbours, followed by context-, data-
and pipeline-parallel ones. tests/planning/test_traffic.py counts the same bytes in real runs.
"""

from collections import Counter
from dataclasses import dataclass

from megatron_cream.planning.hardware import HOP_BETWEEN, HOP_INSIDE, LINKS, Cluster
from megatron_cream.planning.memory import tokens_of_rank
from megatron_cream.planning.run import Engine, Layout, Model
from megatron_cream.planning.weights import (
    layer_weights,
    stage_layers,
    trained_parameters,
    trains_embedding,
    trains_linears,
)
from megatron_cream.planning.work import repeated_layers

BUCKET = 40e6
"""Minimum number of parameters in a bucket of gradients; at least 1e6 for each rank. Megatron's defaults."""


@dataclass(frozen=True)
class Transfer:
    """One operation among the ranks of a group.

    group: tp; cp; pp; dp, data-parallel and context-parallel ranks together; ends, the first and the last stage.
    operation: all_gather, reduce_scatter, all_reduce, broadcast or send.
    nbytes: bytes of the whole tensor that is gathered, scattered, reduced or sent.
    at: the module that it belongs to.
    overlapped: whether it overlaps with the computation of `at`, which waits only for the rest.
    """

    group: str
    operation: str
    nbytes: float
    at: str
    overlapped: bool = False


def layer_forward_transfers(model: Model, layout: Layout, engine: Engine) -> list[Transfer]:
    """Return the transfers of one layer's forward pass, for a micro-batch."""
    return [*_layer_tp(model, layout, engine), *_layer_cp(model, layout, engine, backward=False)]


def layer_backward_transfers(model: Model, layout: Layout, engine: Engine) -> list[Transfer]:
    """Return the transfers of one layer's backward pass, for a micro-batch.

    Forward transfers that recompute or `regather_transfers` repeats are not included.
    """
    cp = _layer_cp(model, layout, engine, backward=True)
    if layout.tensor == 1:
        return cp
    hidden = _hidden_bytes(model, layout, engine)
    if not layout.sequence_parallel:
        tp = [Transfer("tp", "all_reduce", hidden, at, overlapped=True) for at in ("qkv", "fc1")]
    else:
        tp = [Transfer("tp", "all_gather", hidden, at, layout.overlap_tensor) for at in ("proj", "fc2")]
        # Gather the input, which each rank keeps a part of, for the weight's gradient; scatter the input's gradient.
        for operation in ("all_gather", "reduce_scatter"):
            tp += [Transfer("tp", operation, hidden, at, overlapped=True) for at in ("qkv", "fc1")]
    if model.num_query_groups < layout.tensor:
        tp.append(Transfer("tp", "reduce_scatter", _all_heads_bytes(model, layout, engine), "qkv"))
    return [*tp, *cp]


def regather_transfers(model: Model, layout: Layout, engine: Engine) -> list[Transfer]:
    """Return the transfers that gather keys and values again in a layer's backward pass.

    No layer keeps them. Layers under full recompute repeat all of their forward transfers instead.
    """
    return _layer_cp(model, layout, engine, backward=False) if engine.gathers_keys else []


def end_forward_transfers(model: Model, layout: Layout, engine: Engine, first: bool, last: bool) -> list[Transfer]:
    """Return the forward transfers of data, embedding, head and loss, for a micro-batch.

    The first stage has the embedding, the last has head and loss.
    """
    if layout.tensor == 1:
        return []
    tokens, _ = tokens_of_rank(layout)
    hidden = _hidden_bytes(model, layout, engine)
    # Tokens, labels, mask and positions in int64, before context parallelism splits them.
    transfers = [Transfer("tp", "broadcast", 4 * 8 * tokens * layout.context, "data")]
    if first:
        transfers.append(Transfer("tp", _reduce_operation(layout), hidden, "embedding"))
    if last:
        if layout.sequence_parallel:
            transfers.append(Transfer("tp", "all_gather", hidden, "head"))
        # For each token: the largest logit, the sum of exponentials, and the label's logit.
        transfers.append(Transfer("tp", "all_reduce", 3 * 4 * tokens, "loss"))
    return transfers


def end_backward_transfers(model: Model, layout: Layout, engine: Engine, first: bool, last: bool) -> list[Transfer]:
    """Return the backward transfers of head and embedding, for a micro-batch."""
    if layout.tensor == 1:
        return []
    hidden = _hidden_bytes(model, layout, engine)
    transfers = []
    if last:
        operations = ["all_gather", "reduce_scatter"] if layout.sequence_parallel else ["all_reduce"]
        transfers += [Transfer("tp", operation, hidden, "head", overlapped=True) for operation in operations]
    if first and layout.sequence_parallel:
        transfers.append(Transfer("tp", "all_gather", hidden, "embedding"))
    return transfers


def stage_transfer(model: Model, layout: Layout, engine: Engine) -> Transfer:
    """Return the transfer of one activation or gradient from a stage to its neighbour.

    Interleaved stages send while they compute.
    """
    _, between = tokens_of_rank(layout)
    nbytes = engine.element * between * model.hidden_size
    return Transfer("pp", "send", nbytes, "stage", overlapped=layout.virtual_pipeline > 1)


def count_sends(layout: Layout, stage: int) -> int:
    """Return how many activations and gradients a rank of `stage` sends for each micro-batch."""
    if layout.pipeline == 1:
        return 0
    first, last = stage == 0, stage == layout.pipeline - 1
    return 2 * layout.virtual_pipeline - first - last


def step_transfers(model: Model, layout: Layout, engine: Engine, stage: int) -> list[Transfer]:
    """Return the transfers of a stage's rank that happen once a step: gradients and weights."""
    transfers = []
    count = trained_parameters(model, layout, stage)
    last = stage == layout.pipeline - 1
    if layout.data * layout.context > 1:
        if layout.distributed_optimizer:
            weights = engine.element * count
            if engine.fp8_parameters and trains_linears(model):
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
    if layout.sequence_parallel and layout.tensor > 1 and (model.lora is None or model.lora.norms):
        norms = 2 * stage_layers(model, layout)[stage] + last
        transfers.append(Transfer("tp", "all_reduce", engine.gradient * norms * model.hidden_size, "norms"))
    if model.tied and trains_embedding(model) and layout.pipeline > 1 and (stage == 0 or last):
        table = model.padded_vocab_size * model.hidden_size // layout.tensor
        transfers.append(Transfer("ends", "all_reduce", engine.gradient * table, "tied embedding"))
    return transfers


def select_mlp(transfers: list[Transfer]) -> list[Transfer]:
    """Return the transfers of the MLP, which recompute of the MLP repeats."""
    return [transfer for transfer in transfers if transfer.at in ("fc1", "fc2")]


def count_bytes(model: Model, layout: Layout, engine: Engine, stage: int) -> Counter[tuple[str, str]]:
    """Return {(group, operation): bytes} of a rank of `stage` in a step.

    The bytes are those of the whole tensors. In an operation among n ranks each rank sends (n - 1) / n of them, and
    twice as many in an all_reduce.
    """
    layers = stage_layers(model, layout)[stage]
    first, last = stage == 0, stage == layout.pipeline - 1
    total: Counter[tuple[str, str]] = Counter()

    def add(transfers: list[Transfer], times: int) -> None:
        for transfer in transfers:
            total[transfer.group, transfer.operation] += times * transfer.nbytes

    ahead = layer_forward_transfers(model, layout, engine)
    each = layout.micro_batches
    add(ahead, each * (layers + repeated_layers(layout, layers)))
    add(regather_transfers(model, layout, engine), each * (layers - repeated_layers(layout, layers)))
    add(select_mlp(ahead), each * layers * ("mlp" in layout.recompute_modules))
    add(layer_backward_transfers(model, layout, engine), each * layers)
    add(end_forward_transfers(model, layout, engine, first, last), each)
    add(end_backward_transfers(model, layout, engine, first, last), each)
    add([stage_transfer(model, layout, engine)], each * count_sends(layout, stage))
    add(step_transfers(model, layout, engine, stage), 1)
    return +total


def _layer_tp(model: Model, layout: Layout, engine: Engine) -> list[Transfer]:
    if layout.tensor == 1:
        return []
    hidden = _hidden_bytes(model, layout, engine)
    overlapped = layout.overlap_tensor
    transfers = [Transfer("tp", _reduce_operation(layout), hidden, at, overlapped) for at in ("proj", "fc2")]
    if layout.sequence_parallel:
        transfers += [Transfer("tp", "all_gather", hidden, at, overlapped) for at in ("qkv", "fc1")]
    if model.num_query_groups < layout.tensor:  # each rank computes a part of a head, so the parts are gathered
        transfers.append(Transfer("tp", "all_gather", _all_heads_bytes(model, layout, engine), "qkv"))
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
    # Keys and values travel around the ring during attention, in the backward pass together with their gradients.
    part = 2 * whole * (layout.context - 1) / layout.context
    return [Transfer("cp", "send", 2 * part if backward else part, "attention", overlapped=True)]


def _hidden_bytes(model: Model, layout: Layout, engine: Engine) -> int:
    tokens, _ = tokens_of_rank(layout)
    return engine.element * tokens * model.hidden_size


def _all_heads_bytes(model: Model, layout: Layout, engine: Engine) -> int:
    tokens, _ = tokens_of_rank(layout)
    return engine.element * tokens * (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels


def _reduce_operation(layout: Layout) -> str:
    """Return the operation that sums the outputs of a row-parallel linear."""
    return "reduce_scatter" if layout.sequence_parallel else "all_reduce"


# Durations.


def group_shape(layout: Layout, group: str) -> tuple[int, int]:
    """Return (number of ranks, distance between neighbouring ranks) of a group."""
    tp, cp, dp = layout.tensor, layout.context, layout.data
    stage = tp * cp * dp
    return {
        "tp": (tp, 1),
        "cp": (cp, tp),
        "dp": (cp * dp, tp),
        "pp": (layout.pipeline, stage),
        "ends": (2, stage * (layout.pipeline - 1)),
    }[group]


def transfer_seconds(transfer: Transfer, layout: Layout, cluster: Cluster) -> float:
    """Return the seconds of one transfer in a ring over its group, without other traffic.

    Within a host a ring runs at the speed of the host's links. Across hosts it can use the network adapters of all its
    ranks in a host.
    """
    size, distance = group_shape(layout, transfer.group)
    in_a_host = max(min(size, cluster.host // distance), 1)
    crosses = in_a_host < size
    hop = HOP_BETWEEN if crosses else HOP_INSIDE
    share = LINKS["pair" if size == 2 or transfer.operation == "send" else "inside"]
    inside, between = share * cluster.inside, LINKS["between"] * cluster.between
    if transfer.operation == "send":
        return hop + transfer.nbytes / (between if crosses else inside)
    speed = min(inside, in_a_host * between) if crosses else inside
    rounds = 2 if transfer.operation == "all_reduce" else 1
    return rounds * (size - 1) * (hop + transfer.nbytes / size / speed)


def bucket_share(layout: Layout, count: int) -> float:
    """Return the share of a stage's `count` parameters in the one bucket that cannot overlap."""
    return min(max(BUCKET, 1e6 * layout.data * layout.context) / count, 1.0)
