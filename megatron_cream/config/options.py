"""Every flag of this project, and its defaults for Megatron's flags.

Each flag has its meaning, unit and default below it. docs/flags.md is generated from this file.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_cream.common import devices

LONG_EVAL_TASKS = ("needle", "kv", "perplexity")


@dataclass
class CreamConfig:
    """The flags that this project adds to Megatron's."""

    config: str | None = None
    """A YAML recipe, which sets any flag by its name (dashes or underscores): a path, or the name of one of this
    project's recipes. The command line overrides it."""

    print_config: bool = False
    """Print the run as a recipe, and exit."""

    position_sampler: Literal["cream", "pose", "randpos", "pi", "full", "mix"] = "cream"
    """How position ids are drawn. cream: Wu et al. 2024; pose: Zhu et al. 2023; randpos: N sorted random
    positions; pi: 0 .. N-1 (position interpolation); full: 0 .. L-1 at the target length; mix: --position-mix."""

    position_mix: str | None = None
    """Shares of samplers, such as cream=0.6,pose=0.2,pi=0.2. Each sample uses one of cream, pose, randpos and pi,
    chosen at random by these shares. Replaces --position-sampler."""

    target_length: int | None = None
    """L, the window to extend to, in tokens; a multiple of --seq-length. Default: --seq-length."""

    cream_sigma: float | None = None
    """Standard deviation of the truncated Gaussian that the middle block's scale is drawn from. Default: 3.0."""

    cream_variant: str | None = None
    """paper: as published; released: as in the code that the authors released. Default: paper."""

    cream_relativity: float | None = None
    """Share of samples whose head and tail have N/3 tokens, 0 to 1; the others have a long middle. Default: 0.5."""

    cream_middle: Literal["gaussian", "uniform"] | None = None
    """Distribution of the middle block's scale. gaussian: as published; uniform: without --cream-sigma. Default:
    gaussian."""

    pose_chunks: int | None = None
    """Number of chunks of contiguous text in a sample of --position-sampler pose, 2 or more. Default: 2."""

    mask_segment_starts: bool = False
    """Compute no loss on the first token of the middle and tail blocks, where the text jumps."""

    chat_loss: Literal["answers", "all"] = "answers"
    """Tokens of chats with loss. answers: the assistant's, which preprocess_data.py --chat-format marks; all: every
    token, as in the code that CREAM's authors released."""

    rope_scaling_type: Literal["none", "linear", "ntk", "yarn", "llama3"] | None = None
    """How to scale the rotary embedding for --target-length. Default: the scaling of the model that training starts
    from, widened if the target needs it; without a model, none. --rope-scaling-factor defaults to --target-length
    divided by the model's pre-training window."""

    original_max_position_embeddings: int | None = None
    """The model's pre-training window in tokens, before any scaling. Default: from the model's configuration; without a
    model, --seq-length."""

    fp32: bool = False
    """Train in float32 on a GPU too; the default there is bf16."""

    load_hf: str | None = None
    """Start from these Hugging Face weights: a folder, or a model's name on the Hub. Shape, rotary embedding and
    tokenizer are taken from there. If --load has a checkpoint, the run resumes from that instead."""

    checkpoint_checksums: bool = True
    """Write SHA-256 checksums with each checkpoint, and verify those of a loaded checkpoint, if it has any."""

    save_hf: str | None = None
    """When training ends, write the model to this new folder in Hugging Face format, for transformers and vLLM."""

    embedded_data: bool = False
    """Train on the sources of Python's standard library, with a tokenizer trained on them."""

    eval_lengths: list[int] | None = field(default=None)
    """At every evaluation, measure held-out perplexity at each of these context lengths, in tokens."""

    eval_documents: int = 32
    """Maximum number of held-out documents that --eval-lengths reads."""

    nan_policy: Literal["stop", "skip", "rerun"] = "stop"
    """What to do when a loss or a gradient is NaN or infinite. stop: end the run on all ranks, with the weights from
    before the step; skip: skip the step; rerun: use Megatron's rerun state machine, which checks every micro-batch and
    is slower."""

    timeout_minutes: float = 10.0
    """End the job, with stack traces of every rank, when a rank finishes no step, evaluation batch or checkpoint for
    this many minutes. The start, the first step and a checkpoint may take six times as long. 0: never."""

    signal_exit_code: int = 0
    """Exit code of a run that saved its checkpoint and ended because of SIGTERM or SIGUSR1, 0 to 255. Kubernetes
    restarts a job that ends with a code other than 0."""

    deterministic: bool = False
    """On GPUs: make runs with the same flags on the same GPUs bit-identical. Slower."""

    console: Literal["full", "progress"] = "full"
    """full: this project's log and Megatron's on the terminal; progress: only this project's, with Megatron's in
    megatron.log in --save."""


@dataclass
class ShortTextConfig:
    """Flags that mix short documents or chats, packed into samples, into the training data."""

    short_data_path: list[str] | None = field(default=None)
    """Short texts, as --data-path takes them: prefixes, or weights and prefixes. Whole documents of at most
    --seq-length tokens are packed into samples of --seq-length tokens; attention and positions stay within each
    document. All of them are used for training, none for validation."""

    short_share: float | None = None
    """Share of the training samples that are packed short texts, at least 0 and below 1."""

    long_min_tokens: int | None = None
    """Use only documents of --data-path with at least this many tokens. Default: --seq-length."""


