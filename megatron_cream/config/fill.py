"""Values of flags that were not given: from the model, other flags and the machine.

Nothing is checked here, except that a value can be chosen at all.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron.core.transformer.enums import AttnBackend

from megatron_cream.checkpoint import peft_folder, pretrained, save_hook, start
from megatron_cream.checkpoint.mapping import pad_vocab_size
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.checkpoint.start import Origin
from megatron_cream.common import devices
from megatron_cream.common.cli import format_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.config import samplers
from megatron_cream.config.options import LoraConfig
from megatron_cream.config.values import long_eval_tasks, needs_ring_config
from megatron_cream.data import embedded
from megatron_cream.distributed import watchdog
from megatron_cream.model.attention import choose_backend
from megatron_cream.model.kernels import support
from megatron_cream.model.rope_choice import Rope, RopeFlags, choose_rope, has_other_rope
from megatron_cream.model.user_buffers import RING_CONFIG

_SCHEDULE = (
    "lr",
    "min_lr",
    "decoupled_lr",
    "decoupled_min_lr",
    "lr_decay_style",
    "lr_warmup_init",
    "lr_warmup_fraction",
    "lr_wsd_decay_style",
    "weight_decay",
    "weight_decay_incr_style",
)
_SCHEDULE_LENGTHS = ("lr_decay", "lr_warmup", "lr_wsd_decay")
"""Each is one flag in steps and one in samples; --train-iters or --train-samples of the run decides which."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def set_restart(args: Namespace) -> None:
    """Resume from the checkpoint in --save if torchrun restarted this job.

    torchrun restarts its ranks (--max-restarts) with the flags of the first start. Otherwise only --load resumes.
    """
    if args.save is None or args.skip_train or not (Path(args.save) / TRACKER).exists():
        return
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and not args.no_save_optim:
        args.load, args.ckpt_step, args.finetune = args.save, None, False
        args.no_load_optim = args.no_load_rng = None


def set_embedded_data(args: Namespace) -> None:
    """Set the data and the tokenizer of --embedded-data."""
    if not args.embedded_data:
        return
    corpus = embedded.prepare()
    args.tokenizer_type, args.tokenizer_model = "SentencePieceTokenizer", str(corpus.tokenizer_model)
    args.train_data_path, args.valid_data_path = [str(corpus.train_prefix)], [str(corpus.valid_prefix)]


def set_model_shape(args: Namespace, origin: Origin, defaults: dict[str, Any]) -> None:
    """Set the shape and the tokenizer of the model that the run starts from.

    A tokenizer that a flag sets is kept. `args.model_folder` is set too; training, saving and export read it.
    """
    args.model_folder, args.ckpt_step = origin.model_folder, origin.flags.ckpt_step
    if origin.is_loaded and not (Path(args.load) / TRACKER).exists():
        args.pretrained_checkpoint = None  # Megatron looks only for the tracker, and would start from these weights
    if origin.shape is None or origin.model_folder is None:
        return
    for name, value in origin.shape.megatron_args().items():
        if name != "rotary_base":  # `set_rope` chooses it
            setattr(args, name, value)
    divisor, tp = args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    args.padded_vocab_size = pad_vocab_size(origin.shape.vocab_size, divisor if divisor % tp == 0 else divisor * tp)
    if args.tokenizer_model is None and not args.embedded_data:
        _set_tokenizer(args, origin.model_folder, defaults["tokenizer_type"])


def set_adapter(args: Namespace) -> None:
    """Set the flags of LoRA that --load-adapter decides.

    Raises:
        UsageError: the adapter is unreadable, or a flag contradicts it.
    """
    if args.load_adapter is None:
        return
    adapter = peft_folder.PeftFolder(Path(args.load_adapter))
    found = {
        "lora_rank": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_targets": ",".join(adapter.targets),
        "lora_rslora": adapter.rank_stabilized,
    }
    for given in fields(LoraConfig):
        if given.name in found:
            value = getattr(args, given.name)
            if value not in (given.default, found[given.name]):
                raise UsageError(
                    f"{format_flag(given.name, value)}: the adapter in {args.load_adapter} has {found[given.name]}"
                )
            setattr(args, given.name, found[given.name])


def set_lora(args: Namespace, origin: Origin, base: dict[str, Any] | None) -> None:
    """Set the default of --lora-alpha, and `args.lora_base`: the record of the model under the adapters."""
    args.lora_base = base
    if args.lora_rank and args.lora_alpha is None:
        found = origin.checkpoint
        saved = getattr(found.args, "lora_alpha", None) if found and found.flag == "--load" else None
        args.lora_alpha = saved or 2.0 * args.lora_rank


