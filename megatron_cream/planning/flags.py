"""The run to plan, from the flags of pretrain_cream.py. Nothing is started."""

import functools
from argparse import Namespace

from megatron_cream.checkpoint import start
from megatron_cream.checkpoint.adapters import settings_of
from megatron_cream.checkpoint.mapping import pad_vocab_size
from megatron_cream.common import cli
from megatron_cream.common.errors import UsageError
from megatron_cream.config import fill, values
from megatron_cream.config.checks import flags as flag_checks
from megatron_cream.config.checks import lora as lora_checks
from megatron_cream.config.checks import memory as memory_checks
from megatron_cream.config.checks import numbers as number_checks
from megatron_cream.config.parser import build_parser, default_values
from megatron_cream.config.recipe import read_recipe, recipe_path
from megatron_cream.data.tokenizers import load_tokenizer
from megatron_cream.planning.run import Engine, Layout, Lora, Model, Run

# Flags whose effect on memory `memory` does not model.
_NOT_PLANNED = (
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "cpu_offloading_num_layers",
    "fine_grained_activation_offloading",
    "fp4",
    "mtp_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "fp32_residual_connection",
    "cross_entropy_loss_fusion",
)
_DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_LLAMA2_VOCABULARY = 32000


def run_from_flags(argv: list[str], gpus: int) -> Run:
    """Return the run that pretrain_cream.py would start with these flags on `gpus` GPUs.

    Data, tokenizer and optimization flags may be missing. Nothing is started or written, and no GPU is used. The
    planning machine need not be the training machine, so Transformer Engine's layers are assumed unless
    --transformer-impl local or --attention-backend selects others.

    Args:
        argv: the flags.
        gpus: number of GPUs of the whole job.

    Raises:
        UsageError: a flag is missing or wrong, or the run cannot be planned.
    """
    args = parse_flags(argv)
    defaults = default_values()
    flag_checks.check_each(args)
    fill.set_adapter(args)
    lora_checks.check_each(args)
    memory_checks.check_each(args, has_cuda=True)
    number_checks.check(args, defaults)
    flags = start.StartFlags(
        load=args.load,
        load_hf=args.load_hf,
        pretrained_checkpoint=args.pretrained_checkpoint,
        load_adapter=args.load_adapter,
        ckpt_step=args.ckpt_step,
    )
    model_folder, shape = start.find_model(flags)
    if shape is not None:
        flag_checks.check_model_agrees(args, shape, model_folder, defaults)
    fill.set_model_shape(args, start.Origin(flags, model_folder, shape, None, None), defaults)
    steps = args.train_iters
    args.train_iters = args.train_iters or 1
    args.micro_batch_size = args.micro_batch_size or 1
    flag_checks.check_required(args)
    for name in _NOT_PLANNED:
        if getattr(args, name):
            raise UsageError(f"{cli.to_flag(name)} {getattr(args, name)}: its memory is not modelled; leave it out")
    if args.optimizer != "adam":
        raise UsageError(f"--optimizer {args.optimizer}: the planner models only the memory of adam")
    target = args.target_length or args.seq_length
    if target % args.seq_length:
        raise UsageError(f"--target-length {target}: must be a multiple of --seq-length {args.seq_length}")
    engine = _engine(args)
    layout = _layout(args, gpus, engine)
    if args.train_samples and not steps:
        steps = args.train_samples // layout.global_batch
    return Run(_model(args), layout, engine, gpus, target, steps)


_build_parser = functools.cache(build_parser)


def parse_flags(argv: list[str]) -> Namespace:
    """Return the values of the flags, of the recipe that they name, and the defaults of all others."""
    parser = _build_parser(recipe=False)  # building it takes longer than a plan
    path = recipe_path(argv)
    return parser.parse_args(argv, Namespace(**read_recipe(path, parser) if path else {}))


def _model(args: Namespace) -> Model:
    heads = args.num_attention_heads
    if args.hidden_size % heads:
        raise UsageError(f"--num-attention-heads {heads}: must divide --hidden-size {args.hidden_size}")
    groups = args.num_query_groups if args.group_query_attention else heads
    if not groups or heads % groups:
        raise UsageError(f"--num-query-groups {groups}: must divide --num-attention-heads {heads}")
    return Model(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        # Megatron's default for SwiGLU.
        ffn_hidden_size=args.ffn_hidden_size or int(4 * args.hidden_size * 2 / 3 / 64) * 64,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=args.kv_channels or args.hidden_size // heads,
        padded_vocab_size=args.padded_vocab_size or pad_vocab_size(_vocabulary(args), _divisor(args)),
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=args.add_qkv_bias,
        qk_norm=args.qk_layernorm,
        lora=_lora(args),
    )


def _lora(args: Namespace) -> Lora | None:
    settings = settings_of(args)
    if settings is None:
        return None
    return Lora(
        rank=settings.rank,
        targets=settings.targets,
        embeddings="embeddings" in settings.trained,
        norms="norms" in settings.trained,
        dropout=settings.dropout > 0,
        nf4=settings.base_dtype == "nf4",
    )


def _divisor(args: Namespace) -> int:
    tp = args.tensor_model_parallel_size
    return args.make_vocab_size_divisible_by * (1 if args.make_vocab_size_divisible_by % tp == 0 else tp)


