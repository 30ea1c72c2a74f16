"""The summary that a run prints first, and the next command that it prints last."""

from argparse import Namespace
from pathlib import Path

from megatron_cream.checkpoint.families import read_config
from megatron_cream.checkpoint.pretrained import uses_intermediate_folder
from megatron_cream.checkpoint.start import Origin
from megatron_cream.common.advice import evaluation_command, export_command, plan_command
from megatron_cream.common.console import format_count
from megatron_cream.config import values
from megatron_cream.config.expected import Expected
from megatron_cream.config.run_data import RunData
from megatron_cream.config.samplers import sampler_names
from megatron_cream.data.packing import MIN_TOKENS
from megatron_cream.model.attention import AttentionBackend
from megatron_cream.model.lora_settings import TARGETS, LoraSettings

GIB = 2**30


def finished_message(args: Namespace, origin: Origin) -> str | None:
    """Return a message if the checkpoint of --load is at the run's last step, else None."""
    steps, step = values.count_steps(args), None if args.skip_train else origin.resumed_step
    if step is None or not steps or step < steps:
        return None
    return f"step {step} of {steps} is in {args.load}: nothing is left to train"


def describe_run(
    args: Namespace,
    origin: Origin,
    data: RunData,
    lora: LoraSettings | None,
    expected: Expected | None = None,
    graphs: str | None = None,
) -> str:
    """Return the lines that say what the run will do.

    Args:
        args: Megatron's, after its validation.
        origin: where the run starts from.
        data: the data that it reads.
        lora: the adapters, or None.
        expected: the plan of the run; None if there is none.
        graphs: why the run uses CUDA graphs though no flag says so; None if it does not.
    """
    rows = [
        ("model", f"{_model(args)}, {_weights(args, origin)}"),
        ("window", _window(args)),
        *(("rope", line) for line in _rope(args)),
        *([("lora", _adapters(lora, args.load_adapter))] if lora else []),
        ("layout", _layout(args)),
        *([("graphs", graphs)] if graphs else []),
        ("data", _data(args, data)),
        *(("short", line) for line in _short_texts(args, data)),
        ("train", describe_steps(args, origin.resumed_step, expected)),
        *([("memory", describe_memory(args, expected))] if expected and not args.skip_train else []),
        ("output", _output(args, origin.flags.save)),
    ]
    return "".join(f"{name:<8}{text}\n" for name, text in rows)


def next_command(args: Namespace) -> str:
    """Return the command to run after this run; "" if it has written no weights."""
    if args.skip_train:
        return ""
    if args.save_hf and args.adapter:  # evaluations merge a checkpoint's adapters; of the folder only PEFT can
        return "" if uses_intermediate_folder(args) else evaluation_command(args.save, args.target_length)
    if args.save_hf:
        return evaluation_command(args.save_hf, args.target_length)
    return export_command(Path(args.save)) if args.save else ""


def _model(args: Namespace) -> str:
    """Return the family and the number of parameters."""
    family = "llama" if args.model_folder is None else read_config(args.model_folder)[1].model_type
    return f"{family}, {_rounded(values.count_parameters(args))} parameters"


def _weights(args: Namespace, origin: Origin) -> str:
    """Return where the weights come from."""
    if (step := origin.resumed_step) is not None:
        return f"resumed from {args.load} at step {step:,}"
    if origin.source and (origin.is_loaded or not args.lora_base):
        return f"weights of {origin.source[1].parent}"
    named = args.lora_base["name"] if args.lora_base else args.load_hf
    return "random weights" if named is None else f"weights of {named}"


def _adapters(settings: LoraSettings, start: str | None) -> str:
    """Return the adapters, the folder that they start from, and what trains beside them."""
    targets = "all projections" if settings.targets == TARGETS else ", ".join(settings.targets)
    trained = f"; {' and '.join(settings.trained)} train too" if settings.trained else ""
    origin = f", from {start}" if start else ""
    base = ", on frozen weights in NF4" if settings.base_dtype == "nf4" else ""
    return f"rank {settings.rank}, scale {settings.scale:g}, on {targets}{origin}{base}{trained}"


def _window(args: Namespace) -> str:
    """Return the target, the window before, and the samples."""
    window = args.rope_window or args.seq_length
    start = "" if window == args.target_length else f" from a window of {window:,}"
    samples = f"samples of {args.seq_length:,} tokens with positions by {' and '.join(sampler_names(args))}"
    return f"{args.target_length:,} tokens{start}; {samples}"


