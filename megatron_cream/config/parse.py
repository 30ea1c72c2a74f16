"""Parse the command line into checked plain values, in one visible list of steps.

Nothing is started here, and no file is written.
"""

import io
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import rebuild_tokenizer, set_global_variables

from megatron_cream.checkpoint import pretrained, start
from megatron_cream.checkpoint.start import Origin, StartFlags
from megatron_cream.common import console, devices
from megatron_cream.common.errors import UsageError, convert_megatron_errors, one_line, reason
from megatron_cream.config import attention_choice, fill, run_data, values
from megatron_cream.config.checks import checkpoint as checkpoint_checks
from megatron_cream.config.checks import data as data_checks
from megatron_cream.config.checks import evaluation as evaluation_checks
from megatron_cream.config.checks import flags as flag_checks
from megatron_cream.config.checks import layout as layout_checks
from megatron_cream.config.checks import lora as lora_checks
from megatron_cream.config.checks import memory as memory_checks
from megatron_cream.config.checks import numbers as number_checks
from megatron_cream.config.checks import saving as save_checks
from megatron_cream.config.checks import short_texts as short_text_checks
from megatron_cream.config.describe import describe
from megatron_cream.config.parser import default_values, parse_flags
from megatron_cream.config.run_data import RunData
from megatron_cream.distributed import nodes, rendezvous
from megatron_cream.model.llama import LlamaModelConfig
from megatron_cream.patches import safe_loading, tensorboard


@dataclass(frozen=True)
class Parsed:
    """A checked command line.

    args: Megatron's namespace, filled in.
    origin: where the run starts from.
    data: the data that it reads.
    model: configuration of the model builder.
    output: what Megatron printed during validation (its list of 800 arguments), which belongs in the run's log.
    graphs: why the run uses CUDA graphs though no flag says so; None if it does not.
    """

    args: Namespace
    origin: Origin
    data: RunData
    model: LlamaModelConfig
    output: str
    graphs: str | None


@dataclass(frozen=True)
class _Checked:
    """The command line after the checks that need no other rank.

    args: Megatron's namespace.
    origin: where the run starts from.
    data: the data that it reads.
    warnings: Megatron's warnings, such as about a flag that it turns off.
    auto: whether --attention-backend is auto.
    graphs: as in `Parsed`.
    """

    args: Namespace
    origin: Origin
    data: RunData
    warnings: list[str]
    auto: bool
    graphs: str | None


GraphChoice = Callable[[list[str], Namespace], str | None]


def parse(argv: list[str] | None = None, choose_graphs: GraphChoice = lambda argv, args: None) -> Parsed:
    """Parse and check the command line on all ranks, and set Megatron's global variables.

    Args:
        argv: the flags; None means those of the process.
        choose_graphs: returns why a run whose flags do not decide it should use CUDA graphs, or None, from its flags
            as given and as checked.

    Raises:
        UsageError: a flag is wrong. Nothing was started or written.
        SystemExit: after --help or --print-config.
    """
    output = io.StringIO()
    with nodes.share_all_errors():
        checked = _check_on_one_rank(argv, output, choose_graphs)
    args, origin, data = checked.args, checked.origin, checked.data
    with rendezvous.share_errors():
        _check_share_of_rank(args, data)
    start.check_content(origin, share=(args.rank, args.world_size))
    nodes.check_shared({"--save": args.save, "--data-cache-path": args.data_cache_path})
    if args.rank == 0:
        lines = [line for line in args.rope_lines if line.startswith("warning")]  # the summary shows the others
        lines += [f"warning: {text}" for text in checked.warnings]
        for line in [*lines, *filter(None, [checkpoint_checks.resume_warning(args, origin)])]:
            print(line, file=sys.stderr, flush=True)
    # A run that chose graphs keeps the attention that was tested in them.
    is_fixed = args.deterministic_mode or args.skip_train or checked.graphs
    if checked.auto and devices.has_cuda() and not is_fixed:
        attention_choice.choose_fastest_backend(args)
    flag_checks.check_kernel_in_environment(args)
    tensorboard.install()
    try:
        with console.capture_output(output):
            set_global_variables(args, build_tokenizer=False)  # last, because it opens log files
    except OSError as error:
        if not args.tensorboard_dir:
            raise
        raise UsageError(f"--tensorboard-dir {args.tensorboard_dir}: {reason(error)}") from error
    with console.capture_output(output):
        model = values.model_config(args)
    return Parsed(args, origin, data, model, output.getvalue(), checked.graphs)


def read(argv: list[str] | None = None) -> Namespace:
    """Parse, fill in and check the flags, without Megatron's own validation.

    Raises:
        UsageError: a flag is wrong.
    """
    return _read(argv)[0]


