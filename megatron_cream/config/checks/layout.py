"""Checks that the model divides over the ranks, and that its layers support the flags."""

from argparse import Namespace

from megatron_cream.common import devices
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.model import user_buffers


def check(args: Namespace) -> None:
    """Raise UsageError if the model's shape or the parallel layout cannot run, after `fill`."""
    _check_shapes(args)
    _check_parallel(args)


def _check_shapes(args: Namespace) -> None:
    hidden, heads, groups = args.hidden_size, args.num_attention_heads, args.num_query_groups
    if hidden % heads:
        raise UsageError(f"--num-attention-heads {heads}: must divide --hidden-size {hidden}")
    if args.group_query_attention:
        if not groups or heads % groups:
            raise UsageError(f"--num-query-groups {groups}: must divide --num-attention-heads {heads}")
    elif groups not in (None, 1, heads):
        raise UsageError(f"--num-query-groups {groups}: add --group-query-attention")
    tp = args.tensor_model_parallel_size
    if heads % tp:
        raise UsageError(f"--tensor-model-parallel-size {tp}: must divide --num-attention-heads {heads}")
    if args.group_query_attention and groups % tp and tp % groups:
        raise UsageError(
            f"--tensor-model-parallel-size {tp}: must divide --num-query-groups {groups}, or be a multiple"
        )
    if args.ffn_hidden_size and args.ffn_hidden_size % tp:
        raise UsageError(f"--tensor-model-parallel-size {tp}: must divide --ffn-hidden-size {args.ffn_hidden_size}")


def _check_parallel(args: Namespace) -> None:
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    if args.world_size % (tp * pp * cp):
        raise UsageError(
            f"{args.world_size} ranks: must be a multiple of --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = {tp * pp * cp}"
        )
    uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
    counted = args.num_layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    if counted % pp and not uneven and not args.pipeline_model_parallel_layout:
        raise UsageError(f"--pipeline-model-parallel-size {pp}: must divide --num-layers {args.num_layers}")
    lengths = [("--seq-length", args.seq_length)]
    for name in ("eval_lengths", "long_eval_lengths"):
        lengths += [(to_flag(name), length) for length in getattr(args, name) or []]
    for name, length in lengths:
        if cp > 1 and length % (2 * cp):
            raise UsageError(f"{name} {length}: must be a multiple of 2 x --context-parallel-size {cp}")
        if args.sequence_parallel and length % (tp * cp):
            raise UsageError(
                f"{name} {length}: must be a multiple of --tensor-model-parallel-size {tp} x --context-parallel-size "
                f"{cp} with --sequence-parallel"
            )
    data_parallel = args.world_size // (tp * pp * cp)
    samples = args.micro_batch_size * data_parallel
    if args.global_batch_size is not None and args.global_batch_size % samples:
        raise UsageError(
            f"--global-batch-size {args.global_batch_size}: must be a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x {data_parallel} data-parallel ranks = {samples}"
        )
    if _is_interleaved(args):
        _check_interleaved(args, samples)
    if args.full_validation and not args.multiple_validation_sets:
        raise UsageError("--full-validation: works in megatron-core 0.19 only with --multiple-validation-sets")
    selective = args.recompute_granularity == "selective"
    if selective and "layernorm" in (args.recompute_modules or []) and not args.attention["transformer_engine"]:
        raise UsageError(
            "--recompute-modules layernorm: works in megatron-core 0.19 only with Transformer Engine's layers"
        )
    if args.attention_dropout and args.attention["name"] in ("sdpa", "flash"):
        raise UsageError(
            f"--attention-dropout {args.attention_dropout}: not with --attention-backend "
            f"{args.attention['name']}; use 0"
        )
    if args.attention["name"] == "local" and cp > 1:
        raise UsageError(f"--context-parallel-size {cp}: not with --attention-backend local; use auto")
    if not args.attention["transformer_engine"] and not args.print_config:
        _check_transformer_engine_flags(args)
    if args.tp_comm_overlap:
        _check_user_buffers(args)


