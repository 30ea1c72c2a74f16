"""The choice of CUDA graphs for a run whose flags do not say whether it has them."""

from argparse import Namespace
from dataclasses import replace

from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError
from megatron_cream.config.checks.flags import expandable_segments_variable
from megatron_cream.planning import memory, step_time
from megatron_cream.planning.own_run import OwnRun, find_own_run

LEAST_GAIN = 0.05
"""Share of the step that graphs must save by plan. Predictions of small models are within 4 %."""
MOST_MEMORY = 0.9
"""Share of the GPU's memory that the planned peak may take. Graphs rule out expandable segments, so more pieces stay
unused than the planner counts."""

OFF_WITH = (
    # Rejected together with graphs, by this project or by Megatron.
    "lora_rank", "short_share", "cpu_offloading_num_layers", "fine_grained_activation_offloading",
    # Not tested together with graphs.
    "fp16", "fp32", "fp8", "fp4", "recompute_granularity", "recompute_activations", "hidden_dropout",
    "attention_dropout", "tp_comm_overlap", "nccl_ub", "optimizer_cpu_offload", "optimizer_cuda_graph",
    "cuda_graph_modules", "use_megatron_fsdp", "use_torch_fsdp2", "delay_wgrad_compute",
    "defer_embedding_wgrad_compute", "use_transformer_engine_op_fuser", "symmetric_ar_type", "rampup_batch_size",
    "step_batch_size_schedule",
    "log_max_attention_logit", "batch_invariant_mode", "deterministic", "deterministic_mode",
    # Nothing to gain, or the graphs would hide what the flag shows.
    "skip_train", "profile", "record_memory_history",
)  # fmt: skip
"""Flags that, if set, leave a run without graphs unless it asks for them."""


def choose_graphs(argv: list[str], args: Namespace) -> str | None:
    """Return why the run should use CUDA graphs, for its summary; None if it should not.

    The GPU is only asked for its name, so that the environment can still configure torch's allocator.

    Args:
        argv: the run's flags.
        args: the same flags after all checks, with --cuda-graph-impl none.
    """
    if not can_use_graphs(args) or (name := devices.read_gpu_name()) is None:
        return None
    own = find_own_run(argv, args, name)
    return None if own is None else compare_graphs(own)


def can_use_graphs(args: Namespace) -> bool:
    """Return whether this kind of run was tested with graphs.

    tests/training/test_gpu.py has such runs: flash-attn in Transformer Engine's layers, on one GPU, with the
    distributed optimizer on several, and with tensor and sequence parallelism. `args.cuda_graph_impl` is not looked at.
    """
    tensor = args.tensor_model_parallel_size
    return (
        devices.has_cuda()
        and args.bf16
        and args.attention["name"] == "flash"
        and args.attention["transformer_engine"]
        and args.pipeline_model_parallel_size == args.context_parallel_size == 1
        and (tensor == 1 or args.sequence_parallel)
        and (args.world_size == tensor or (tensor == 1 and args.use_distributed_optimizer))
        and args.rerun_mode == "disabled"
        and not any(getattr(args, name) for name in OFF_WITH)
        and expandable_segments_variable() is None
    )


def compare_graphs(own: OwnRun) -> str | None:
    """Return what graphs gain by plan, if it is enough and the memory suffices; else None."""
    engines = {graphs: replace(own.engine, graphs=graphs) for graphs in (False, True)}
    try:
        without, having = (step_time.predict(own.model, own.layout, each, own.cluster) for each in engines.values())
    except UsageError:
        return None
    # Graphs change only the time that the GPU waits for the host, so a gain means that the host is the limit.
    is_faster = having.time.step <= (1 - LEAST_GAIN) * without.time.step
    needed = memory.predict(own.model, own.layout, engines[True]).device
    if not is_faster or needed > MOST_MEMORY * own.cluster.gpu.memory:
        return None
    return (
        f"CUDA graphs, because the GPU would wait for the CPU: {having.tokens_per_second:,.0f} tokens/s/GPU by plan, "
        f"{without.tokens_per_second:,.0f} without; --cuda-graph-impl none turns them off"
    )
