"""The plain values that the planner works on: a model, a layout of ranks, an engine."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shape of a Llama; sizes are numbers of elements."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    padded_vocab_size: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the work is split.

    first_stage, last_stage: layers of these pipeline stages where they are given; the others share the rest.
    recompute: none, selective (of `recompute_modules`), or full by `recompute_method`: uniform keeps the input
        of every `recompute_layers` layers, block recomputes the first `recompute_layers` layers of each stage.
    scatter_saved: the inputs kept under full recompute are split over the tensor-parallel ranks.
    overlap_grad_reduce, overlap_param_gather: gradients are reduced beside the backward pass, weights gathered
        beside the forward pass.
    overlap_tensor: Transformer Engine's user buffers send beside every product of a layer (--tp-comm-overlap).
    rings: they send in the rings of model/user_buffers.yaml, where that is the default.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    virtual_pipeline: int = 1
    first_stage: int | None = None
    last_stage: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    seq_length: int
    micro_batch: int
    global_batch: int
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ()
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    scatter_saved: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_tensor: bool = False
    rings: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def micro_batches(self) -> int:
        """In a step, for each data-parallel rank."""
        return self.global_batch // (self.micro_batch * self.data)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What the software stores, how wide, and with which kernels it computes.

    element: bytes of a parameter and of an activation.
    gradient: bytes of a gradient in Megatron's buffer.
    optimizer: bytes of optimizer state for a parameter: master weight and both moments.
    transformer_engine: its layers, which norm inside their linears.
    own_kernels: this project's Triton kernels: the projection is split as it is rotated, the loss stays in
        `element` and its gradient takes the logits' place. te_rotation: without them, Transformer Engine's kernel
        rotates, as in Megatron's own model; otherwise torch's operations.
    fused_weight_gradients: added to the buffer inside the GEMM.
    one_pass_optimizer: the gradient's scaling, AdamW and the rounding to bf16 are one kernel.
    attention: flash, sdpa or te.
    fp8: recipe of the layers' linears in FP8, as --fp8-recipe has it; fp8_parameters: their weights are kept in it.
    graphs: each layer is one CUDA graph (--cuda-graph-impl local), which the host launches at once.
    """

    transformer_engine: bool
    element: int = 2
    gradient: int = 4
    optimizer: int = 12
    own_kernels: bool = True
    te_rotation: bool = False
    fused_weight_gradients: bool = True
    one_pass_optimizer: bool = True
    attention: str = "flash"
    fp8: str | None = None
    fp8_parameters: bool = False
    graphs: bool = False

    @property
    def gathers_keys(self) -> bool:
        """Under context parallelism each rank holds the keys and values of the whole sequence; Transformer
        Engine's attention passes them around."""
        return self.attention != "te"


@dataclass(frozen=True)
class Run:
    """A run as its flags describe it.

    gpus: what it is planned for; `layout` may need another number.
    target_length: the window that positions are drawn from, in tokens; `layout.seq_length` for full-length training.
    steps: how many it trains; None where the flags do not say.
    """

    model: Model
    layout: Layout
    engine: Engine
    gpus: int
    target_length: int
    steps: int | None

    def misfit(self) -> str | None:
        """Why the layout cannot be spread over the GPUs; None if it can."""
        layout = self.layout
        if self.gpus % (layout.tensor * layout.pipeline * layout.context):
            return (
                f"--gpus {self.gpus}: must be a multiple of --tensor-model-parallel-size {layout.tensor} x "
                f"--pipeline-model-parallel-size {layout.pipeline} x --context-parallel-size {layout.context}"
            )
        return None
