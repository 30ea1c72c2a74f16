"""The command line: Megatron's flags and ours, YAML recipes, defaults by what is installed.

Everything a user sets comes in here, and leaves as plain values: Megatron's
namespace for Megatron, small dataclasses and dicts for the rest of the package.
The order of authority, weakest first: Megatron's defaults, this project's, the
recipe given with `--config`, the command line.
"""

import argparse
import contextlib
import functools
import io
import math
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.training.argument_utils import (
    ArgumentGroupFactory,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import rebuild_tokenizer, set_global_variables
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_cream import (
    checks,
    compat,
    console,
    data_checks,
    loading,
    platform,
    pretrained,
    progress,
    ranges,
    watchdog,
)
from megatron_cream.checkpoint import save_flags
from megatron_cream.data.dataset import LongDocumentDatasetConfig
from megatron_cream.errors import UsageError, one_line
from megatron_cream.evaluation import long_flags
from megatron_cream.model import kernels
from megatron_cream.model.attention import ATTENTION_BACKENDS, AttentionBackend, choose_backend
from megatron_cream.model.llama import LlamaModelConfig
from megatron_cream.model.rotary import rope_scaling_dict
from megatron_cream.recipe import find_action, read_recipe, recipe_path


@dataclass
class CreamConfig:
    """What this project adds to Megatron's flags."""

    config: str | None = None
    """A YAML recipe: any flag by its name (dashes or underscores). The command line wins."""

    print_config: bool = False
    """Print what would run, as a recipe, and exit."""

    position_sampler: Literal["cream", "pose", "randpos", "pi", "full"] = "cream"
    """How position ids are drawn. cream: Wu et al. 2024; pose: Zhu et al. 2023; randpos: N sorted random
    positions; pi: 0 .. N-1 (position interpolation); full: 0 .. L-1 at the target length."""

    target_length: int | None = None
    """L, the window to extend to, in tokens: a multiple of --seq-length. Default: --seq-length."""

    cream_sigma: float | None = None
    """Deviation of the truncated Gaussian that draws the middle's scale. Default: 3.0."""

    cream_variant: str | None = None
    """paper: as published; released: as in the code its authors released. Default: paper."""

    cream_relativity: float | None = None
    """Share of the samples whose head and tail are N/3 tokens, 0 to 1; the others have a long middle. Default: 0.5."""

    mask_segment_starts: bool = False
    """No loss on the first token of the middle and tail blocks, where the text jumps."""

    rope_scaling_type: Literal["none", "linear", "ntk", "yarn", "llama3"] | None = None
    """How the rotary embedding is scaled for --target-length; --rope-scaling-factor defaults to L / N.
    Default: as the model was that training starts from, else none."""

    original_max_position_embeddings: int | None = None
    """The pre-trained window that yarn and llama3 scale from. Default: --seq-length."""

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

    deterministic: bool = False
    """On a GPU: the same flags on the same GPUs give the same bits. Slower."""

    console: Literal["full", "progress"] = "full"
    """full: Megatron's log and ours on the terminal; progress: ours only, Megatron's to megatron.log in --save."""


def project_defaults() -> dict[str, Any]:
    """A Llama on Megatron, and switches whose Megatron default bites somebody new to it."""
    cuda = platform.has_cuda()
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
        # The other one is a package of its own, and nothing here is tested with it.
        async_strategy="mcore",
        tokenizer_type="SentencePieceTokenizer",
        split="969,30,1",
        log_interval=1,
        eval_interval=1000,
        eval_iters=10,
        lr_decay_style="linear",
    )


