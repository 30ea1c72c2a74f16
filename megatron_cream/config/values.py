"""Values computed from the flags: Megatron's configurations, plain numbers and names."""

from argparse import Namespace
from pathlib import Path

import numpy as np
from megatron.core.datasets.utils import get_blend_from_list
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_cream.checkpoint.adapters import settings_of
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.checkpoint.pretrained import InitialWeights
from megatron_cream.common import devices
from megatron_cream.common.cli import split_names
from megatron_cream.config.run_data import RunData
from megatron_cream.config.samplers import sampler_options
from megatron_cream.data.dataset import LongDocumentDatasetConfig
from megatron_cream.data.mixed_dataset import Mix
from megatron_cream.distributed import watchdog
from megatron_cream.model import flops, user_buffers
from megatron_cream.model.attention import AttentionBackend
from megatron_cream.model.kernels import support
from megatron_cream.model.llama import LlamaModelConfig
from megatron_cream.model.lora_settings import LoraSettings
from megatron_cream.optimizer import finite


def can_use_one_pass_optimizer(args: Namespace) -> bool:
    """Return whether `optimizer.one_pass` supports this run: AdamW in float32 on a GPU."""
    unsupported = (
        "use_precision_aware_optimizer",
        "optimizer_cpu_offload",
        "optimizer_cuda_graph",
        "use_megatron_fsdp",
        "use_torch_fsdp2",
    )
    is_plain_adam = args.optimizer == "adam" and not any(getattr(args, name, False) for name in unsupported)
    return devices.has_cuda() and support.HAS_TRITON and is_plain_adam


def is_async_save_size_known(args: Namespace) -> bool:
    """Return whether what a rank copies for --async-save follows from its optimizer's weights before the first step.

    Without the distributed optimizer a rank has the whole state and saves a part. With --optimizer-cpu-offload the
    first step itself takes host memory for the state. A CUDA graph may capture the first step.
    """
    others = ("no_save_optim", "optimizer_cpu_offload", "optimizer_cuda_graph")
    return args.async_save and args.use_distributed_optimizer and not any(getattr(args, name) for name in others)


def model_config(args: Namespace) -> LlamaModelConfig:
    """Return the configuration of the model builder."""
    weights = initial_weights(args)
    hooks = [*([weights.fill] if weights else []), watchdog.report_forward_passes, finite.watch_model]
    options = vars(gpt_config_from_args(args)) | {"pre_wrap_hooks": hooks}
    return LlamaModelConfig(
        **options,
        rope_scaling_config=args.rope_scaling_config,
        rope_max_positions=args.max_position_embeddings,
        attention=AttentionBackend(**args.attention),
        real_vocab_size=args.vocab_size,
        lora=settings_of(args),
    )


def initial_weights(args: Namespace) -> InitialWeights | None:
    """Return the weights of --load-hf, or of the base model of adapters.

    None if Megatron loads all weights from a checkpoint, or none.
    """
    is_resumed = args.load is not None and (Path(args.load) / TRACKER).is_file()
    if args.lora_base is None and (args.load_hf is None or is_resumed):
        return None
    adapter = None if args.load_adapter is None or is_resumed else Path(args.load_adapter)
    return InitialWeights(args.model_folder, args.lora_base, adapter)


def needs_ring_config(args: Namespace) -> bool:
    """Return whether the run uses RING_CONFIG: with overlap of user buffers, no other file, and faster rings."""
    is_wanted = args.tp_comm_overlap and args.tp_comm_overlap_cfg is None
    return is_wanted and user_buffers.is_ring_faster(args.tensor_model_parallel_size, bool(args.fp8))


def dataset_config(args: Namespace, tokenizer) -> LongDocumentDatasetConfig:
    """Return the configuration of Megatron's dataset builder and of this project's transform."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return _dataset_config(args, tokenizer, blend=blend, blend_per_split=blend_per_split, split=args.split)


def short_dataset_config(args: Namespace, tokenizer) -> LongDocumentDatasetConfig:
    """Return the configuration of the builder of --short-data-path, all of which is for training."""
    blend = get_blend_from_list(args.short_data_path)
    return _dataset_config(args, tokenizer, blend=None, blend_per_split=[blend, None, None], split=None)


def short_mix(args: Namespace) -> Mix | None:
    """Return which training samples are packed short texts; None if none are."""
    return Mix(args.short_share, args.seed) if args.short_data_path and args.short_share else None


def _dataset_config(args: Namespace, tokenizer, **data) -> LongDocumentDatasetConfig:
    return LongDocumentDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        **data,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        sampler=sampler_options(args),
        mask_segment_starts=args.mask_segment_starts,
        chat_loss=args.chat_loss,
        eod_token=tokenizer.eod if args.eod_mask_loss else None,
        vocab_size=args.vocab_size,
        mark_documents=short_mix(args) is not None,
        long_min_tokens=args.long_min_tokens,
    )


def flops_per_token(args: Namespace, data: RunData, lora: LoraSettings | None) -> float:
    """Return the model FLOPs of one training token, forward and backward.

    Args:
        args: Megatron's.
        data: the data of the run.
        lora: the adapters, or None.
    """
    sizes, context = _sizes(args), _mean_context(args, data)
    return flops.flops_per_token(
        **sizes,
        vocab_size=args.padded_vocab_size,
        seq_length=context,
        frozen_layers=lora is not None,
        frozen_head=lora is not None and "embeddings" not in lora.trained,
    )


def _mean_context(args: Namespace, data: RunData) -> float:
    """Return the mean length, in tokens, of the samples and packed documents that tokens attend within."""
    if not short_mix(args):
        return args.seq_length
    counts = data.count_short()
    totals = [counts[prefix] for prefix in data.short]
    weights = data.short_weights or [each.samples for each in totals]
    short = np.average([each.mean_context for each in totals], weights=weights)
    return (1 - args.short_share) * args.seq_length + args.short_share * float(short)


def count_steps(args: Namespace) -> int:
    """Return the number of steps of the whole run; 0 if neither --train-iters nor --train-samples is given."""
    return args.train_iters or (args.train_samples or 0) // args.global_batch_size


def count_parameters(args: Namespace) -> int:
    """Return the number of the model's weights, without padding, norms and biases."""
    tied = not args.untie_embeddings_and_output_weights
    return flops.parameters(**_sizes(args), vocab_size=args.vocab_size, tied=tied)


def _sizes(args: Namespace) -> dict[str, int]:
    """Return the sizes of the layers, as the functions of `flops` name them."""
    return dict(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        num_attention_heads=args.num_attention_heads,
    )


def long_eval_tasks(args: Namespace) -> tuple[str, ...]:
    """Return the names in --long-eval-tasks, without duplicates."""
    return split_names(args.long_eval_tasks)
