"""The planner's input: a model, a layout of ranks, and an engine (the software)."""

from dataclasses import dataclass

from megatron_cream.model.lora_settings import TARGETS


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The weights that train with LoRA; all others are frozen.

    rank: rank of each adapter.
    targets: projections that have an adapter, by their names in transformers.
    embeddings: whether the embedding and the output layer train.
    norms: whether the norms train.
    dropout: whether each adapter drops a part of its input, of which it keeps a copy.
    nf4: whether the frozen linears of the layers are in NF4.
    """

    rank: int
    targets: tuple[str, ...] = TARGETS
    embeddings: bool = True
    norms: bool = True
    dropout: bool = False
    nf4: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shape of a Llama; sizes are numbers of elements.

    lora: the adapters and what else trains; None if all weights train.
    """

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
    lora: Lora | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The split of the work over ranks, micro-batches and recompute.

    layers_per_chunk: layers of a virtual stage, if the flags give it instead of the number of virtual stages.
    micro_batch_group: micro-batches that an interleaved stage executes in one chunk before the next; None: as many as
        there are stages.
    first_stage, last_stage: number of layers of these pipeline stages, if given; the other stages share the rest.
    recompute: none, selective (of `recompute_modules`), or full by `recompute_method`: uniform keeps the input
        of every `recompute_layers` layers, block recomputes the first `recompute_layers` layers of each stage.
    scatter_saved: whether the inputs kept under full recompute are split over the tensor-parallel ranks.
    overlap_grad_reduce, overlap_param_gather: whether the reduction of gradients overlaps with the backward pass, and
        the gathering of weights with the forward pass.
    overlap_tensor: whether Transformer Engine's user buffers overlap transfers with every product of a layer
        (--tp-comm-overlap).
    rings: whether user buffers send in the rings of model/user_buffers.yaml.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    virtual_pipeline: int = 1
    layers_per_chunk: int | None = None
    micro_batch_group: int | None = None
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
        """Number of GPUs of the layout."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a step, for each data-parallel rank."""
        return self.global_batch // (self.micro_batch * self.data)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The software of a run: its number formats and kernels.

    transformer_engine: whether its layers are used, which compute the norm inside their linears.
    element: bytes of a parameter and of an activation.
    gradient: bytes of a gradient in Megatron's buffer.
    optimizer: bytes of optimizer state for a parameter: master weight and both moments.
    own_kernels: whether this project's Triton kernels are used: they split the projection while they rotate it, and
        the loss stays in `element` and overwrites the logits with their gradient.
    te_rotation: whether Transformer Engine's kernel rotates, as in Megatron's own model, if own_kernels is off;
        otherwise torch's operations do.
    fused_weight_gradients: whether the GEMM adds weight gradients to the buffer.
    one_pass_optimizer: whether scaling the gradient, AdamW and rounding to bf16 are one kernel.
    attention: flash, sdpa or te.
    fp8: recipe of the layers' linears in FP8, as in --fp8-recipe; None without FP8.
    fp8_parameters: whether the weights of those linears are stored in FP8.
    graphs: whether each layer is a CUDA graph (--cuda-graph-impl local), which the host launches at once.
    optimizer_offload: share of the parameters whose optimizer state and update are on the host.
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
    optimizer_offload: float = 0.0

    @property
    def gathers_keys(self) -> bool:
        """Whether each context-parallel rank gathers the keys and values of the whole sequence.

        Transformer Engine's attention passes them around a ring instead.
        """
        return self.attention != "te"


@dataclass(frozen=True)
class Run:
    """A run as described by its flags.

    gpus: number of GPUs to plan for; `layout` may need another number.
    target_length: the window that positions are drawn from, in tokens; `layout.seq_length` for full-length training.
    steps: number of training steps; None if the flags do not set it.
    """

    model: Model
    layout: Layout
    engine: Engine
    gpus: int
    target_length: int
    steps: int | None

    def find_misfit(self) -> str | None:
        """Return why the layout cannot be spread over the GPUs; None if it can."""
        layout = self.layout
        if self.gpus % (layout.tensor * layout.pipeline * layout.context):
            return (
                f"--gpus {self.gpus}: must be a multiple of --tensor-model-parallel-size {layout.tensor} x "
                f"--pipeline-model-parallel-size {layout.pipeline} x --context-parallel-size {layout.context}"
            )
        return None