def parse(argv: list[str] | None = None) -> tuple[Namespace, str]:
    """Read, check and let Megatron validate the command line; set Megatron's global variables.

    Args:
        argv: the flags; None takes the process's own.

    Returns: the namespace, and what Megatron said meanwhile (its list of 800 arguments),
        to be printed where the run's log goes.

    Raises:
        UsageError: one clear line about what is wrong. Nothing was started or written.
        SystemExit: after --help or --print-config.
    """
    args = read(argv)
    if args.print_config:
        if args.rank == 0:
            print(describe(args))
        raise SystemExit(0)
    ranges.learning_rates(args)
    data_checks.splits(args)
    data_checks.held_out(args, held_out_files(args))
    compat.checkpoints_run_no_code()
    found = loading.open_checkpoint(args)
    args.attention_backend = AttnBackend[args.attention["te_kernel"]]
    args.deterministic_mode = args.deterministic_mode or args.deterministic
    # Megatron turns --async-save off without it.
    args.use_persistent_ckpt_worker = args.use_persistent_ckpt_worker or args.async_save
    if args.distributed_timeout_minutes is None:
        # A collective that times out says nothing of where the others stand: the watchdog goes first.
        patient = math.ceil(watchdog.PATIENCE * args.timeout_minutes) + 1
        args.distributed_timeout_minutes = patient if args.timeout_minutes else 10
    # Megatron multiplies this by TP; divided first, a checkpoint's vocabulary is the same at any TP.
    tp = args.tensor_model_parallel_size
    if args.make_vocab_size_divisible_by % tp == 0:
        args.make_vocab_size_divisible_by //= tp
    words = io.StringIO()
    with _refused_in_one_line(words, ""):
        if args.use_checkpoint_args:
            load_args_from_checkpoint(args)
        validate_args(args, {})
    with _refused_in_one_line(words, f"--tokenizer-type {args.tokenizer_type} {args.tokenizer_model or ''}: "):
        tokenizer = rebuild_tokenizer(args)
    # Saved with the checkpoint: what of its padded vocabulary is real.
    args.vocab_size = args.vocab_size or tokenizer.vocab_size
    with _refused_in_one_line(words, ""):  # has checks of its own
        pretrain_cfg_container_from_args(args, model_config(args))
    data_checks.token_ids(args)
    loading.check_model(args, found)
    loading.agree(lambda: _check_on_rank(args), args.rank, args.world_size)
    loading.check_content(args, found)
    with console.captured(words):  # last, as it opens log files
        set_global_variables(args, build_tokenizer=False)
    return args, words.getvalue()


def _check_on_rank(args: Namespace) -> None:
    save_flags.check_on_rank(args)
    data_checks.whole(args, (args.rank, args.world_size))


@contextlib.contextmanager
def _refused_in_one_line(words: io.StringIO, beginning: str) -> Iterator[None]:
    """What Megatron's code says inside goes to `words`; how it refuses a setting, by any kind of error, to the user."""
    try:
        with console.captured(words):
            yield
    except UsageError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        refused = traceback.extract_tb(error.__traceback__)[-1].line  # an assertion without words
        raise UsageError(beginning + (one_line(error) or f"Megatron refused these flags: {refused}")) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{beginning}Megatron refused it: {type(error).__name__}: {one_line(error)}") from error


def read(argv: list[str] | None = None) -> Namespace:
    """The flags, parsed, filled in and checked by us, before Megatron has seen them.

    Raises:
        UsageError: as `parse`.
    """
    args = _parse_flags(argv)
    checks.unsupported(args)
    args.position_embedding_type = "none"  # Megatron's own rotary embedding stays out of the way
    if args.embedded_data:
        _use_embedded_data(args)
    defaults = vars(build_parser(recipe=False).parse_args([]))
    ranges.check(args, defaults)
    loading.own_folder(args)
    pretrained.adopt(args, defaults)
    _resolve(args)
    try:
        rope_scaling = rope_scaling_options(args)
    except ValueError as error:
        raise UsageError(f"--rope-scaling-type {args.rope_scaling_type}: {error}") from error
    checks.check(args, sampler_options(args), rope_scaling)
    pretrained.check_ends(args)
    loading.source(args)
    args.rope_scaling_config = rope_scaling
    args.transformer_impl = "transformer_engine" if args.attention["transformer_engine"] else "local"
    return args


# ------------------------------------------------------------------- flags


def _parse_flags(argv: list[str] | None) -> Namespace:
    saved, sys.argv = sys.argv, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    try:
        args = parse_args(_add_arguments)
    finally:
        sys.argv = saved
    if args.recompute_granularity == "none":
        args.recompute_granularity = args.recompute_method = args.recompute_num_layers = None
    return args


def build_parser(recipe: bool = True) -> argparse.ArgumentParser:
    """Megatron's parser with our flags and defaults, as `parse` uses it; `recipe`: and those of --config."""
    return _add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), recipe)


