"""Prediction of a training run's GPU memory from its model, layout and software.

It predicts the peak of torch's allocator (`torch.cuda.max_memory_allocated`, the GiB of the progress line) on one rank
of each pipeline stage, and from it the memory of the device. `saved_by_layer` and `saved_at_loss` name every tensor
kept for the backward pass; tests/planning/test_memory.py counts the same tensors in the real model.
tests/planning/test_measured.py compares whole predictions with the peaks of measured_runs.json. With LoRA, frozen
weights have no gradient and no optimizer state (`weights` says which weights train).

The optimizer's step is never the peak, because it works in place after the activations are freed. Not included: saving
and loading checkpoints, evaluation at lengths beyond --seq-length, attention that stores its scores.
"""

import math
from dataclasses import dataclass

from megatron_cream.planning import outside
from megatron_cream.planning.run import Engine, Layout, Model
from megatron_cream.planning.weights import (
    adapter_parameters,
    has_nf4,
    joined_adapters,
    layer_weights,
    nf4_bytes,
    parameters,
    stage_layers,
    trained_parameters,
    trains_embedding,
    trains_head,
    trains_linears,
)

# The caching allocator's unused pieces as a share of its peak: 3.2 and 4.1 % where the 7B with TP 2 x DP 2 ran out of
# memory on H100s, at most 3 % where a 3B in FP8 did not.
FRAGMENTATION = 0.03

# cuBLAS's workspaces on a Hopper GPU: of the forward thread, the backward thread and cublasLt.
WORKSPACE = 3 * 32 * 2**20


