"""The work of a step: matrix products, FLOPs of attention, bytes of other kernels."""

from megatron_cream.planning.memory import tokens_of_rank
from megatron_cream.planning.run import Engine, Layout, Model
from megatron_cream.planning.weights import (
    has_nf4,
    joined_adapters,
    layer_weights,
    nf4_bytes,
    stage_layers,
    trained_parameters,
    trains_embedding,
    trains_linears,
)

# Bytes moved for a logit by Megatron's unfused cross-entropy: the cast, maximum, difference, exponential, sum and
# quotient in float32, and the scaled and rounded gradient, each read or written separately.
_UNFUSED_LOSS = 52
# Bytes moved for an element by a rotation with torch's operations: the cast, four products and two sums in float32, two
# roundings and a concatenation.
_UNFUSED_ROTATION = 44


def layer_products(model: Model, layout: Layout) -> dict[str, tuple[int, int, int]]:
    """Return {linear: (rows m, outputs n, inputs k)} of a layer's products on one rank.

    The shapes are those of the forward pass.
    """
    tokens, _ = tokens_of_rank(layout)
    heads = model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    tp = layout.tensor
    return {
        "qkv": (tokens, (heads + 2 * groups) // tp, model.hidden_size),
        "proj": (tokens, model.hidden_size, heads // tp),
        "fc1": (tokens, 2 * model.ffn_hidden_size // tp, model.hidden_size),
        "fc2": (tokens, model.hidden_size, model.ffn_hidden_size // tp),
    }


def adapter_products(model: Model, layout: Layout) -> dict[str, list[tuple[int, int, int]]]:
    """Return {linear: [(rows m, outputs n, inputs k)]} of the adapters' two products, as in `layer_products`.

    The A of all projections of a linear are one matrix, and so are the B.
    """
    tokens, _ = tokens_of_rank(layout)
    return {
        linear: [(tokens, rank, inputs), (tokens, outputs, rank)]
        for linear, (rank, inputs, outputs) in joined_adapters(model, layout.tensor).items()
    }


def head_product(model: Model, layout: Layout) -> tuple[int, int, int]:
    """Return (rows m, outputs n, inputs k) of the output layer's forward product on one rank."""
    tokens, _ = tokens_of_rank(layout)
    return tokens, model.padded_vocab_size // layout.tensor, model.hidden_size


def repeated_layers(layout: Layout, layers: int) -> int:
    """Return how many of a stage's layers repeat their whole forward pass."""
    if layout.recompute != "full":
        return 0
    return layers if layout.recompute_method == "uniform" else min(layout.recompute_layers, layers)


def attention_flops(model: Model, layout: Layout) -> float:
    """Return the FLOPs of one layer's attention in the forward pass, on one rank.

    Attention is causal, so half of all pairs count. The backward pass has twice as many FLOPs.
    """
    width = model.num_attention_heads * model.kv_channels / layout.tensor
    return 2.0 * layout.micro_batch * layout.seq_length**2 / layout.context * width


def layer_bytes(model: Model, layout: Layout, engine: Engine) -> dict[str, tuple[float, float]]:
    """Return {kernel: (forward, backward)} bytes of a layer's other kernels.

    The bytes are those of one micro-batch.
    """
    tokens, between = tokens_of_rank(layout)
    a, tp = engine.element, layout.tensor
    residual = a * between * model.hidden_size
    query = tokens * model.num_attention_heads * model.kv_channels / tp
    key = tokens * model.num_query_groups * model.kv_channels / tp
    ffn = a * tokens * model.ffn_hidden_size / tp
    split = 2 * a * (query + 2 * key)
    moved = {
        "norm": (2 * 2 * residual, 2 * 3 * residual),
        "residual add": (2 * 3 * residual, 2 * 3 * residual),
        "rotary and split": (split, split),
        "SwiGLU": (3 * ffn, 5 * ffn),
    }
    if not engine.own_kernels:
        rotation = split + 2 * a * (query + key) if engine.te_rotation else _UNFUSED_ROTATION * (query + key)
        moved["rotary and split"] = (rotation, rotation)
        moved["SwiGLU"] = (3 * ffn, 10 * ffn)  # torch.compile's backward kernel makes two passes
    if joined := joined_adapters(model, layout.tensor).values():
        # The second product adds to the linear's output, which it reads; the input's two gradients are summed.
        inputs, outputs = (tokens * sum(each[at] for each in joined) for at in (1, 2))
        dropped = (2 * a + 1) * inputs if model.lora.dropout else 0
        moved["adapters"] = (a * outputs + dropped, 3 * a * inputs + dropped)
    if has_nf4(model):
        weights = sum(layer_weights(model, tp).values())
        moved["unpack NF4"] = (nf4_bytes(weights, a) + a * weights,) * 2
    if engine.fp8:
        # Each linear's input and the gradient of its output are quantized, together with their transposes.
        shapes = layer_products(model, layout).values()
        moved["cast to FP8"] = (4 * sum(m * k for m, n, k in shapes), 4 * sum(m * n for m, n, k in shapes))
    return moved


def end_bytes(model: Model, layout: Layout, engine: Engine, first: bool, last: bool) -> dict[str, tuple[float, float]]:
    """Return {kernel: (forward, backward)} bytes of embedding, final norm and loss.

    The first stage has the embedding, the last has the final norm and the loss.
    """
    tokens, between = tokens_of_rank(layout)
    residual = engine.element * between * model.hidden_size
    moved = {}
    if first:
        # Backward: gradients are summed by token into a zeroed tensor, which is then added to the float32 buffer.
        table = model.padded_vocab_size * model.hidden_size / layout.tensor
        backward = 2 * residual + (2 * engine.element + 2 * engine.gradient) * table
        moved["embedding"] = (2 * residual, backward if trains_embedding(model) else 0.0)
    if last:
        logits = tokens * model.padded_vocab_size / layout.tensor
        moved["final norm"] = (2 * residual, 3 * residual)
        each = (engine.element, 2 * engine.element) if engine.own_kernels else (_UNFUSED_LOSS / 2,) * 2
        moved["cross-entropy"] = (each[0] * logits, each[1] * logits)
    return moved


def step_bytes(model: Model, layout: Layout, engine: Engine, stage: int) -> dict[str, float]:
    """Return {kernel: bytes} that the optimizer moves once a step, on a rank of one stage."""
    count = trained_parameters(model, layout, stage)
    shard = count / (layout.data * layout.context if layout.distributed_optimizer else 1)
    # Read the gradient for its norm and for the update; read and write the state; write the weight.
    each = 2 * engine.gradient + 2 * engine.optimizer + engine.element
    if not engine.one_pass_optimizer:
        # Scaling by tokens and clipping are separate passes, and the master weight is read once more to round it.
        each += 4 * engine.gradient + 4
    moved = {"optimizer": each * shard, "zero gradients": engine.gradient * float(count)}
    if engine.fp8 and trains_linears(model):
        linears = stage_layers(model, layout)[stage] * sum(layer_weights(model, layout.tensor).values())
        moved["cast to FP8"] = 4.0 * linears  # with their transposes
    return moved