def _add_arguments(parser: argparse.ArgumentParser, recipe: bool = True) -> argparse.ArgumentParser:
    def one_line(message: str):
        raise UsageError(message)

    parser.error = one_line  # not Megatron's 800 flags first
    ArgumentGroupFactory(CreamConfig).build_group(parser, "cream")
    ArgumentGroupFactory(long_flags.LongEvalConfig).build_group(parser, "long evaluation")
    ArgumentGroupFactory(save_flags.SaveConfig).build_group(parser, "after a checkpoint")
    # One flag for attention: Megatron's names (all of them Transformer Engine's) and ours.
    attention = find_action(parser, "attention_backend")
    attention.type, attention.choices = str, ATTENTION_BACKENDS
    # So that the command line can undo a recipe's, and this project's default.
    parser.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable", dest="dist_ckpt_optim_fully_reshardable", action="store_false",
        help="Save the distributed optimizer as it lies on the ranks: faster, in no host memory, and it resumes at "
        "the same tensor and pipeline parallelism alone.",
    )  # fmt: skip
    find_action(parser, "recompute_granularity").choices = ("full", "selective", "none")
    find_action(parser, "rotary_base").type = float  # an exported ntk scaling is no whole number
    parser.set_defaults(**project_defaults())
    for action in parser._actions:
        _mend_help(action)
        if action.type not in (None, str, int, float):
            action.type = functools.partial(_converted, action.type)
    path = recipe_path(sys.argv[1:]) if recipe else None
    if path is not None:
        parser.set_defaults(**read_recipe(path, parser))
    return parser


def _converted(convert: Callable[[str], Any], text: str) -> Any:
    """Some of Megatron's types raise what argparse does not expect of one."""
    try:
        return convert(text)
    except (LookupError, TypeError, AssertionError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}") from error


def _mend_help(action: argparse.Action) -> None:
    """Some of Megatron's help texts hold a bare %, on which argparse stops."""
    try:
        (action.help or "") % vars(action)
    except (ValueError, TypeError, KeyError):
        action.help = action.help.replace("%", "%%")


# ------------------------------------------------------------------- filling in


def _use_embedded_data(args: Namespace) -> None:
    from megatron_cream.data import embedded

    for name in ("data_path", "train_data_path", "valid_data_path", "tokenizer_model"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} with --embedded-data: give one of the two")
    corpus = embedded.prepare()
    args.tokenizer_type, args.tokenizer_model = "SentencePieceTokenizer", str(corpus.tokenizer_model)
    args.train_data_path, args.valid_data_path = [str(corpus.train_prefix)], [str(corpus.valid_prefix)]