def _check_interleaved(args: Namespace, samples: int) -> None:
    """Raise UsageError if interleaved stages cannot run.

    samples: of the micro-batches of all data-parallel ranks.
    """
    if (batch := args.global_batch_size) is not None:
        group = args.microbatch_group_size_per_vp_stage
        if why := find_interleaving_conflict(args.pipeline_model_parallel_size, batch, batch // samples, group):
            raise UsageError(why)
    for name in ("multiple_validation_sets", "iterations_to_skip"):  # they need one data iterator, not a list
        if getattr(args, name):
            raise UsageError(f"{to_flag(name)}: not with virtual pipeline stages in megatron-core 0.19; leave one out")


def _is_interleaved(args: Namespace) -> bool:
    pp, chunk = args.pipeline_model_parallel_size, args.num_layers_per_virtual_pipeline_stage
    if args.pipeline_model_parallel_layout:
        return _count_stages(args.pipeline_model_parallel_layout) > pp > 1
    virtual = args.num_virtual_stages_per_pipeline_rank or (args.num_layers // (pp * chunk) if chunk else 1)
    return pp > 1 and virtual > 1


def _count_stages(layout: str) -> int:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        return PipelineParallelLayerLayout.get_num_stages_from_str(layout)
    except AssertionError as error:
        raise UsageError(f"--pipeline-model-parallel-layout {layout}: {error}") from error


def find_interleaving_conflict(pipeline: int, global_batch: int, micro_batches: int, group: int | None) -> str | None:
    """Return why Megatron rejects the micro-batches of interleaved pipeline stages, beginning with the flag, or None.

    A stage executes them in groups, and the last group may not be smaller than the number of stages.

    Args:
        pipeline: number of stages.
        global_batch: samples of a step.
        micro_batches: of a step, for each data-parallel rank.
        group: micro-batches of a group; None is as many as stages.
    """
    flag = to_flag("microbatch_group_size_per_vp_stage")
    if group is not None and not pipeline <= group <= micro_batches:
        return (
            f"{flag} {group}: must be from --pipeline-model-parallel-size {pipeline} to the {micro_batches} "
            "micro-batches of a step"
        )
    last = micro_batches % (group or pipeline)
    if last == 0 or (group and last >= pipeline):
        return None
    if group is None:
        return (
            f"--global-batch-size {global_batch}: its {micro_batches} micro-batches must be a multiple of "
            f"--pipeline-model-parallel-size {pipeline} with virtual stages"
        )
    return (
        f"{flag} {group}: leaves {last} of the {micro_batches} micro-batches of a step for the last group, fewer than "
        f"--pipeline-model-parallel-size {pipeline}; a divisor of {micro_batches} leaves none"
    )


def _check_transformer_engine_flags(args: Namespace) -> None:
    """Raise UsageError for flags that only Transformer Engine's layers read.

    Other layers would ignore them, and train in another precision or memory than the user asked for.
    """
    flags = {"fp8": "--fp8-format", "fp4": "--fp4-format"}
    also = "cpu_offloading_num_layers hierarchical_context_parallel_sizes te_precision_config_file fp8_param_gather "
    also += "fused_residual_rmsnorm use_transformer_engine_op_fuser use_grouped_gemm_for_dense_mlp delay_wgrad_compute "
    also += "fine_grained_activation_offloading use_te_activation_func symmetric_ar_type log_max_attention_logit"
    for name, flag in (flags | {name: to_flag(name) for name in also.split()}).items():
        if (value := getattr(args, name)) and not (name == "use_te_activation_func" and devices.has_cuda()):
            hint = "; use --recompute-granularity" if name == "fine_grained_activation_offloading" else ""
            raise UsageError(f"{flag} {value}: needs Transformer Engine's layers, which this run does not have{hint}")


def _check_user_buffers(args: Namespace) -> None:
    """Raise UsageError if the run cannot use --tp-comm-overlap.

    Transformer Engine's user buffers overlap transfers with matrix products. Their size is fixed to one micro-batch of
    --seq-length tokens.
    """
    if not args.sequence_parallel or args.tensor_model_parallel_size == 1:
        raise UsageError("--tp-comm-overlap: needs --tensor-model-parallel-size 2 or more and --sequence-parallel")
    if not args.attention["transformer_engine"]:
        raise UsageError(
            "--tp-comm-overlap: needs Transformer Engine's layers, which this run does not have; leave it out"
        )
    for name in ("eval_lengths", "long_eval_interval"):
        if value := getattr(args, name):
            raise UsageError(
                f"{to_flag(name)} {value}: not with --tp-comm-overlap, whose buffers fit samples of --seq-length "
                f"{args.seq_length} tokens; leave one of them out (tools/evaluate.py evaluates at any length)"
            )
    if args.tp_comm_overlap_cfg is not None:
        user_buffers.check_config(args.tp_comm_overlap_cfg)
