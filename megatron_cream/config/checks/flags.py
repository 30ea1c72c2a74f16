"""Checks of single flags and of combinations, before a process group or a GPU is touched.

Each error is one line with the flag, its value, and a valid value.
"""

import importlib.util
import os
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_cream.checkpoint.families import ModelShape
from megatron_cream.common import devices
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import check_can_create, check_path
from megatron_cream.config import samplers
from megatron_cream.model.rotary import RotaryEmbedding
from megatron_cream.positions import build_sampler

_PATHS = (
    "save", "load", "pretrained_checkpoint", "load_hf", "save_hf", "load_adapter", "tensorboard_dir",
    "data_cache_path", "tokenizer_model", "vocab_file", "merge_file", "data_path", "train_data_path", "valid_data_path",
    "test_data_path", "short_data_path", "data_args_path", "per_split_data_args_path", "tp_comm_overlap_cfg",
    "wandb_save_dir",
)  # fmt: skip
_WHOLE_DATA = ("data_path", "data_args_path", "per_split_data_args_path")
"""Each names all of the long data."""

LONG_DATA = (*_WHOLE_DATA, "train_data_path", "valid_data_path", "test_data_path")
"""Each names some of the long data."""


def check_each(args: Namespace) -> None:
    """Raise UsageError for a flag that is wrong whatever the other flags are."""
    _check_paths(args)
    _check_supported(args)
    _check_embedded_data(args)
    _check_data(args)


def check_together(args: Namespace) -> None:
    """Raise UsageError for flags that contradict each other; call it after `fill`."""
    _check_positions(args, samplers.sampler_options(args))
    _check_rope(args)


def check_graphs_have_gpu(args: Namespace) -> None:
    """Raise UsageError for CUDA graphs in a run without a GPU; plans have them on any machine."""
    if args.cuda_graph_impl == "local" and not devices.has_cuda():
        raise UsageError("--cuda-graph-impl local: needs a GPU, and this machine has none; leave it out")


def check_graphs_with_segments(args: Namespace) -> None:
    """Raise UsageError for CUDA graphs with expandable segments.

    NCCL registers the memory that a graph sends from, unless NCCL_GRAPH_REGISTER is 0. With expandable segments that
    ends in illegal memory accesses.
    """
    name = expandable_segments_variable()
    if args.cuda_graph_impl != "none" and name and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
        raise UsageError(
            f"--cuda-graph-impl {args.cuda_graph_impl} with {name}={os.environ[name]} in the environment: NCCL "
            "cannot register memory in expandable segments; remove one of them, or set NCCL_GRAPH_REGISTER=0"
        )


