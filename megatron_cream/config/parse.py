"""What a user set, filled in and checked, and leaving as plain values.

Megatron's namespace for Megatron, small dataclasses and dicts for the rest of the package.
"""

import io
import json
import math
import os
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch
import yaml
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import rebuild_tokenizer, set_global_variables
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_cream.checkpoint import pretrained, start
from megatron_cream.checkpoint.families import ModelShape
from megatron_cream.common import console, devices
from megatron_cream.common.errors import UsageError, reason, refused_in_one_line
from megatron_cream.config import samplers
from megatron_cream.config.checks import data as data_checks
from megatron_cream.config.checks import evaluation as evaluation_checks
from megatron_cream.config.checks import flags as flag_checks
from megatron_cream.config.checks import numbers as number_checks
from megatron_cream.config.checks import saving as save_checks
from megatron_cream.config.parser import build_parser, parse_flags
from megatron_cream.config.samplers import sampler_options
from megatron_cream.data.dataset import LongDocumentDatasetConfig
from megatron_cream.distributed import nodes, rendezvous, watchdog
from megatron_cream.model import flops, kernels, user_buffers
from megatron_cream.model.attention import AttentionBackend, alternatives, choose_backend
from megatron_cream.model.llama import LlamaModelConfig
from megatron_cream.model.rope_choice import Rope, RopeFlags, choose_rope, contradicts
from megatron_cream.optimizer import finite
from megatron_cream.patches import compat


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
    args, found, words, auto = nodes.run_on_all_ranks(lambda: _look(argv))
    rendezvous.agree(lambda: _check_on_rank(args), args.rank, args.world_size)
    start.check_content(args, found)
    nodes.check_shared(args)
    if args.rank == 0:
        for line in [*args.rope_lines, *filter(None, [start.resume_warning(args, found)])]:
            print(line, file=sys.stderr, flush=True)
    if auto and devices.has_cuda() and not (args.deterministic_mode or args.skip_train):
        _take_fastest_attention(args)
    compat.tensorboard_outlives_a_full_disk()
    try:
        with console.captured(words):
            set_global_variables(args, build_tokenizer=False)  # last, as it opens log files
    except OSError as error:
        if not args.tensorboard_dir:
            raise
        raise UsageError(f"--tensorboard-dir {args.tensorboard_dir}: {reason(error)}") from error
    return args, words.getvalue()


def _look(argv: list[str] | None) -> tuple[Namespace, start.Found | None, io.StringIO, bool]:
    """All of `parse` that one rank can find out by itself; last, whether attention is to be measured."""
    args = read(argv)
    if args.print_config:
        if args.rank == 0:
            print(describe(args))
        raise SystemExit(0)
    flag_checks.graphs_beside_growing_segments(args)
    _use_expandable_segments(args)
    data_checks.splits(args)
    data_checks.held_out(args, held_out_files(args))
    compat.checkpoints_run_no_code()
    found = start.open_checkpoint(args)
    start.adopt_schedule(args, found)
    number_checks.learning_rates(args)
    auto = args.attention_backend == "auto"
    args.attention_backend = AttnBackend[args.attention["te_kernel"]]
    args.deterministic_mode = args.deterministic_mode or args.deterministic
    shared = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    args.overlap_grad_reduce, args.overlap_param_gather = overlaps(args, shared, devices.has_cuda())
    user_buffers.fill(args)
    args.use_persistent_ckpt_worker = args.use_persistent_ckpt_worker or args.async_save  # else Megatron turns this off
    if args.distributed_timeout_minutes is None:
        # A collective that times out says nothing of where the others stand: the watchdog goes first.
        patient = math.ceil(watchdog.PATIENCE * args.timeout_minutes) + 1
        args.distributed_timeout_minutes = patient if args.timeout_minutes else 10
    # Megatron multiplies this by TP; divided first, a checkpoint's vocabulary is the same at any TP.
    tp = args.tensor_model_parallel_size
    if args.make_vocab_size_divisible_by % tp == 0:
        args.make_vocab_size_divisible_by //= tp
    words = io.StringIO()
    with refused_in_one_line(""), console.captured(words):
        if args.use_checkpoint_args:
            theta = args.rotary_base  # chosen with the checkpoint's in view, which Megatron puts back
            load_args_from_checkpoint(args)
            args.rotary_base = theta
        validate_args(args, {})
    named = f"--tokenizer-type {args.tokenizer_type} {args.tokenizer_model or ''}: "
    with refused_in_one_line(named), console.captured(words):
        tokenizer = rebuild_tokenizer(args)
    data_checks.tokenizer(args, tokenizer)
    args.vocab_size = args.vocab_size or tokenizer.vocab_size  # saved: what of the padded vocabulary is real
    with refused_in_one_line(""), console.captured(words):  # has checks of its own
        pretrain_cfg_container_from_args(args, model_config(args))
    data_checks.token_ids(args)
    start.check_model(args, found)
    return args, found, words, auto