def _vocabulary(args: Namespace) -> int:
    if args.vocab_size:
        return args.vocab_size
    if args.embedded_data:
        from megatron_cream.data import embedded

        return embedded.prepare().vocab_size
    if args.tokenizer_model is None and args.tokenizer_type == "Llama2Tokenizer":
        return _LLAMA2_VOCABULARY
    if args.tokenizer_model is None:
        raise UsageError("--vocab-size is missing: give the tokenizer's, or --tokenizer-model, or --load-hf")
    try:
        return load_tokenizer(args.tokenizer_type, args.tokenizer_model).vocab_size
    except ValueError as error:
        raise UsageError(f"--tokenizer-model {error}") from error


def _layout(args: Namespace, gpus: int, engine: Engine) -> Layout:
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    data = max(gpus // (tp * pp * cp), 1)
    recompute = "selective" if args.recompute_activations else args.recompute_granularity or "none"
    modules = tuple(args.recompute_modules or ["core_attn"]) if recompute == "selective" else ()
    if "layernorm" in modules and not engine.transformer_engine:
        raise UsageError(
            "--recompute-modules layernorm: megatron-core 0.19 rejects it without Transformer Engine; leave it out"
        )
    if recompute == "full" and not (args.recompute_method and args.recompute_num_layers):
        raise UsageError("--recompute-granularity full: give --recompute-method and --recompute-num-layers with it")
    reduce, gather = fill.choose_overlaps(args, data * cp, cuda=True)
    return Layout(
        tensor=tp,
        pipeline=pp,
        context=cp,
        data=data,
        virtual_pipeline=_virtual_stages(args, pp),
        layers_per_chunk=args.num_layers_per_virtual_pipeline_stage,
        micro_batch_group=args.microbatch_group_size_per_vp_stage,
        first_stage=args.decoder_first_pipeline_num_layers,
        last_stage=args.decoder_last_pipeline_num_layers,
        sequence_parallel=args.sequence_parallel and tp > 1,
        distributed_optimizer=args.use_distributed_optimizer,
        seq_length=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size or args.micro_batch_size * data,
        recompute=recompute,
        recompute_modules=modules,
        recompute_method=args.recompute_method or "uniform",
        recompute_layers=args.recompute_num_layers or 1,
        scatter_saved=args.distribute_saved_activations,
        overlap_grad_reduce=reduce and data * cp > 1,
        overlap_param_gather=gather and data * cp > 1,
        overlap_tensor=args.tp_comm_overlap and engine.transformer_engine and tp > 1,
        rings=values.needs_ring_config(args) and engine.transformer_engine,
    )


def _virtual_stages(args: Namespace, pipeline: int) -> int:
    if args.num_virtual_stages_per_pipeline_rank:
        return args.num_virtual_stages_per_pipeline_rank
    chunk = args.num_layers_per_virtual_pipeline_stage
    if not chunk:
        return 1
    if args.num_layers % (pipeline * chunk):
        raise UsageError(
            f"--num-layers-per-virtual-pipeline-stage {chunk}: times --pipeline-model-parallel-size {pipeline} "
            f"must divide --num-layers {args.num_layers}"
        )
    return args.num_layers // (pipeline * chunk)


def _engine(args: Namespace) -> Engine:
    backend = args.attention_backend
    if backend in ("local", "unfused"):
        raise UsageError(f"--attention-backend {backend}: stores attention scores, which are not modelled; use flash")
    local = args.transformer_impl == "local" or backend == "sdpa" or args.lora_base_dtype == "nf4"
    if local and backend in ("te", "fused"):
        raise UsageError(f"--attention-backend {backend}: needs --transformer-impl transformer_engine")
    if local and args.fp8:
        raise UsageError(f"--fp8-format {args.fp8}: needs Transformer Engine; leave out --transformer-impl local")
    element = 4 if args.fp32 else 2
    return Engine(
        transformer_engine=not local,
        element=element,
        gradient=element if args.grad_reduce_in_bf16 else _DTYPE_BYTES[args.main_grads_dtype],
        optimizer=_optimizer_bytes(args, element, local),
        fused_weight_gradients=args.gradient_accumulation_fusion,
        one_pass_optimizer=not args.use_precision_aware_optimizer,
        attention={"te": "te", "fused": "te", "sdpa": "sdpa"}.get(backend, "flash"),
        fp8=args.fp8_recipe if args.fp8 else None,
        fp8_parameters=args.fp8_param_gather,
        graphs=args.cuda_graph_impl == "local",
        optimizer_offload=args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0,
    )


def _optimizer_bytes(args: Namespace, element: int, local: bool) -> int:
    names = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    if not args.use_precision_aware_optimizer:
        for name in names:
            if getattr(args, name) != "fp32":
                value = getattr(args, name)
                raise UsageError(f"{cli.to_flag(name)} {value}: only with --use-precision-aware-optimizer")
    elif args.optimizer_cpu_offload:
        return 12  # Megatron keeps what stays on the GPU in float32
    elif not args.use_distributed_optimizer or local:
        raise UsageError(
            "--use-precision-aware-optimizer: needs --use-distributed-optimizer and Transformer Engine's layers"
        )
    moments = _DTYPE_BYTES[args.exp_avg_dtype] + _DTYPE_BYTES[args.exp_avg_sq_dtype]
    if element == 4:
        return moments  # a float32 parameter needs no master copy
    master = _DTYPE_BYTES[args.main_params_dtype]
    tensorwise = args.fp8 is not None and args.fp8_recipe != "delayed"
    if args.use_precision_aware_optimizer and not args.fp16 and not tensorwise and master == 4:
        master = 2  # only the bits of the float32 weight that the bf16 weight does not have
    return master + moments
