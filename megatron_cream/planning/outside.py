"""Memory of a GPU that torch's allocator does not hold: CUDA, NCCL's buffers, Transformer Engine's user buffers."""

from megatron_cream.planning.hardware import GIB
from megatron_cream.planning.run import Engine, Layout, Model

CONTEXT = int(0.6 * GIB)
"""CUDA's context with the kernels. Assumed."""
COMMUNICATOR = int(0.7 * GIB)
"""NCCL's buffers of one group: the 7B with TP 2 x DP 2 on four H100s held 4.2 GiB beside torch's and the user buffers,
for five groups and the context."""

ERROR = GIB
"""How far the memory of a device may be from the plan: with TP 2 and user buffers a 7B fitted that was planned 0.7 GiB
too large, and with TP 2 x DP 2 one did not that was planned 0.1 GiB smaller than the GPU."""


def is_close(needed: float, usable: float) -> bool:
    """Return whether a run that is planned to need these bytes may run out of memory."""
    return needed > usable - ERROR


def count_communicators(model: Model, layout: Layout) -> int:
    """Return the number of groups of several ranks that send in a training. Each has an NCCL communicator.

    Megatron sends among all ranks, and again for norms with the distributed optimizer; among the data- and
    context-parallel ranks together, the tensor-parallel, the pipeline and the context-parallel ranks; among the ranks
    of one replica of the model; and between first and last stage if they share the embedding.
    """
    if layout.gpus == 1:
        return 0
    tp, pp, cp, dp = layout.tensor, layout.pipeline, layout.context, layout.data
    shares_embedding = model.tied and pp > 1
    of_several = sum(size > 1 for size in (dp * cp, tp, pp, cp, tp * pp))
    return 1 + layout.distributed_optimizer + shares_embedding + of_several


def user_buffer_bytes(model: Model, layout: Layout, engine: Engine) -> int:
    """Return the bytes of Transformer Engine's user buffers, which `initialize_ub` allocates for each product.

    Each is as large as the hidden states of a micro-batch on all tensor-parallel ranks. In FP8 those that are gathered
    take one byte an element. A ring that reduces has room for what the others send too.
    """
    if not layout.overlap_tensor or layout.tensor == 1:
        return 0
    elements = layout.seq_length * layout.micro_batch // layout.context * model.hidden_size
    if layout.rings:
        gathered, reduced = 6.0, 4 * (2 - 1 / layout.tensor)
    else:
        gathered, reduced = 8.0, 4.0
    return round(elements * (gathered * (1 if engine.fp8 else engine.element) + reduced * engine.element))