def _resolve(args: Namespace) -> None:
    """Fill in what follows from other values and from what is installed."""
    checks.require(args)
    cuda = platform.has_cuda()
    if args.print_config and "WORLD_SIZE" not in os.environ:
        # Planned without a launcher: the fewest ranks that the layout needs.
        sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
        args.world_size = math.prod(sizes)
    if args.fp16 or args.fp32:
        args.bf16 = False
    if args.skip_train and args.train_iters is None and args.train_samples is None:
        args.train_iters = 1  # Megatron sizes its data sets by it; no step is made
    if (args.train_data_path or args.per_split_data_args_path) and not args.data_args_path:
        args.split = None
    args.target_length = args.target_length or args.seq_length
    if args.position_sampler == "cream":
        args.cream_sigma = 3.0 if args.cream_sigma is None else args.cream_sigma
        args.cream_variant = args.cream_variant or "paper"
        args.cream_relativity = 0.5 if args.cream_relativity is None else args.cream_relativity
    if args.rope_scaling_type is None and args.model_rope_scaling is None:
        args.rope_scaling_type = "none"
    if args.rope_scaling_type not in (None, "none") and args.rope_scaling_factor is None:
        window = args.original_max_position_embeddings or args.seq_length
        args.rope_scaling_factor = args.target_length / window
    args.max_position_embeddings = max(
        args.max_position_embeddings or 0, args.target_length, *(args.eval_lengths or [0])
    )
    long_flags.fill(args)
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    try:
        backend = choose_backend(
            args.attention_backend,
            has_cuda=cuda,
            half=args.bf16 or args.fp16,
            deterministic=args.deterministic or args.deterministic_mode,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    args.attention = asdict(backend)  # plain, as it is saved with every checkpoint
    args.check_for_nan_in_loss_and_grad = args.nan_policy == "rerun"
    if args.nan_policy == "rerun" and args.rerun_mode == "disabled":
        args.rerun_mode = "validate_results"
    if not cuda:
        args.gradient_accumulation_fusion = False
    elif kernels.INSTALLED:
        # Megatron's name for "the MLP's activation is a module of the layer spec's".
        args.use_te_activation_func, args.bias_swiglu_fusion = True, False


# ------------------------------------------------------------------- leaving as plain values


def one_pass_optimizer(args: Namespace) -> bool:
    """Whether the optimizer's step can be that of `optimizer.one_pass`: AdamW in float32 on a GPU."""
    other = (
        "use_precision_aware_optimizer",
        "optimizer_cpu_offload",
        "optimizer_cuda_graph",
        "use_megatron_fsdp",
        "use_torch_fsdp2",
    )
    plain = args.optimizer == "adam" and not any(getattr(args, name, False) for name in other)
    return platform.has_cuda() and kernels.INSTALLED and plain


def sampler_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of `build_sampler`, but for the seed."""
    options = dict(name=args.position_sampler, window=args.seq_length, target=args.target_length)
    if args.position_sampler == "cream":
        options |= dict(sigma=args.cream_sigma, variant=args.cream_variant, relativity=args.cream_relativity)
    return options


def rope_scaling_options(args: Namespace) -> dict[str, Any] | None:
    """The `rope_scaling` dict of a Hugging Face config.json, or None."""
    if args.rope_scaling_type is None:
        return args.model_rope_scaling
    if args.rope_scaling_type == "none" or args.rope_scaling_factor == 1.0:
        return None
    return rope_scaling_dict(
        args.rope_scaling_type,
        args.rope_scaling_factor,
        args.original_max_position_embeddings or args.seq_length,
    )


def model_config(args: Namespace) -> LlamaModelConfig:
    """What the model builder needs."""
    load = pretrained.weights_hook(args)
    options = vars(gpt_config_from_args(args)) | {"pre_wrap_hooks": [*([load] if load else []), watchdog.listen]}
    return LlamaModelConfig(
        **options,
        rope_scaling_config=args.rope_scaling_config,
        rope_max_positions=args.max_position_embeddings,
        attention=AttentionBackend(**args.attention),
        real_vocab_size=args.vocab_size,
    )


def dataset_config(args: Namespace, tokenizer) -> LongDocumentDatasetConfig:
    """What Megatron's dataset builder and our transform need."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return LongDocumentDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        sampler=sampler_options(args),
        mask_segment_starts=args.mask_segment_starts,
        eod_token=tokenizer.eod if args.eod_mask_loss else None,
        vocab_size=args.vocab_size,
    )


def flops_per_token(args: Namespace) -> float:
    return progress.flops_per_token(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        num_attention_heads=args.num_attention_heads,
        vocab_size=args.padded_vocab_size,
        seq_length=args.seq_length,
    )


def held_out_files(args: Namespace) -> list[tuple[str, tuple[float, float]]]:
    """Prefixes of the validation data, each with the share of its documents that validation has."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend_per_split is not None:
        return [(prefix, (0.0, 1.0)) for prefix in (blend_per_split[1] or ([],))[0]]
    share = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))[1]
    return [(prefix, share) for prefix in blend[0]] if share else []


def describe(args: Namespace) -> str:
    """What will run: a few lines for a reader, then every value that is not a default, as a recipe.

    What follows from the machine (backend, fusions) is left out, so that a recipe printed on a
    laptop is right on a cluster.
    """
    defaults = vars(build_parser(recipe=False).parse_args([]))
    derived = {"config", "print_config", "transformer_impl", "kv_channels", "gradient_accumulation_fusion"}
    if args.embedded_data:
        derived |= {"train_data_path", "valid_data_path", "tokenizer_model"}
    known = defaults.keys() - derived
    recipe = {name: value for name, value in vars(args).items() if name in known and value != defaults[name]}
    data_parallel = args.world_size // (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    batch = args.global_batch_size or args.micro_batch_size * data_parallel
    head = [
        f"attention: {AttentionBackend(**args.attention)}",
        f"positions: {sampler_options(args)}",
        f"rope: theta {args.rotary_base}, scaling {rope_scaling_options(args)}",
        f"parallel: {args.world_size} ranks, TP {args.tensor_model_parallel_size}, "
        f"PP {args.pipeline_model_parallel_size}, CP {args.context_parallel_size}, DP {data_parallel}",
        f"batch: {batch} samples of {args.seq_length} tokens, {batch * args.seq_length:,} a step",
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(recipe, sort_keys=True, default_flow_style=None)
