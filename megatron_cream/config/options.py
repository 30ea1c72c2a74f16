"""Every flag of this project, with its meaning, unit and default, and the defaults that it gives Megatron's.

docs/flags.md is made from this page.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_cream.common import devices

LONG_EVAL_TASKS = ("needle", "kv", "perplexity")


@dataclass
class CreamConfig:
    """What this project adds to Megatron's flags."""

    config: str | None = None
    """A YAML recipe: any flag by its name (dashes or underscores). The command line wins."""

    print_config: bool = False
    """Print what would run, as a recipe, and exit."""

    position_sampler: Literal["cream", "pose", "randpos", "pi", "full", "mix"] = "cream"
    """How position ids are drawn. cream: Wu et al. 2024; pose: Zhu et al. 2023; randpos: N sorted random
    positions; pi: 0 .. N-1 (position interpolation); full: 0 .. L-1 at the target length; mix: --position-mix."""

    position_mix: str | None = None
    """Shares of samplers, such as cream=0.6,pose=0.2,pi=0.2: each sample is drawn by one of cream, pose, randpos and
    pi, chosen at random. In place of --position-sampler."""

    target_length: int | None = None
    """L, the window to extend to, in tokens: a multiple of --seq-length. Default: --seq-length."""

    cream_sigma: float | None = None
    """Deviation of the truncated Gaussian that draws the middle's scale. Default: 3.0."""

    cream_variant: str | None = None
    """paper: as published; released: as in the code its authors released. Default: paper."""

    cream_relativity: float | None = None
    """Share of the samples whose head and tail are N/3 tokens, 0 to 1; the others have a long middle. Default: 0.5."""

    cream_middle: Literal["gaussian", "uniform"] | None = None
    """What the middle's scale follows. gaussian: as published; uniform: an even draw, which has no --cream-sigma.
    Default: gaussian."""

    pose_chunks: int | None = None
    """Chunks of contiguous text in a sample of --position-sampler pose, 2 or more. Default: 2."""

    mask_segment_starts: bool = False
    """No loss on the first token of the middle and tail blocks, where the text jumps."""

    rope_scaling_type: Literal["none", "linear", "ntk", "yarn", "llama3"] | None = None
    """How the rotary embedding is scaled for --target-length. Default: the type of the model that training starts
    from, widened where the target needs it; else none. --rope-scaling-factor defaults to --target-length divided by
    the window that the model was pre-trained with."""

    original_max_position_embeddings: int | None = None
    """The window that the model was pre-trained with, before any scaling. Default: what the model says; without a
    model, --seq-length."""

    fp32: bool = False
    """Train in float32 on a GPU too, where bf16 is the default."""

    load_hf: str | None = None
    """Start from these Hugging Face weights: a folder, or a model's name on the Hub. Its shape, rotary
    embedding and tokenizer are taken from there. --load of a checkpoint that exists goes before it."""

    checkpoint_checksums: bool = True
    """Write SHA-256 checksums with each checkpoint, and check those of what is loaded, if it has some."""

    save_hf: str | None = None
    """When training ends, write a Hugging Face folder here, new, that transformers and vLLM load."""

    embedded_data: bool = False
    """Train on the Python standard library's own sources, with a tokenizer made from them."""

    eval_lengths: list[int] | None = field(default=None)
    """At every evaluation, measure held-out perplexity with this many tokens of context, for each."""

    eval_documents: int = 32
    """How many held-out documents --eval-lengths reads, at most."""

    nan_policy: Literal["stop", "skip", "rerun"] = "stop"
    """When a loss or a gradient is NaN or infinite. stop: end on all ranks, weights as before the step; skip:
    leave the step out; rerun: Megatron's rerun state machine, which looks at every micro-batch and is slower."""

    timeout_minutes: float = 10.0
    """End the job, with the stacks of every rank, when one finished no step, evaluation batch or checkpoint for so
    long; six times as long for the start, the first step and a checkpoint. 0: never."""

    signal_exit_code: int = 0
    """Exit code of a run that SIGTERM or SIGUSR1 ended, its checkpoint saved: 0 to 255. Kubernetes starts again what
    ends with another than 0."""

    deterministic: bool = False
    """On a GPU: the same flags on the same GPUs give the same bits. Slower."""

    console: Literal["full", "progress"] = "full"
    """full: Megatron's log and ours on the terminal; progress: ours only, Megatron's to megatron.log in --save."""


@dataclass
class LongEvalConfig:
    """Watching a run at its target lengths."""

    long_eval_interval: int | None = None
    """Evaluate at the target lengths every so many steps, and at the last. Default: not at all."""

    long_eval_tasks: str = "needle,kv"
    """Of needle, kv (retrieval by teacher forcing) and perplexity (of held-out documents), with commas between."""

    long_eval_lengths: list[int] | None = field(default=None)
    """Context lengths, in tokens. Default: --target-length."""

    long_eval_samples: int = 2
    """Prompts of a task at each length, for each of five depths; of perplexity five times as many documents."""

    long_eval_share: float = 0.1
    """Of the run's time, what this may take, 0 to 1, best checkpoints included: an evaluation beyond is left out."""

    long_eval_best: Literal["accuracy", "perplexity", "none"] | None = None
    """Keep the best checkpoint in best/ of --save by the mean accuracy of needle and kv, or the mean perplexity.
    Default: accuracy where one of them is run, else perplexity."""


@dataclass
class SaveConfig:
    """What this project adds to Megatron's flags of checkpoints."""

    most_recent_k: int | None = None
    """Keep the newest K checkpoints in --save, and those that --save-retain-interval keeps; remove earlier ones when
    a newer is whole. What the run was loaded from stays, and so does best/. Default: keep all."""

    save_hook: str | None = None
    """A command to run, in the background, for each whole checkpoint in --save: an upload. Its folder is added as the
    last argument; CHECKPOINT_FOLDER and CHECKPOINT_STEP are set. Its output goes to save_hook.log in --save. A token
    belongs into the environment or a file, as other users of the machine see a command's words."""

    save_hook_minutes: float = 30.0
    """--save-hook is ended after so long, and the end of the run waits no longer for it."""


def project_defaults() -> dict[str, Any]:
    """A Llama on Megatron, and switches whose Megatron default bites somebody new to it."""
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
        # Kernels: what is not installed must not be asked for.
        bf16=cuda,
        distributed_backend="nccl" if cuda else "gloo",
        attention_backend="auto",
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        no_persist_layer_norm=True,
        use_cpu_initialization=not cuda,
        # A checkpoint that any TP x PP x DP opens, optimizer included.
        dist_ckpt_optim_fully_reshardable=True,
        # Every token of a global batch weighs the same, however the batch is split over ranks.
        calculate_per_token_loss=True,
        # Waits for the device at every step; --nan-policy rerun turns it on.
        rerun_mode="disabled",
        # SIGTERM, which clusters send before they take a machine away: save, then exit.
        exit_signal_handler=True,
        # The attention is causal by construction: no mask of s x s is made.
        create_attention_mask_in_dataloader=False,
        # Follows from --timeout-minutes.
        distributed_timeout_minutes=None,
        # Follow from the layout: see overlaps().
        overlap_grad_reduce=None,
        overlap_param_gather=None,
        # The other one is a package of its own, and nothing here is tested with it.
        async_strategy="mcore",
        tokenizer_type="SentencePieceTokenizer",
        split="969,30,1",
        log_interval=1,
        eval_interval=1000,
        eval_iters=10,
        lr_decay_style="linear",
    )
