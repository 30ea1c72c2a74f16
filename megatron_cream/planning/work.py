"""What the GPUs compute in a step: shapes of matrix products, FLOPs of attention, bytes that other kernels move."""

from megatron_cream.planning.memory import layer_weights, parameters, stage_layers, tokens_of_rank
from megatron_cream.planning.run import Engine, Layout, Model

# Bytes that a logit costs in Megatron's unfused cross-entropy: the cast, maximum, difference, exponential, sum and
# quotient in float32, and the gradient, scaled and rounded; each read or written apart.
_UNFUSED_LOSS = 52
# A rotation by torch's own operations: the cast, four products and two sums in float32, two roundings, a concatenation.
_UNFUSED_ROTATION = 44


def layer_products(model: Model, layout: Layout) -> dict[str, tuple[int, int, int]]:
    """The four linears of a layer on one rank: name -> (rows m, outputs n, inputs k) of the forward product."""
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


def head_product(model: Model, layout: Layout) -> tuple[int, int, int]:
    """The same of the output layer."""
    tokens, _ = tokens_of_rank(layout)
    return tokens, model.padded_vocab_size // layout.tensor, model.hidden_size


def repeated_layers(layout: Layout, layers: int) -> int:
    """Of a stage's layers those whose whole forward pass is done again."""
    if layout.recompute != "full":
        return 0
    return layers if layout.recompute_method == "uniform" else min(layout.recompute_layers, layers)


def attention_flops(model: Model, layout: Layout) -> float:
    """Of one layer's attention forward, on one rank: causal, so half of all pairs; the backward pass has twice that."""
    width = model.num_attention_heads * model.kv_channels / layout.tensor
    return 2.0 * layout.micro_batch * layout.seq_length**2 / layout.context * width


def layer_bytes(model: Model, layout: Layout, engine: Engine) -> dict[str, tuple[float, float]]:
    """Bytes that a layer's other kernels read and write of one micro-batch, (forward, backward)."""
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
        moved["SwiGLU"] = (3 * ffn, 10 * ffn)  # torch.compile's backward pass goes twice
    if engine.fp8:
        # Each linear's input, and the gradient of its output, quantized with their transposes.
        shapes = layer_products(model, layout).values()
        moved["cast to FP8"] = (4 * sum(m * k for m, n, k in shapes), 4 * sum(m * n for m, n, k in shapes))
    return moved


def end_bytes(model: Model, layout: Layout, engine: Engine, first: bool, last: bool) -> dict[str, tuple[float, float]]:
    """The same of the embedding (on the first stage), and of final norm and loss (on the last)."""
    tokens, between = tokens_of_rank(layout)
    residual = engine.element * between * model.hidden_size
    moved = {}
    if first:
        # Backward: gradients summed by token into zeros, which are then added to the float32 buffer.
        table = model.padded_vocab_size * model.hidden_size / layout.tensor
        moved["embedding"] = (2 * residual, 2 * residual + (2 * engine.element + 2 * engine.gradient) * table)
    if last:
        logits = tokens * model.padded_vocab_size / layout.tensor
        moved["final norm"] = (2 * residual, 3 * residual)
        each = (engine.element, 2 * engine.element) if engine.own_kernels else (_UNFUSED_LOSS / 2,) * 2
        moved["cross-entropy"] = (each[0] * logits, each[1] * logits)
    return moved


def step_bytes(model: Model, layout: Layout, engine: Engine, stage: int) -> dict[str, float]:
    """Bytes that the optimizer and what goes with it move once a step on a rank of one stage."""
    count = parameters(model, layout, stage)
    shard = count / (layout.data * layout.context if layout.distributed_optimizer else 1)
    # The gradient, for its norm and for the update; the state there and back; the weight.
    each = 2 * engine.gradient + 2 * engine.optimizer + engine.element
    if not engine.one_pass_optimizer:
        # Scaled by tokens and clipped in passes of their own; the master weight read once more to be rounded.
        each += 4 * engine.gradient + 4
    moved = {"optimizer": each * shard, "zero gradients": engine.gradient * float(count)}
    if engine.fp8:
        linears = stage_layers(model, layout)[stage] * sum(layer_weights(model, layout.tensor).values())
        moved["cast to FP8"] = 4.0 * linears  # with their transposes
    return moved
