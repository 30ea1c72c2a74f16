"""How much GPU memory a training run takes: plain arithmetic over a model, a layout and what the software stores.

What is predicted is the peak of torch's allocator (`torch.cuda.max_memory_allocated`, the GiB of the progress
line) on one rank of each pipeline stage, and from it what the device must hold. Every tensor kept for the
backward pass is named in `saved_by_layer` and `saved_at_loss`; tests/planning/test_memory.py counts the same tensors in
the real model; tests/planning/test_measured.py compares whole predictions with the peaks of measured_runs.json.

The optimizer's step is never the peak: it works in place, and activations are gone by then. Not in here:
saving and loading checkpoints, evaluation at lengths beyond --seq-length, attention that stores its scores.
"""

import math
from dataclasses import dataclass

from megatron_cream.planning.hardware import GIB
from megatron_cream.planning.run import Engine, Layout, Model

# On the device beside what torch allocates. Assumed, not measured: the caching allocator's unused pieces as a
# share of its peak; the CUDA context with the kernels; the communicators' buffers of one run on several GPUs.
FRAGMENTATION = 0.04
CONTEXT = int(0.6 * GIB)
COMMUNICATORS = int(0.8 * GIB)

# cuBLAS's workspaces on a Hopper GPU, of the forward and the backward thread and of cublasLt.
WORKSPACE = 3 * 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each rank of one pipeline stage at its peak.

    activations: kept for the backward pass, by the layers, of all micro-batches in flight.
    loss: final norm, logits and their gradient, where the peak lies there.
    working: what the running backward pass adds, else.
    buffers: held throughout: FP8 weights, workspaces, gathered sequences, stand-ins for gradients.
    peak_at: the moment of the peak.
    """

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    working: int
    buffers: int
    peak_at: str
    several_gpus: bool

    @property
    def allocated(self) -> int:
        """Peak of torch's allocator."""
        parts = (self.parameters, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.loss + self.working + self.buffers

    @property
    def device(self) -> int:
        """What nvidia-smi shows: with the allocator's unused pieces, CUDA's context and NCCL's buffers."""
        outside = CONTEXT + (COMMUNICATORS if self.several_gpus else 0)
        return round(self.allocated * (1 + FRAGMENTATION)) + outside


def predict(model: Model, layout: Layout, engine: Engine, stage: int | None = None) -> Memory:
    """The memory of a pipeline stage, or of the one that needs most."""
    stages = range(layout.pipeline) if stage is None else [stage]
    return max((_stage(model, layout, engine, each) for each in stages), key=lambda memory: memory.allocated)


# Which stage has what.


def stage_layers(model: Model, layout: Layout) -> list[int]:
    """Number of layers of each pipeline stage."""
    ends = {}
    if layout.pipeline > 1:
        if layout.first_stage is not None:
            ends[0] = layout.first_stage
        if layout.last_stage is not None:
            ends[layout.pipeline - 1] = layout.last_stage
    others = layout.pipeline - len(ends)
    share = (model.num_layers - sum(ends.values())) // max(others, 1)
    return [ends.get(stage, share) for stage in range(layout.pipeline)]


def layer_weights(model: Model, tensor: int) -> dict[str, int]:
    """Elements of the four linears of one layer, on one tensor-parallel rank."""
    heads = model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    return {
        "qkv": model.hidden_size * (heads + 2 * groups) // tensor,
        "proj": model.hidden_size * heads // tensor,
        "fc1": model.hidden_size * 2 * model.ffn_hidden_size // tensor,
        "fc2": model.hidden_size * model.ffn_hidden_size // tensor,
    }


def parameters(model: Model, layout: Layout, stage: int) -> int:
    """Elements on one rank of a stage. The first has the embedding, the last the final norm and the head; a tied
    head on another stage than the embedding is a copy of it."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    layer = sum(layer_weights(model, layout.tensor).values()) + 2 * model.hidden_size
    if model.qkv_bias:
        layer += (heads + 2 * groups) * model.kv_channels // layout.tensor
    if model.qk_norm:
        layer += 2 * model.kv_channels
    vocabulary = model.padded_vocab_size * model.hidden_size // layout.tensor
    first, last = stage == 0, stage == layout.pipeline - 1
    total = stage_layers(model, layout)[stage] * layer
    total += vocabulary if first else 0
    total += model.hidden_size if last else 0
    total += vocabulary if last and not (model.tied and first) else 0
    return total


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at most, as shares of all its layers.

    Megatron's schedules: 1F1B starts with pipeline - stage micro-batches; interleaved with
    2 (pipeline - stage - 1) + (virtual - 1) pipeline + 1 of a chunk each.
    """
    p, v = layout.pipeline, layout.virtual_pipeline
    if v == 1:
        return min(layout.micro_batches, p - stage)
    chunks = 2 * (p - stage - 1) + (v - 1) * p + 1
    return min(layout.micro_batches * v, chunks) / v


# What is kept for the backward pass.


def tokens_of_rank(layout: Layout) -> tuple[int, int]:
    """Tokens of a micro-batch on one rank: inside attention and MLP, and between them."""
    tokens = layout.seq_length * layout.micro_batch // layout.context
    return tokens, tokens // layout.tensor if layout.sequence_parallel else tokens


def saved_by_layer(model: Model, layout: Layout, engine: Engine) -> dict[str, int]:
    """Bytes of the tensors that one layer keeps of one micro-batch, without recompute.

    The residual stream is kept where a norm reads it; a norm keeps 1 / rms of each token in float32. The
    attention's output is also the next linear's input. In FP8 the linears keep inputs of their own.
    """
    tokens, between = tokens_of_rank(layout)
    a, linear = engine.element, 1 if engine.fp8 else engine.element
    hidden = between * model.hidden_size
    heads = model.num_attention_heads // layout.tensor
    groups = max(model.num_query_groups // layout.tensor, 1)
    query, key = tokens * heads * model.kv_channels, tokens * groups * model.kv_channels
    ffn = tokens * model.ffn_hidden_size // layout.tensor
    # Of two halves, which are what attention keeps; unless it keeps nothing but what it was given.
    joined = gathers(layout, engine) and "core_attn" not in layout.recompute_modules
    saved = {
        "attention norm input": a * hidden + 4 * between,
        "qkv input": linear * hidden,
        "query": a * query,
        "key": a * key,
        "value": a * key,
        "attention output": a * query,
        "attention log-sum-exp": 4 * tokens * heads,
        "mlp norm input": a * hidden + 4 * between,
        "fc1 input": linear * hidden,
        "fc1 output": a * 2 * ffn,
        "fc2 input": linear * ffn,
    }
    if engine.fp8 or joined:  # quantized, or the halves joined: apart from what attention keeps
        saved["proj input"] = linear * query
    # Where the kernel does not split the projection's output, key and value are views that keep the whole of it;
    # with fewer groups than ranks that is the output of all ranks.
    everywhere = model.num_query_groups < layout.tensor
    whole = a * tokens * (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    whole //= 1 if everywhere else layout.tensor
    if model.qk_norm:
        saved["query norm input"] = a * query if groups > 1 else 0  # a copy, if it is no view as well
        saved["key norm input"] = whole + 4 * tokens * (heads + groups)
        if not joined:
            saved["value"] = 0
    elif not joined and (everywhere or not engine.own_kernels):
        saved["value"] = whole
    return saved


def gathers(layout: Layout, engine: Engine) -> bool:
    """Whether a layer gathers the keys and values of all context-parallel ranks: where they are used, to be
    gathered again in the backward pass; not to be kept."""
    return engine.gathers_keys and layout.context > 1


def dropped_by_recompute(layout: Layout, engine: Engine) -> set[str]:
    """Names in `saved_by_layer` that selective recompute does not keep."""
    if layout.recompute != "selective":
        return set()
    dropped = set()
    if "core_attn" in layout.recompute_modules:
        dropped |= {"attention log-sum-exp"}
    if "layernorm" in layout.recompute_modules and not engine.transformer_engine:
        dropped |= {"qkv input", "fc1 input"}
    if "mlp" in layout.recompute_modules:
        dropped |= {"fc1 output", "fc2 input"}
        # Its checkpoint keeps the MLP's input: with the norm inside fc1, the residual stream, kept anyway.
        dropped |= {"fc1 input"} if engine.transformer_engine else set()
    return dropped


def saved_by_layers(model: Model, layout: Layout, engine: Engine, layers: int) -> int:
    """Bytes that `layers` layers of a stage keep of one micro-batch."""
    saved = saved_by_layer(model, layout, engine)
    if layout.recompute == "full":
        _, between = tokens_of_rank(layout)
        checkpoint = engine.element * between * model.hidden_size
        if layout.scatter_saved:
            checkpoint //= layout.tensor
        if layout.recompute_method == "uniform":
            return math.ceil(layers / layout.recompute_layers) * checkpoint
        recomputed = min(layout.recompute_layers, layers)
        return recomputed * checkpoint + (layers - recomputed) * sum(saved.values())
    dropped = dropped_by_recompute(layout, engine)
    return layers * sum(value for name, value in saved.items() if name not in dropped)


def angles(model: Model, layout: Layout) -> int:
    """Bytes of a micro-batch's cosines and sines, which all layers share."""
    return 2 * 4 * tokens_of_rank(layout)[0] * model.kv_channels


def saved_at_loss(model: Model, layout: Layout, engine: Engine) -> dict[str, int]:
    """Bytes of the tensors that final norm, head and cross-entropy keep."""
    tokens, between = tokens_of_rank(layout)
    logits = tokens * model.padded_vocab_size // layout.tensor
    saved = {
        "final norm input": engine.element * between * model.hidden_size + 4 * between,
        "head input": engine.element * between * model.hidden_size,
    }
    if engine.own_kernels:
        return saved | {"logits": engine.element * logits, "log of the sum": 4 * tokens}
    return saved | {"probabilities": 4 * logits}


# The peak.


def _stage(model: Model, layout: Layout, engine: Engine, stage: int) -> Memory:
    count = parameters(model, layout, stage)
    layers = stage_layers(model, layout)[stage]
    micro_batches = in_flight(layout, stage)
    one = saved_by_layers(model, layout, engine, layers) + angles(model, layout)
    kept = round(micro_batches * one)

    last = stage == layout.pipeline - 1
    moments = [("backward pass of a layer", kept, 0, _working(model, layout, engine, layers, last))]
    if last:
        moments.append(("loss", kept, _at_loss(model, layout, engine), 0))
    if stage == 0:
        gradient = engine.element * model.padded_vocab_size * model.hidden_size // layout.tensor
        moments.append(("gradient of the embedding", max(kept - one, 0), 0, gradient))
    peak_at, activations, loss, working = max(moments, key=lambda moment: sum(moment[1:]))

    shards = layout.data * layout.context if layout.distributed_optimizer else 1
    linears = layers * sum(layer_weights(model, layout.tensor).values())
    parameter_bytes = engine.element * count
    if engine.fp8_parameters:
        parameter_bytes -= (engine.element - 1) * linears
    return Memory(
        stage=stage,
        parameters=parameter_bytes,
        gradients=engine.gradient * count,
        optimizer=math.ceil(engine.optimizer * count / shards),
        activations=activations,
        loss=loss,
        working=working,
        buffers=_buffers(model, layout, engine, linears, last),
        peak_at=peak_at,
        several_gpus=layout.gpus > 1,
    )


def _working(model: Model, layout: Layout, engine: Engine, layers: int, last: bool) -> int:
    """The most that the backward pass through one layer adds: at its MLP, or where it gathers keys, there."""
    tokens, between = tokens_of_rank(layout)
    hidden, residual = tokens * model.hidden_size, between * model.hidden_size
    ffn = tokens * model.ffn_hidden_size // layout.tensor
    gathered = hidden + residual if layout.sequence_parallel else hidden
    weights = layer_weights(model, layout.tensor)
    if engine.transformer_engine and engine.fused_weight_gradients:
        weights = dict.fromkeys(weights, 0)  # one of each is held throughout
    # On top of what was kept: the residual stream's gradient, and the module's own. What a module has run
    # through is gone: fc2's input before SwiGLU's gradient is made, fc1's output before fc1's.
    fc2 = (hidden if layout.sequence_parallel else 0) + ffn + weights["fc2"]
    swiglu = 2 * ffn
    fc1 = gathered + weights["fc1"] - ffn
    working = engine.element * (residual + max(fc2, swiglu, fc1))
    saved = saved_by_layer(model, layout, engine)
    # Keys and values of all ranks; on the first, whose queries see them all.
    everything = 2 * saved["key"] * layout.context if gathers(layout, engine) else 0
    if layout.recompute == "full":
        uniform = layout.recompute_method == "uniform"
        # By the time block's recomputed layers run backward, the others' activations are gone.
        keeps_others = not uniform and layers > layout.recompute_layers
        again = min(layout.recompute_layers, layers) if uniform else 0 if keeps_others else 1
        working += again * (sum(saved.values()) + everything)
        if again and layout.scatter_saved:
            working += engine.element * residual  # the output; the first input, else kept, is gathered
    else:
        dropped = dropped_by_recompute(layout, engine)
        working += sum(saved[name] for name in dropped)
        working += engine.element * residual if "fc1 output" in dropped else 0  # the MLP's output
    if everything:
        # The MLP's tensors are gone; those gathered come with their gradients by halves, queries and output too.
        at_mlp = engine.element * max(fc2, swiglu, fc1)
        gone = sum(saved[name] for name in saved if name.startswith(("mlp", "fc", "proj")))
        at_attention = 5 * saved["query"] // 2 + saved["key"] - gone
        at_attention += everything * (1 if layout.recompute == "full" and again else 2)
        working += max(at_attention - at_mlp, 0)
    if not last:
        working += engine.element * residual  # the gradient that came from the next stage
    return working


def _at_loss(model: Model, layout: Layout, engine: Engine) -> int:
    """The most that final norm, head and cross-entropy hold at a time, gradients among it."""
    tokens, between = tokens_of_rank(layout)
    saved, a = saved_at_loss(model, layout, engine), engine.element
    logits = tokens * model.padded_vocab_size // layout.tensor
    # The head's backward: logits' gradient, the hidden states' and (unless it has a buffer) the weight's.
    head = a * (logits + tokens * model.hidden_size)
    head += a * between * model.hidden_size if layout.sequence_parallel else 0
    if not (engine.transformer_engine and engine.fused_weight_gradients):
        head += a * model.padded_vocab_size * model.hidden_size // layout.tensor
    if not engine.own_kernels:
        head = max(head, (4 + a) * logits)  # the gradient in float32, and rounded
    return saved["final norm input"] + saved["head input"] + head


def _buffers(model: Model, layout: Layout, engine: Engine, linears: int, last: bool) -> int:
    """Bytes held from the first step on."""
    total = WORKSPACE
    tokens, _ = tokens_of_rank(layout)
    if layout.sequence_parallel and layout.tensor > 1 and (last or not engine.transformer_engine):
        total += engine.element * tokens * model.hidden_size  # where Megatron's linears gather their input
    if engine.transformer_engine and engine.fused_weight_gradients:
        # Autograd is handed a gradient that nobody reads, one of each shape.
        shapes = sum(layer_weights(model, layout.tensor).values())
        shapes += model.padded_vocab_size * model.hidden_size // layout.tensor if last else 0
        total += engine.element * shapes
    if engine.fp8:
        # Each weight in FP8 and its transpose, which Hopper's FP8 GEMMs need.
        total += (1 if engine.fp8_parameters else 2) * linears
    return total