@dataclass
class LongEvalConfig:
    """Flags of the evaluation at long context lengths during training."""

    long_eval_interval: int | None = None
    """Evaluate at long context lengths every this many steps, and at the last step. Default: never."""

    long_eval_tasks: str = "needle,kv"
    """Tasks, separated by commas: needle and kv (retrieval by teacher forcing), perplexity (of held-out documents)."""

    long_eval_lengths: list[int] | None = field(default=None)
    """Context lengths, in tokens. Default: --target-length."""

    long_eval_samples: int = 2
    """Prompts of a task for each length and each of five depths. Perplexity reads five times as many documents."""

    long_eval_share: float = 0.1
    """Maximum share of the run's time for long evaluation and its best checkpoints, 0 to 1; evaluations beyond it are
    skipped."""

    long_eval_best: Literal["accuracy", "perplexity", "none"] | None = None
    """Keep the best checkpoint in best/ of --save, by the mean accuracy of needle and kv or by the mean perplexity.
    Default: accuracy if needle or kv runs, else perplexity."""


@dataclass
class SaveConfig:
    """The flags that this project adds to Megatron's flags for saving checkpoints."""

    most_recent_k: int | None = None
    """Keep the newest K checkpoints in --save, and those that --save-retain-interval keeps; remove earlier ones when a
    newer one is complete. The checkpoint that the run was loaded from and best/ stay. Default: keep all."""

    save_hook: str | None = None
    """A command to run in the background for each complete checkpoint in --save, such as an upload. The checkpoint's
    folder is added as the last argument; CHECKPOINT_FOLDER and CHECKPOINT_STEP are set. Output goes to save_hook.log in
    --save. Keep tokens in the environment or a file, because other users of the machine can see a command line."""

    save_hook_minutes: float = 30.0
    """End a --save-hook command after this many minutes; the end of the run waits no longer than that for it."""


@dataclass
class LoraConfig:
    """Flags of LoRA, which trains low-rank adapters instead of the model's weights."""

    lora_rank: int = 0
    """Train adapters of this rank on frozen weights, which --load-hf or --pretrained-checkpoint names. 0: train all
    weights."""

    lora_alpha: float | None = None
    """The adapters' product is multiplied by alpha / rank. Default: twice --lora-rank."""

    lora_dropout: float = 0.0
    """Probability of a zero in the input of the adapters."""

    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    """The projections with adapters, by Hugging Face's names, separated by commas."""

    lora_train: str = "embeddings,norms"
    """What trains beside the adapters, separated by commas: embeddings (and the output layer), norms; or none."""

    lora_plus_ratio: float | None = None
    """LoRA+: the learning rate of B is this many times that of A. Default: 1."""

    lora_rslora: bool = False
    """Rank-stabilized LoRA: multiply by alpha / sqrt(rank) instead."""

    lora_base_dtype: Literal["model", "nf4"] = "model"
    """Number format of the frozen weights of the layers' linears: the model's, or NF4 (QLoRA), which takes a quarter of
    bf16's memory, needs torchao, and runs in this project's layers."""

    load_adapter: str | None = None
    """Start from the adapter in this folder, which PEFT or this project wrote. Rank, alpha, targets and rsLoRA are
    taken from there, and RoPE if it has a config.json."""

    adapter: bool = False
    """With --save-hf: write a folder for PEFT, with the adapter alone, and not the merged model."""


def project_defaults() -> dict[str, Any]:
    """Return this project's defaults for Megatron's flags: a Llama, and safer settings."""
    cuda = devices.has_cuda()
    return dict(
        # Llama
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="none",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        rope_scaling_factor=None,
        # Use no kernel that may not be installed.
        bf16=cuda,
        distributed_backend="nccl" if cuda else "gloo",
        attention_backend="auto",
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        no_persist_layer_norm=True,
        use_cpu_initialization=not cuda,
        # Checkpoints that any TP x PP x DP can load, including the optimizer.
        dist_ckpt_optim_fully_reshardable=True,
        # Every token of a global batch has the same weight, however the batch is split over ranks.
        calculate_per_token_loss=True,
        # It synchronizes with the device at every step; --nan-policy rerun turns it on.
        rerun_mode="disabled",
        # Save and exit on SIGTERM, which clusters send before they take a machine away.
        exit_signal_handler=True,
        # Attention is causal by construction and needs no mask of seq_length x seq_length.
        create_attention_mask_in_dataloader=False,
        # fill.set_megatron_flags derives it from --timeout-minutes.
        distributed_timeout_minutes=None,
        # fill.choose_overlaps derives them from the layout.
        overlap_grad_reduce=None,
        overlap_param_gather=None,
        # fill.set_graphs decides it by the planner.
        cuda_graph_impl=None,
        # The alternative, nvrx, needs another package, and no test here uses it.
        async_strategy="mcore",
        tokenizer_type="SentencePieceTokenizer",
        split="969,30,1",
        log_interval=1,
        eval_interval=1000,
        eval_iters=10,
        lr_decay_style="linear",
    )