def _set_tokenizer(args: Namespace, folder: Path, default_type: str) -> None:
    if args.tokenizer_type == "Llama2Tokenizer":
        if (folder / "tokenizer.model").is_file():
            args.tokenizer_model = str(folder / "tokenizer.model")
    elif args.tokenizer_type == default_type and any((folder / name).is_file() for name in _TOKENIZERS):
        args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(folder)


def set_derived_values(args: Namespace) -> None:
    """Set values that follow from other flags and from the installed software."""
    cuda = devices.has_cuda()
    if args.print_config and "WORLD_SIZE" not in os.environ:
        # Without a launcher, assume the fewest ranks that the layout needs.
        sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
        args.world_size = math.prod(sizes)
    if args.fp16 or args.fp32:
        args.bf16 = False
    if args.skip_train and args.train_iters is None and args.train_samples is None:
        args.train_iters = 1  # Megatron sizes its data sets by it; no step is run
    if args.train_data_path or args.valid_data_path or args.test_data_path or args.per_split_data_args_path:
        args.split = None
    args.target_length = args.target_length or args.seq_length
    samplers.fill(args)
    args.max_position_embeddings = max(
        args.max_position_embeddings or 0, args.target_length, *(args.eval_lengths or [0])
    )
    _set_long_evaluation(args)
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    try:
        backend = choose_backend(
            args.attention_backend,
            has_cuda=cuda,
            half=args.bf16 or args.fp16,
            deterministic=args.deterministic or args.deterministic_mode,
            own_layers=args.lora_base_dtype == "nf4",
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    args.attention = asdict(backend)  # a plain dict, because every checkpoint stores it
    args.check_for_nan_in_loss_and_grad = args.nan_policy == "rerun"
    if args.nan_policy == "rerun" and args.rerun_mode == "disabled":
        args.rerun_mode = "validate_results"
    if not args.hidden_dropout:
        # Without dropout the fused operation is only the residual sum. That is one kernel without torch.compile too,
        # and entering compiled code takes the host much longer.
        args.bias_dropout_fusion = False
    if not cuda:
        args.gradient_accumulation_fusion = False
    elif support.HAS_TRITON:
        # Megatron's flag for "the layer spec provides the MLP's activation as a module".
        args.use_te_activation_func, args.bias_swiglu_fusion = True, False
    args.transformer_impl = "transformer_engine" if args.attention["transformer_engine"] else "local"


def _set_long_evaluation(args: Namespace) -> None:
    """Set the default lengths of the long evaluation and the measure of its best checkpoint."""
    if args.long_eval_interval is None:
        return
    args.long_eval_lengths = sorted(set(args.long_eval_lengths or [args.target_length]))
    if args.long_eval_best is None:
        args.long_eval_best = "perplexity" if long_eval_tasks(args) == ("perplexity",) else "accuracy"


def set_rope(args: Namespace, origin: Origin, defaults: dict[str, Any]) -> None:
    """Set the rotary embedding from the flags and the run's model or checkpoint."""
    default_theta = float(defaults["rotary_base"])
    flags = RopeFlags(
        target=args.target_length,
        window=args.seq_length,
        type=args.rope_scaling_type,
        factor=args.rope_scaling_factor,
        original=args.original_max_position_embeddings,
        theta=None if args.rotary_base == default_theta else float(args.rotary_base),
    )
    found, shape = origin.checkpoint, origin.shape
    saved = start.read_saved_rope(found)
    if saved and origin.resumed:
        flags = replace(flags, saved_target=saved.positions)
    if saved and origin.resumed and not has_other_rope(flags, saved):
        chosen = Rope(theta=saved.theta, scaling=saved.scaling, original=saved.original)
    else:
        model = saved if saved and not origin.resumed else shape and shape.rope()
        if not origin.resumed:  # an adapter was trained with its own, not with that of a base that was trained too
            model = peft_folder.read_rope(args.load_adapter and Path(args.load_adapter)) or model
        try:
            chosen = choose_rope(flags, model, head_dim=args.kv_channels, default_theta=default_theta)
        except ValueError as error:
            raise UsageError(f"--rope-scaling-type {args.rope_scaling_type}: {error}") from error
    args.rotary_base, args.rope_scaling_config, args.rope_window = chosen.theta, chosen.scaling, chosen.original
    args.rope_lines = list(chosen.lines)


def set_saving(args: Namespace) -> None:
    """Set where and how often to save, and hide --save-hook from checkpoints and logs."""
    if args.save_hook is not None:
        args.save_hook = save_hook.set_command(args.save_hook)
    if args.save_hf is not None and args.save is None:
        args.save, args.no_save_optim = str(pretrained.intermediate_folder(Path(args.save_hf).absolute())), True
    if args.save is not None and args.save_interval is None:
        args.save_interval = args.train_iters or 1000


def set_schedule(args: Namespace, origin: Origin) -> None:
    """Use the saved schedule of learning rate and weight decay if the flags ask for it."""
    found = origin.resumed
    if not args.use_checkpoint_opt_param_scheduler or args.no_load_optim or found is None or found.step is None:
        return
    saved, kind = found.args, "iters" if args.train_iters else "samples"
    names = [*_SCHEDULE, *(f"{name}_{kind}" for name in _SCHEDULE_LENGTHS if getattr(saved, f"train_{kind}", None))]
    for name in names:
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    # Megatron accepts these two only if weight decay changes, and fills them in otherwise.
    changes = args.weight_decay_incr_style != "constant"
    for name in ("start_weight_decay", "end_weight_decay"):
        setattr(args, name, getattr(saved, name) if changes else None)


def set_megatron_flags(args: Namespace) -> None:
    """Set Megatron's own flags from this project's flags, the layout and the machine."""
    args.attention_backend = AttnBackend[args.attention["te_kernel"]]
    if args.lora_rank:
        args.pretrained_checkpoint = None  # the weights hook reads it, since it has no adapters
    args.deterministic_mode = args.deterministic_mode or args.deterministic
    shared = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    args.overlap_grad_reduce, args.overlap_param_gather = choose_overlaps(args, shared, devices.has_cuda())
    set_user_buffers(args)
    args.use_persistent_ckpt_worker = args.use_persistent_ckpt_worker or args.async_save  # else Megatron turns this off
    if args.distributed_timeout_minutes is None:
        # The watchdog must report first: a timed-out collective does not show where the other ranks are.
        patient = math.ceil(watchdog.START_FACTOR * args.timeout_minutes) + 1
        args.distributed_timeout_minutes = patient if args.timeout_minutes else 10
    # Megatron multiplies this by TP. Dividing first keeps a checkpoint's vocabulary size the same at any TP.
    tp = args.tensor_model_parallel_size
    if args.make_vocab_size_divisible_by % tp == 0:
        args.make_vocab_size_divisible_by //= tp


def set_user_buffers(args: Namespace) -> None:
    """Set the flags of RING_CONFIG if the run needs it."""
    if needs_ring_config(args):
        args.tp_comm_overlap_cfg = str(RING_CONFIG)
        args.tp_comm_overlap_rs_dgrad = True  # overlaps the reduction of the input gradient with its own product


def choose_overlaps(args: Namespace, ranks: int, cuda: bool) -> tuple[bool, bool]:
    """Return whether gradient reduction and weight gathering overlap with computation.

    Gradients are reduced during the backward pass, and weights are gathered during the forward pass. A flag or recipe
    decides. By default both overlap if a distributed optimizer's shards are on several GPUs.

    Args:
        args: Megatron's namespace; an overlap flag that was not given is None.
        ranks: number of ranks that share the weights: data-parallel times context-parallel.
        cuda: whether the run is on GPUs.
    """
    sharded = args.use_distributed_optimizer and not (args.use_megatron_fsdp or args.use_torch_fsdp2)
    default = cuda and ranks > 1 and sharded and not args.skip_train
    reduce, gather = args.overlap_grad_reduce, args.overlap_param_gather
    reduce = default if reduce is None else reduce
    return reduce, default and reduce if gather is None else gather


def set_graphs(args: Namespace, argv: list[str], choose: Callable[[list[str], Namespace], str | None]) -> str | None:
    """Set --cuda-graph-impl and --te-rng-tracker where neither was given, and return why there are graphs.

    Call it before `use_expandable_segments`. It returns None if there are none, or if the flags decided.

    Args:
        args: Megatron's namespace; --cuda-graph-impl is None if it was not given.
        argv: the run's flags.
        choose: returns why the run should use graphs, or None, from both.
    """
    if args.cuda_graph_impl is not None:
        return None
    args.cuda_graph_impl = "none"
    reason = None if args.te_rng_tracker else choose(argv, args)
    if reason:
        args.cuda_graph_impl, args.te_rng_tracker = "local", True
    return reason


def use_expandable_segments(args: Namespace) -> None:
    """Turn on expandable segments in torch's allocator, unless the environment configures it.

    All of this project's memory figures were measured with them. torch reads the setting when it initializes CUDA.
    Megatron rejects it together with CUDA graphs and with NCCL user buffers.
    """
    is_allowed = args.cuda_graph_impl != "local" and not args.nccl_ub
    if is_allowed and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