def expandable_segments_variable() -> str | None:
    """Return the environment variable that turns expandable segments on; None if none does."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return next((name for name in names if "expandable_segments:true" in os.environ.get(name, "").lower()), None)


def check_kernel_in_environment(args: Namespace) -> None:
    """Raise UsageError if the environment selects another kernel of Transformer Engine than --attention-backend.

    Megatron sets these variables itself, and fails on other values while it builds the model.
    """
    for kernel in ("flash", "fused", "unfused"):
        name = f"NVTE_{kernel.upper()}_ATTN"
        needed = str(int(args.attention_backend.name in ("auto", kernel)))
        if os.environ.get(name, needed) != needed:
            raise UsageError(
                f"{name}={os.environ[name]} in the environment: the attention kernel of this run needs {needed}. Unset "
                "NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN; --attention-backend chooses the kernel"
            )


def check_gpu_of_rank(local_rank: int) -> None:
    """Raise UsageError if torchrun started more ranks here than there are visible GPUs."""
    if devices.has_cuda() and local_rank >= (gpus := torch.cuda.device_count()):
        raise UsageError(
            f"LOCAL_RANK={local_rank} in the environment: this machine has {gpus} visible GPUs; use torchrun "
            f"--nproc_per_node={gpus} or less"
        )


def _check_supported(args: Namespace) -> None:
    """Raise UsageError for values that this project does not support.

    flag_support.py rejects whole flags.
    """
    if args.async_save and args.async_strategy != "mcore":
        raise UsageError(f"--async-strategy {args.async_strategy}: not supported here; use mcore")
    if args.cuda_graph_impl not in (None, "none", "local"):
        # The others record a layer with Megatron's table of angles, or need a data loader that reuses one buffer.
        raise UsageError(
            f"--cuda-graph-impl {args.cuda_graph_impl}: cannot replay position ids that change with each sample; "
            "use local"
        )
    if args.cuda_graph_impl == "local" and args.recompute_granularity == "full":
        raise UsageError(
            "--recompute-granularity full: not with --cuda-graph-impl local, which records single layers; leave one of "
            "them out"
        )
    if args.log_straggler and not args.print_config and not (devices.has_cuda() and importlib.util.find_spec("pynvml")):
        raise UsageError(
            "--log-straggler: needs a GPU, and nvidia-ml-py to read its temperature and power; pip install nvidia-ml-py"
        )
    if args.rerun_mode == "report_stats":
        raise UsageError("--rerun-mode report_stats: does not work in megatron-core 0.19; use validate_results")
    if args.fp16 and args.fp32:
        raise UsageError("--fp16 with --fp32: give one of the two")
    if args.exit_signal in (signal.SIGKILL, signal.SIGSTOP):
        raise UsageError(f"--exit-signal {args.exit_signal.name}: a process cannot handle it; use SIGTERM")
    if args.dataloader_type == "external":
        raise UsageError("--dataloader-type external: not supported here; use single or cyclic")
    if args.train_iters and args.train_samples:
        raise UsageError(f"--train-samples {args.train_samples} with --train-iters: give one of the two")
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise UsageError(
            "--override-opt-param-scheduler with --use-checkpoint-opt-param-scheduler: give one of the two"
        )
    _check_optimizer(args)
    if args.position_embedding_type not in ("none", "rope"):
        raise UsageError(f"--position-embedding-type {args.position_embedding_type}: only rope is supported here")
    if not devices.has_cuda() and not args.print_config:
        _check_gpu_flags(args)


def _check_gpu_flags(args: Namespace) -> None:
    """Raise UsageError for flags on which Megatron crashes without a CUDA device."""
    if args.profile and not args.use_pytorch_profiler:
        raise UsageError("--profile: nsys needs a GPU, and this machine has none; add --use-pytorch-profiler")
    for name in ("record_memory_history", "gpu_sniff_test_interval"):
        if value := getattr(args, name):
            raise UsageError(f"{to_flag(name)} {value}: needs a GPU; leave it out")


def _check_optimizer(args: Namespace) -> None:
    if args.optimizer not in ("adam", "sgd") and importlib.util.find_spec("emerging_optimizers") is None:
        raise UsageError(f"--optimizer {args.optimizer}: needs the package emerging-optimizers; use adam")
    if args.use_distributed_optimizer and args.optimizer == "sgd":
        raise UsageError("--use-distributed-optimizer: not with --optimizer sgd; use adam")


def _check_paths(args: Namespace) -> None:
    """Raise UsageError for a path that no file can have, while its flag is still known."""
    for name in _PATHS:
        value = getattr(args, name)
        for path in value if isinstance(value, list) else [value]:
            if path is not None:
                check_path(path, to_flag(name))


def _check_embedded_data(args: Namespace) -> None:
    """Raise UsageError for data or a tokenizer given with --embedded-data."""
    for name in (*LONG_DATA, "tokenizer_model"):
        if args.embedded_data and getattr(args, name):
            raise UsageError(f"{to_flag(name)} with --embedded-data: give one of the two")


def _check_data(args: Namespace) -> None:
    """Raise UsageError for two flags that name the same data, of which Megatron would ignore one or fail."""
    given = [name for name in LONG_DATA if getattr(args, name)]
    if len(given) > 1 and given[0] in _WHOLE_DATA:
        raise UsageError(f"{to_flag(given[1])} with {to_flag(given[0])}: give one of the two")


def check_model_agrees(args: Namespace, shape: ModelShape, folder: Path, defaults: dict[str, Any]) -> None:
    """Raise UsageError for a flag that contradicts the model that the run starts from.

    Args:
        args: the parsed flags.
        shape: the model's shape.
        folder: the model's folder, for the message.
        defaults: default values of all flags; a flag that has its default may differ from the model.
    """
    for name, value in shape.megatron_args().items():
        given, is_unused = getattr(args, name), name == "num_query_groups" and not args.group_query_attention
        if name != "rotary_base" and not is_unused and given not in (defaults[name], value):
            raise UsageError(f"{to_flag(name)} {given}: the model in {folder} has {value}")


def check_weights(args: Namespace, from_checkpoint: bool) -> None:
    """Raise UsageError if weights are neither initialized nor loaded."""
    if not (args.perform_initialization or from_checkpoint or args.load_hf):
        raise UsageError(
            "--no-initialization: the run loads no weights; give --load-hf, --pretrained-checkpoint or --load"
        )


def check_required(args: Namespace) -> None:
    """Raise UsageError for a missing flag without default, or for a size below 1."""
    needed = {
        "num_layers": "the number of transformer layers, 32 for Llama-2-7B",
        "hidden_size": "the width of the model, 4096 for Llama-2-7B",
        "num_attention_heads": "the number of query heads, 32 for Llama-2-7B",
        "seq_length": "N, the window the model was pre-trained with, 4096 for Llama 2",
        "micro_batch_size": "the number of samples that a GPU processes at once, e.g. 1",
    }
    for name, meaning in needed.items():
        if getattr(args, name) is None:
            raise UsageError(f"{to_flag(name)} is missing: give {meaning}; or give no flags, for the embedded default")
    if args.train_iters is None and args.train_samples is None and not args.skip_train:
        raise UsageError("--train-iters is missing: give the number of steps, 1000 in the paper")
    positive = [*needed, "target_length", "num_query_groups", "tensor_model_parallel_size"]
    positive += ["pipeline_model_parallel_size", "context_parallel_size", "global_batch_size", "eval_documents"]
    for name in positive:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{to_flag(name)} {value}: must be 1 or more")
    for length in args.eval_lengths or []:
        if length < 2:
            raise UsageError(f"--eval-lengths {length}: must be 2 or more")


def _check_positions(args: Namespace, options: dict[str, Any]) -> None:
    window, target, sampler = args.seq_length, args.target_length, args.position_sampler
    samplers.check_own_flags(args)
    if target % window:
        raise UsageError(
            f"--target-length {target}: must be a multiple of --seq-length {window}, "
            f"e.g. {(target // window + 1) * window}"
        )
    if sampler == "full" and target != window:
        raise UsageError(
            f"--position-sampler full: trains at the target length; --seq-length {window} must equal "
            f"--target-length {target}"
        )
    with_segments = ("cream", "pose", "pi") if sampler == "mix" else ("cream", "pose")
    for name in samplers.sampler_names(args):
        if args.mask_segment_starts and name not in with_segments:
            raise UsageError(f"--mask-segment-starts: only with --position-sampler cream or pose, not {name}")
    try:
        build_sampler(**options, seed=args.seed)
    except ValueError as error:
        lengths = f"--seq-length {args.seq_length}, --target-length {args.target_length}"
        flag = f"--position-mix {args.position_mix}" if sampler == "mix" else f"--position-sampler {sampler}"
        raise UsageError(f"{flag} ({lengths}): {error}") from error


def _check_rope(args: Namespace) -> None:
    try:
        RotaryEmbedding(
            head_dim=args.kv_channels,
            rope_theta=float(args.rotary_base),
            max_position_embeddings=args.max_position_embeddings,
            rope_scaling=args.rope_scaling_config,
        )
    except ValueError as error:
        raise UsageError(f"--rope-scaling-type {args.rope_scaling_type}: {error}") from error


def check_files(args: Namespace) -> None:
    """Raise UsageError for missing or unusable tokenizer files and output folders."""
    model = args.tokenizer_model
    if args.tokenizer_type in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        if model is None:
            raise UsageError(
                f"--tokenizer-model is missing: give the .model file of --tokenizer-type {args.tokenizer_type}"
            )
        if not Path(model).is_file():
            raise UsageError(f"--tokenizer-model {model}: no such file")
    if args.wandb_project and not args.wandb_exp_name:
        raise UsageError(f"--wandb-project {args.wandb_project}: give --wandb-exp-name too")
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UsageError(f"--wandb-project {args.wandb_project}: wandb is not installed; pip install wandb")
    for name in ("save", "tensorboard_dir", "data_cache_path"):
        path = getattr(args, name)
        if path:
            check_can_create(Path(path), to_flag(name))
    if args.save and args.ckpt_format != "torch_dist":
        raise UsageError(
            f"--ckpt-format {args.ckpt_format}: --save writes only torch_dist, which has checksums; mp_rank_XX files "
            "are loaded without this flag"
        )