def _use_expandable_segments(args: Namespace) -> None:
    """torch's memory in segments that grow, as all of this project's figures have it, so that what was measured to fit
    does. Read at the first allocation. Megatron refuses it beside CUDA graphs and NCCL's own buffers."""
    alone = args.cuda_graph_impl == "none" and not args.nccl_ub
    if alone and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _take_fastest_attention(args: Namespace) -> None:
    """Measured by every rank at once, as kernels are compiled by it; decided by rank 0."""
    from megatron_cream.model import attention_speed

    first = AttentionBackend(**args.attention)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    shape = attention_speed.Shape(
        tokens=args.seq_length // args.context_parallel_size,
        samples=args.micro_batch_size,
        heads=args.num_attention_heads // args.tensor_model_parallel_size,
        groups=max(groups // args.tensor_model_parallel_size, 1),
        head_dim=args.kv_channels,
        dtype=args.params_dtype,
    )
    with torch.cuda.device(args.local_rank):
        chosen = attention_speed.fastest(alternatives(first, half=args.bf16 or args.fp16), shape)
    args.attention = json.loads(rendezvous.from_rank_0(json.dumps(asdict(chosen)), args.rank, args.world_size))
    args.attention_backend = AttnBackend[args.attention["te_kernel"]]


def _check_on_rank(args: Namespace) -> None:
    flag_checks.gpu_of_rank(args.local_rank)
    save_checks.check_on_rank(args)
    data_checks.whole(args, (args.rank, args.world_size))


def read(argv: list[str] | None = None) -> Namespace:
    """The flags, parsed, filled in and checked by us, before Megatron has seen them.

    Raises:
        UsageError: as `parse`.
    """
    args = parse_flags(argv)
    flag_checks.paths(args)
    flag_checks.unsupported(args)
    args.position_embedding_type = "none"  # Megatron's own rotary embedding stays out of the way
    if args.embedded_data:
        _use_embedded_data(args)
    defaults = vars(build_parser(recipe=False).parse_args([]))
    number_checks.check(args, defaults)
    start.check_save_folder(args)
    shape = pretrained.adopt(args, defaults)
    _resolve(args)
    _choose_rope(args, shape, defaults)
    flag_checks.check(args, sampler_options(args), args.rope_scaling_config)
    save_checks.hide_hook(args)
    pretrained.check_ends(args)
    flag_checks.weights(args, from_checkpoint=start.source(args) is not None)
    args.transformer_impl = "transformer_engine" if args.attention["transformer_engine"] else "local"
    return args


# ------------------------------------------------------------------- filling in


def _use_embedded_data(args: Namespace) -> None:
    from megatron_cream.data import embedded

    for name in ("data_path", "train_data_path", "valid_data_path", "tokenizer_model"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} with --embedded-data: give one of the two")
    corpus = embedded.prepare()
    args.tokenizer_type, args.tokenizer_model = "SentencePieceTokenizer", str(corpus.tokenizer_model)
    args.train_data_path, args.valid_data_path = [str(corpus.train_prefix)], [str(corpus.valid_prefix)]


def _choose_rope(args: Namespace, shape: ModelShape | None, defaults: dict[str, Any]) -> None:
    """Set the run's rotary embedding, from the flags and the model that it starts from, or came from (`shape`)."""
    default_theta = float(defaults["rotary_base"])
    flags = RopeFlags(
        target=args.target_length,
        window=args.seq_length,
        type=args.rope_scaling_type,
        factor=args.rope_scaling_factor,
        original=args.original_max_position_embeddings,
        theta=None if args.rotary_base == default_theta else float(args.rotary_base),
    )
    found = start.open_checkpoint(args)
    saved = start.saved_rope(found)
    if saved and start.resumes(args, found) and not contradicts(flags, saved):
        rope = Rope(theta=saved.theta, scaling=saved.scaling, original=saved.original)
    else:
        model = saved if saved and not start.resumes(args, found) else shape and shape.rope()
        try:
            rope = choose_rope(flags, model, head_dim=args.kv_channels, default_theta=default_theta)
        except ValueError as error:
            raise UsageError(f"--rope-scaling-type {args.rope_scaling_type}: {error}") from error
    args.rotary_base, args.rope_scaling_config, args.rope_window = rope.theta, rope.scaling, rope.original
    args.rope_lines = list(rope.lines)


def _resolve(args: Namespace) -> None:
    """Fill in what follows from other values and from what is installed."""
    flag_checks.require(args)
    cuda = devices.has_cuda()
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
    samplers.fill(args)
    args.max_position_embeddings = max(
        args.max_position_embeddings or 0, args.target_length, *(args.eval_lengths or [0])
    )
    evaluation_checks.fill(args)
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
    if not args.hidden_dropout:
        # What Megatron compiles there is then the sum with the residual: one kernel also without a compiler, whose
        # code takes the host much longer to enter.
        args.bias_dropout_fusion = False
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
    return devices.has_cuda() and kernels.INSTALLED and plain


def overlaps(args: Namespace, ranks: int, cuda: bool) -> tuple[bool, bool]:
    """Whether gradients are reduced beside the backward pass, and weights gathered beside the forward pass.

    What a flag or recipe says; else both, where a distributed optimizer's shards are on several GPUs.

    Args:
        ranks: that share the weights: data-parallel times context-parallel.
    """
    sharded = args.use_distributed_optimizer and not (args.use_megatron_fsdp or args.use_torch_fsdp2)
    default = cuda and ranks > 1 and sharded and not args.skip_train
    reduce, gather = args.overlap_grad_reduce, args.overlap_param_gather
    reduce = default if reduce is None else reduce
    return reduce, default and reduce if gather is None else gather


def model_config(args: Namespace) -> LlamaModelConfig:
    """What the model builder needs."""
    load = pretrained.weights_hook(args)
    hooks = [*([load] if load else []), watchdog.listen, finite.of_model]
    options = vars(gpt_config_from_args(args)) | {"pre_wrap_hooks": hooks}
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
    return flops.flops_per_token(
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
    derived = {"config", "print_config", "transformer_impl", "kv_channels", "save_hook"}
    derived |= {"gradient_accumulation_fusion", "bias_dropout_fusion"}
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
        f"rope: theta {args.rotary_base}, scaling {args.rope_scaling_config}",
        *args.rope_lines,
        f"parallel: {args.world_size} ranks, TP {args.tensor_model_parallel_size}, "
        f"PP {args.pipeline_model_parallel_size}, CP {args.context_parallel_size}, DP {data_parallel}",
        f"batch: {batch} samples of {args.seq_length} tokens, {batch * args.seq_length:,} a step",
        *(["save_hook: left out, as its words may hold secrets"] if args.save_hook else []),
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(recipe, sort_keys=True, default_flow_style=None)