def _rope(args: Namespace) -> list[str]:
    """Return what changes in the rotary embedding, or else what it is."""
    changes = [line.removeprefix("rope: ") for line in args.rope_lines if line.startswith("rope: ")]
    scaling = args.rope_scaling_config
    scaled = f"{scaling['rope_type']} scaling by {scaling['factor']:g}" if scaling else "not scaled"
    return changes or [f"{scaled}, theta {args.rotary_base:g}"]


def _layout(args: Namespace) -> str:
    """Return the parallel sizes, the batch, the precision and the attention."""
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "float32"
    if args.fp8:
        precision += f" with FP8 ({args.fp8})"
    ranks = format_count(args.world_size, "rank")
    return (
        f"{ranks}: TP {args.tensor_model_parallel_size}, PP {args.pipeline_model_parallel_size}, "
        f"CP {args.context_parallel_size}, DP {args.data_parallel_size}; micro-batch {args.micro_batch_size}, "
        f"global batch {args.global_batch_size}; {precision}; attention {AttentionBackend(**args.attention)}"
    )


def _data(args: Namespace, data: RunData) -> str:
    """Return the path of the data, and its documents and tokens."""
    if not data.train:
        return "none"
    documents, tokens = data.count_long()
    where = "the Python standard library" if args.embedded_data else data.train[0]
    where = where if len(data.train) == 1 else f"{len(data.train)} data sets, first {where}"
    split = f", split {args.split}" if args.split else ""
    return f"{where}: {format_count(documents, 'document')}, {tokens:,} tokens{split}"


def _short_texts(args: Namespace, data: RunData) -> list[str]:
    """Return the share of packed short texts, and what each of their data sets has."""
    if not values.short_mix(args):
        return []
    lines = [f"{100 * args.short_share:g} % of the samples are whole short texts, packed"]
    for prefix, packed in data.count_short().items():
        left_out = [f"{packed.too_long:,} with more than {args.seq_length:,} tokens"] if packed.too_long else []
        left_out += [f"{packed.too_short:,} with less than {MIN_TOKENS}"] if packed.too_short else []
        lines.append(
            f"{prefix}: {packed.documents:,} documents, {packed.tokens:,} tokens in {packed.samples:,} samples, "
            f"{100 * packed.padding:.1f} % padding" + (f"; left out: {' and '.join(left_out)}" if left_out else "")
        )
    return lines


def describe_steps(args: Namespace, done: int | None, expected: Expected | None) -> str:
    """Return the number of steps and tokens, and the expected time.

    Args:
        args: Megatron's.
        done: steps of the checkpoint that the run resumes from, or None.
        expected: as for `describe_run`.
    """
    if args.skip_train:
        return "none (--skip-train): the model is evaluated"
    each = args.global_batch_size * args.seq_length
    steps = left = values.count_steps(args)
    text = f"{format_count(steps, 'step')} of {each:,} tokens, {_rounded(steps * each)} in all"
    if done:
        left = max(steps - done, 0)
        text += f", {left:,} left"
    if expected is None:
        return f"{text}; each step's line has the time left (ETA)"
    return f"{text}; about {_rough(left * expected.step)} by plan on {args.world_size} x {expected.gpu}"


def describe_memory(args: Namespace, expected: Expected) -> str:
    """Return the memory of a GPU by plan, and what needs less if it may not suffice."""
    text = f"{expected.memory / GIB:.1f} of the {expected.usable / GIB:.1f} GiB of each {expected.gpu} by plan"
    if not expected.is_close:
        return text
    plan = plan_command(args.world_size, "--gpu", expected.gpu)
    return f"{text}: it may run out of memory; {plan} lists the layouts that need less"


def _rough(seconds: float) -> str:
    """Return a time in its largest unit, such as 12 min or 1.6 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _output(args: Namespace, save: str | None) -> str:
    """Return where the run writes; `save` is the --save that the user gave."""
    parts = []
    if save:
        steps = "" if args.skip_train else f"a checkpoint every {format_count(args.save_interval, 'step')}, "
        parts.append(f"{save} ({steps}settings in {Path(save) / 'runs'})")
    if args.save_hf:
        parts.append(f"{args.save_hf} (Hugging Face folder, at the end)")
    if args.tensorboard_dir:
        parts.append(f"TensorBoard in {args.tensorboard_dir}")
    return "; ".join(parts) or "none: no --save"


def _rounded(count: float) -> str:
    """Return a number in three digits, such as 6.74B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