def _read(argv: list[str] | None) -> tuple[Namespace, Origin, RunData]:
    """Do what `read` does, and return also where the run starts from and the data that it reads."""
    args = parse_flags(argv)
    defaults = default_values()

    flag_checks.check_each(args)
    memory_checks.check_each(args, has_cuda=devices.has_cuda() or args.print_config)
    number_checks.check(args, defaults)
    fill.set_adapter(args)
    lora_checks.check_each(args)

    fill.set_restart(args)
    flags = StartFlags(
        load=args.load,
        load_hf=args.load_hf,
        pretrained_checkpoint=args.pretrained_checkpoint,
        load_adapter=args.load_adapter,
        save=args.save,
        ckpt_step=args.ckpt_step,
        ckpt_format=args.ckpt_format,
        finetune=args.finetune,
        skip_train=args.skip_train,
        checkpoint_checksums=args.checkpoint_checksums,
        verify_integrity=args.verify_integrity,
        layout=(args.tensor_model_parallel_size, args.pipeline_model_parallel_size),
        lora_rank=args.lora_rank,
        lora_train=args.lora_train,
    )
    origin = start.find_origin(flags)
    if origin.shape is not None and origin.model_folder is not None:
        flag_checks.check_model_agrees(args, origin.shape, origin.model_folder, defaults)

    fill.set_embedded_data(args)
    fill.set_model_shape(args, origin, defaults)
    lora_checks.check_checkpoint(args, origin.checkpoint)
    fill.set_lora(args, origin, start.find_base(origin))
    flag_checks.check_required(args)
    fill.set_derived_values(args)
    fill.set_rope(args, origin, defaults)

    flag_checks.check_together(args)
    evaluation_checks.check(args)
    short_text_checks.check(args)
    save_checks.check(args)
    layout_checks.check(args)
    lora_checks.check_together(args)
    data = run_data.read(args)
    data_checks.check(args, data)
    flag_checks.check_files(args)
    flag_checks.check_weights(args, from_checkpoint=origin.source is not None)

    fill.set_saving(args)
    is_intermediate = pretrained.uses_intermediate_folder(args)
    pretrained.check_model_folder(origin, warn=args.rank == 0)
    save_checks.check_export(args, is_intermediate)
    return args, origin, data


def _check_on_one_rank(argv: list[str] | None, output: io.StringIO, choose_graphs: GraphChoice) -> _Checked:
    """Run the part of `parse` that needs no other rank."""
    args, origin, data = _read(argv)
    if args.print_config:
        if args.rank == 0:
            print(describe(args))
        raise SystemExit(0)
    flag_checks.check_graphs_have_gpu(args)
    graphs = fill.set_graphs(args, sys.argv[1:] if argv is None else argv, choose_graphs)
    flag_checks.check_graphs_with_segments(args)
    fill.use_expandable_segments(args)
    data_checks.check_splits(args, data)
    data_checks.check_held_out(args, data)
    safe_loading.install()
    fill.set_schedule(args, origin)
    number_checks.check_learning_rates(args)
    auto = args.attention_backend == "auto"
    fill.set_megatron_flags(args)
    warned = _validate(args, output)
    data_checks.check_token_ids(args, data)
    checkpoint_checks.check_model(args, origin)
    return _Checked(args, origin, data, warned, auto, graphs)


def _validate(args: Namespace, output: io.StringIO) -> list[str]:
    """Let Megatron check the flags and fill in its own, write its output, and return its warnings."""
    with (
        convert_megatron_errors(""),
        console.capture_output(output),
        warnings.catch_warnings(record=True) as caught,
    ):
        # `patches.platform` hides all of Megatron's; these are about the user's flags.
        warnings.filterwarnings("always", category=UserWarning, module=r"megatron\.training\.")
        if args.use_checkpoint_args:
            theta = args.rotary_base  # already chosen from flags and checkpoint; Megatron would undo that
            load_args_from_checkpoint(args)
            args.rotary_base = theta
        validate_args(args, {})
    prefix = f"--tokenizer-type {args.tokenizer_type} {args.tokenizer_model or ''}: "
    with convert_megatron_errors(prefix), console.capture_output(output):
        tokenizer = rebuild_tokenizer(args)
    data_checks.check_tokenizer(args, tokenizer)
    args.vocab_size = args.vocab_size or tokenizer.vocab_size  # saved: the vocabulary size without padding
    with convert_megatron_errors(""), console.capture_output(output):  # Megatron's configuration has checks of its own
        pretrain_cfg_container_from_args(args, values.model_config(args))
    return [one_line(str(warning.message)) for warning in caught]


def _check_share_of_rank(args: Namespace, data: RunData) -> None:
    """Check the GPU, the save hook and the share of the data files that belong to this rank."""
    flag_checks.check_gpu_of_rank(args.local_rank)
    save_checks.check_on_rank(args)
    data_checks.check_whole(data, (args.rank, args.world_size))