# Bytes on the host of a parameter that --optimizer-cpu-offload moves there: weight, gradient and moments in float32.
HOST_COPY = 16


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each rank of one pipeline stage at its peak.

    activations: tensors that the layers keep for the backward pass, of all micro-batches in flight.
    loss: final norm, logits and their gradient, if the peak is at the loss.
    host: of the host's memory, for what --optimizer-cpu-offload moves there.
    working: temporary tensors of the backward pass, if the peak is there.
    buffers: permanent buffers: FP8 weights, workspaces, gathered sequences, placeholders for gradients, and those of
        CUDA graphs.
    peak_at: the moment of the peak.
    communicators: the number of NCCL's.
    user_buffers: Transformer Engine's, which torch does not allocate.
    """

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    host: int
    activations: int
    loss: int
    working: int
    buffers: int
    peak_at: str
    communicators: int
    user_buffers: int

    @property
    def allocated(self) -> int:
        """Peak of torch's allocator."""
        parts = (self.parameters, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.loss + self.working + self.buffers

    @property
    def device(self) -> int:
        """Bytes that nvidia-smi shows, with unused pieces and what torch does not allocate."""
        beside = outside.CONTEXT + self.communicators * outside.COMMUNICATOR + self.user_buffers
        return round(self.allocated * (1 + FRAGMENTATION)) + beside


def predict(model: Model, layout: Layout, engine: Engine, stage: int | None = None) -> Memory:
    """Return the memory of a pipeline stage, or of the stage that needs most."""
    stages = range(layout.pipeline) if stage is None else [stage]
    return max((_stage(model, layout, engine, each) for each in stages), key=lambda memory: memory.allocated)


# Tensors kept for the backward pass.


def in_flight(layout: Layout, stage: int) -> float:
    """Return the maximum number of micro-batches whose activations a stage keeps.

    A micro-batch in one chunk of interleaved stages counts as a fraction. In Megatron's schedules, 1F1B starts with
    pipeline - stage micro-batches, and the interleaved schedule with 2 (pipeline - stage - 1) + (virtual - 1) group
    + 1 chunks.
    """
    p, v = layout.pipeline, layout.virtual_pipeline
    if v == 1:
        return min(layout.micro_batches, p - stage)
    chunks = 2 * (p - stage - 1) + (v - 1) * (layout.micro_batch_group or p) + 1
    return min(layout.micro_batches * v, chunks) / v


def tokens_of_rank(layout: Layout) -> tuple[int, int]:
    """Return the tokens of a micro-batch on one rank: in attention and MLP, and between them."""
    tokens = layout.seq_length * layout.micro_batch // layout.context
    return tokens, tokens // layout.tensor if layout.sequence_parallel else tokens


def saved_by_layer(model: Model, layout: Layout, engine: Engine) -> dict[str, int]:
    """Return {tensor: bytes} that one layer keeps of one micro-batch, without recompute.

    The residual stream is kept as the input of each norm, which also keeps 1 / rms of each token in float32. The
    attention's output is also the input of the next linear. In FP8 the linears keep their own inputs.
    """
    tokens, between = tokens_of_rank(layout)
    a, quantized = engine.element, 1 if engine.fp8 else engine.element
    linear = {name: _kept_input(model, name, quantized, a) for name in ("qkv", "proj", "fc1", "fc2")}
    hidden = between * model.hidden_size
    heads = model.num_attention_heads // layout.tensor
    groups = max(model.num_query_groups // layout.tensor, 1)
    query, key = tokens * heads * model.kv_channels, tokens * groups * model.kv_channels
    ffn = tokens * model.ffn_hidden_size // layout.tensor
    # With gathered keys attention keeps its output as two halves, unless it is recomputed; the joined output is extra.
    joined = gathers_all_keys(layout, engine) and "core_attn" not in layout.recompute_modules
    saved = {
        "attention norm input": a * hidden + 4 * between,
        "qkv input": linear["qkv"] * hidden,
        "query": a * query,
        "key": a * key,
        "value": a * key,
        "attention output": a * query,
        "attention log-sum-exp": 4 * tokens * heads,
        "mlp norm input": a * hidden + 4 * between,
        "fc1 input": linear["fc1"] * hidden,
        "fc1 output": a * 2 * ffn,
        "fc2 input": linear["fc2"] * ffn,
    }
    if engine.fp8 or joined:  # a quantized copy, or the joined halves: not a tensor that attention keeps
        saved["proj input"] = linear["proj"] * query
    # If the kernel does not split the projection's output, key and value are views that keep the whole output. With
    # fewer groups than ranks that is the output of all ranks.
    everywhere = model.num_query_groups < layout.tensor
    whole = a * tokens * (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    whole //= 1 if everywhere else layout.tensor
    if model.qk_norm:
        saved["query norm input"] = a * query if groups > 1 else 0  # a copy, or a view with one group
        saved["key norm input"] = whole + 4 * tokens * (heads + groups)
        if not joined:
            saved["value"] = 0
    elif not joined and (everywhere or not engine.own_kernels):
        saved["value"] = whole
    return saved | _saved_by_adapters(model, layout, engine)


def _kept_input(model: Model, linear: str, quantized: int, element: int) -> int:
    """Return the bytes that a linear keeps for an element of its input.

    A frozen linear needs no input in the backward pass; its adapters keep it unquantized, and with dropout a mask.
    """
    if trains_linears(model):
        return quantized
    return element + model.lora.dropout if linear in joined_adapters(model, 1) else 0


def _saved_by_adapters(model: Model, layout: Layout, engine: Engine) -> dict[str, int]:
    """Return {tensor: bytes} that the adapters of one layer keep, besides the inputs of their linears."""
    if model.lora is None:
        return {}
    tokens, between = tokens_of_rank(layout)
    joined = joined_adapters(model, layout.tensor)
    kept = {"qkv": tokens, "proj": between, "fc1": tokens, "fc2": between}
    saved = {"attention adapters": 0, "mlp adapters": 0}
    for at, (rank, inputs, outputs) in joined.items():
        matrices = rank * (inputs + outputs) if at in ("qkv", "fc1") else 0  # joined ones; a single one is no copy
        module = "attention" if at in ("qkv", "proj") else "mlp"
        saved[f"{module} adapters"] += engine.element * (kept[at] * rank + matrices)
    return saved


def gathers_all_keys(layout: Layout, engine: Engine) -> bool:
    """Return whether a layer gathers the keys and values of all context-parallel ranks.

    It does not keep them, and gathers them again in the backward pass.
    """
    return engine.gathers_keys and layout.context > 1


def dropped_by_recompute(model: Model, layout: Layout, engine: Engine) -> set[str]:
    """Return the names in `saved_by_layer` that selective recompute does not keep."""
    fused_norms = engine.transformer_engine and model.lora is None  # adapters read the output of the norms
    if layout.recompute != "selective":
        return set()
    dropped = set()
    if "core_attn" in layout.recompute_modules:
        dropped |= {"attention log-sum-exp"}
        dropped |= set() if _kept_input(model, "proj", 1, 1) else {"attention output"}
    if "layernorm" in layout.recompute_modules and not fused_norms:
        dropped |= {"qkv input", "fc1 input"}
    if "mlp" in layout.recompute_modules:
        dropped |= {"fc1 output", "fc2 input", "mlp adapters"} & saved_by_layer(model, layout, engine).keys()
        # The checkpoint keeps the MLP's input. With the norm inside fc1 that is the residual stream, kept anyway.
        dropped |= {"fc1 input"} if fused_norms else set()
    return dropped


def saved_by_layers(model: Model, layout: Layout, engine: Engine, layers: int) -> int:
    """Return the bytes that `layers` layers of a stage keep of one micro-batch."""
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
    dropped = dropped_by_recompute(model, layout, engine)
    each = sum(value for name, value in saved.items() if name not in dropped)
    if "fc1 output" in dropped and not _kept_input(model, "fc1", 1, 1):
        each += engine.element * tokens_of_rank(layout)[1] * model.hidden_size  # the checkpoint keeps the MLP's input
    return layers * each


def angle_bytes(model: Model, layout: Layout) -> int:
    """Return the bytes of a micro-batch's cosines and sines, which all layers share."""
    return 2 * 4 * tokens_of_rank(layout)[0] * model.kv_channels


def graph_bytes(model: Model, layout: Layout, engine: Engine) -> int:
    """Return the bytes that the CUDA graphs of one layer hold of one micro-batch, besides its activations.

    Three tensors of the size of the layer's input (probably a copy of it, and the gradients of input and output), and a
    copy of cosines and sines. This is inferred from the peaks of a 1.1B and a 135M, which it meets within 0.1 GiB.
    """
    _, between = tokens_of_rank(layout)
    return 3 * engine.element * between * model.hidden_size + angle_bytes(model, layout)


def saved_at_loss(model: Model, layout: Layout, engine: Engine) -> dict[str, int]:
    """Return {tensor: bytes} that final norm, head and cross-entropy keep."""
    tokens, between = tokens_of_rank(layout)
    logits = tokens * model.padded_vocab_size // layout.tensor
    saved = {
        "final norm input": engine.element * between * model.hidden_size + 4 * between,
        "head input": engine.element * between * model.hidden_size if trains_head(model) else 0,
    }
    if engine.own_kernels:
        return saved | {"logits": engine.element * logits, "log of the sum": 4 * tokens}
    return saved | {"probabilities": 4 * logits}


# The peak.


def _stage(model: Model, layout: Layout, engine: Engine, stage: int) -> Memory:
    count = parameters(model, layout, stage)
    layers = stage_layers(model, layout)[stage]
    micro_batches = in_flight(layout, stage)
    one = saved_by_layers(model, layout, engine, layers) + angle_bytes(model, layout)
    kept = round(micro_batches * one)

    last = stage == layout.pipeline - 1
    moments = [("backward pass of a layer", kept, 0, _backward_bytes(model, layout, engine, layers, last))]
    if last:
        moments.append(("loss", kept, _loss_bytes(model, layout, engine), 0))
    if stage == 0 and trains_embedding(model):
        gradient = engine.element * model.padded_vocab_size * model.hidden_size // layout.tensor
        # CUDA graphs keep the memory of activations for the next step.
        left = kept if engine.graphs else max(kept - one, 0)
        moments.append(("gradient of the embedding", left, 0, gradient))
    peak_at, activations, loss, working = max(moments, key=lambda moment: sum(moment[1:]))
    in_graphs = layers * graph_bytes(model, layout, engine) if engine.graphs else 0

    shards = layout.data * layout.context if layout.distributed_optimizer else 1
    linears = layers * sum(layer_weights(model, layout.tensor).values())
    parameter_bytes = engine.element * (count + adapter_parameters(model, layout, stage))
    trained = trained_parameters(model, layout, stage)
    if engine.fp8_parameters:
        parameter_bytes -= (engine.element - 1) * linears
    if has_nf4(model):
        parameter_bytes -= engine.element * linears - nf4_bytes(linears, engine.element)
    return Memory(
        stage=stage,
        parameters=parameter_bytes,
        gradients=engine.gradient * trained,
        optimizer=math.ceil((1 - engine.optimizer_offload) * engine.optimizer * trained / shards),
        host=math.ceil(engine.optimizer_offload * HOST_COPY * trained / shards),
        activations=activations,
        loss=loss,
        working=working,
        buffers=_buffer_bytes(model, layout, engine, linears, last) + round(micro_batches * in_graphs),
        peak_at=peak_at,
        communicators=outside.count_communicators(model, layout),
        user_buffers=outside.user_buffer_bytes(model, layout, engine),
    )


def _backward_bytes(model: Model, layout: Layout, engine: Engine, layers: int, last: bool) -> int:
    """Return the most bytes that one layer's backward pass adds, in its MLP or its attention."""
    tokens, between = tokens_of_rank(layout)
    hidden, residual = tokens * model.hidden_size, between * model.hidden_size
    ffn = tokens * model.ffn_hidden_size // layout.tensor
    gathered = hidden + residual if layout.sequence_parallel else hidden
    weights = layer_weights(model, layout.tensor)
    fused = engine.transformer_engine and engine.fused_weight_gradients
    if (fused or not trains_linears(model)) and not has_nf4(model):  # an unpacked weight is as large as its gradient
        weights = dict.fromkeys(weights, 0)  # none, or one of each, which `_buffer_bytes` counts
    # Besides the kept tensors there are the residual stream's gradient and the module's gradients. A module's tensors
    # are freed when it is done: fc2's input before SwiGLU's gradient, fc1's output before fc1's gradient.
    fc2 = (hidden if layout.sequence_parallel else 0) + ffn + weights["fc2"]
    kept = ffn if _kept_input(model, "fc2", 1, 1) else 0
    swiglu = 3 * ffn - kept
    fc1 = gathered + weights["fc1"] - kept
    working = engine.element * (residual + max(fc2, swiglu, fc1))
    saved = saved_by_layer(model, layout, engine)
    # Keys and values of all ranks, as on the first rank, whose queries see all of them.
    everything = 2 * saved["key"] * layout.context if gathers_all_keys(layout, engine) else 0
    if layout.recompute == "full":
        uniform = layout.recompute_method == "uniform"
        # With the block method, the other layers' activations are freed before the recomputed layers run backward.
        keeps_others = not uniform and layers > layout.recompute_layers
        again = min(layout.recompute_layers, layers) if uniform else 0 if keeps_others else 1
        working += again * (sum(saved.values()) + everything)
        if again and layout.scatter_saved:
            working += engine.element * residual  # the layer's output; the scattered first input is gathered
    else:
        dropped = dropped_by_recompute(model, layout, engine)
        # Attention is recomputed when the MLP's tensors are freed, which are larger.
        working += sum(saved[name] for name in dropped if not name.startswith("attention "))
        working += engine.element * residual if "fc1 output" in dropped else 0  # the MLP's output
    if everything:
        # The MLP's tensors are freed. The gathered tensors, queries and output have gradients, one half at a time.
        at_mlp = engine.element * max(fc2, swiglu, fc1)
        gone = sum(saved[name] for name in saved if name.startswith(("mlp", "fc", "proj")))
        at_attention = 5 * saved["query"] // 2 + saved["key"] - gone
        at_attention += everything * (1 if layout.recompute == "full" and again else 2)
        working += max(at_attention - at_mlp, 0)
    if not last:
        working += engine.element * residual  # the gradient from the next stage
    return working


def _loss_bytes(model: Model, layout: Layout, engine: Engine) -> int:
    """Return the most bytes that final norm, head and cross-entropy hold, with gradients."""
    tokens, between = tokens_of_rank(layout)
    saved, a = saved_at_loss(model, layout, engine), engine.element
    logits = tokens * model.padded_vocab_size // layout.tensor
    # The head's backward pass has gradients of the logits, the hidden states and, without a buffer, the weight.
    head = a * (logits + tokens * model.hidden_size)
    head += a * between * model.hidden_size if layout.sequence_parallel else 0
    if trains_head(model) and not (engine.transformer_engine and engine.fused_weight_gradients):
        head += a * model.padded_vocab_size * model.hidden_size // layout.tensor
    if not engine.own_kernels:
        head = max(head, (4 + a) * logits)  # the gradient in float32, and rounded
    return saved["final norm input"] + saved["head input"] + head


def _buffer_bytes(model: Model, layout: Layout, engine: Engine, linears: int, last: bool) -> int:
    """Return the bytes that are held from the first step on."""
    total = WORKSPACE
    tokens, _ = tokens_of_rank(layout)
    if layout.sequence_parallel and layout.tensor > 1 and (last or not engine.transformer_engine):
        total += engine.element * tokens * model.hidden_size  # Megatron's linears gather their input there
    if engine.transformer_engine and engine.fused_weight_gradients:
        # Autograd gets a placeholder for each weight gradient, one of each shape.
        shapes = sum(layer_weights(model, layout.tensor).values()) if trains_linears(model) else 0
        shapes += model.padded_vocab_size * model.hidden_size // layout.tensor if last and trains_head(model) else 0
        total += engine.element * shapes
    if engine.fp8:
        # Each weight in FP8 and its transpose, which Hopper's FP8 GEMMs need.
        total += (1 if engine.fp8_parameters else 2) * linears
    return total
