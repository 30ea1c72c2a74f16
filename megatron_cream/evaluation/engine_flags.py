"""The flags of --engine: added to the tasks that generate, checked, and turned into settings of vLLM."""

import argparse
from collections.abc import Sequence

import torch

from megatron_cream.common import devices
from megatron_cream.common.cli import format_flag, positive
from megatron_cream.common.errors import NotAvailable, UsageError
from megatron_cream.evaluation.models.fp8_memory import KV_CACHE_DTYPES
from megatron_cream.evaluation.models.language_model import ENGINES, Source, read_rope_type
from megatron_cream.evaluation.models.vllm_model import VllmSettings, too_long
from megatron_cream.model.rotary import LENGTH_DEPENDENT_TYPES


def add_engine(command: argparse.ArgumentParser, share, *, has_length: bool = True) -> None:
    """Add --engine and the flags of vLLM.

    Args:
        command: the parser of a task.
        share: reads a number above 0 and at most 1.
        has_length: whether --max-model-len is for vLLM alone; else the command adds it itself.
    """
    add_engine_choice(command, ENGINES if has_length else ("auto", "vllm"))  # lm_eval has no Megatron-Core
    add = command.add_argument_group("with --engine vllm").add_argument
    if has_length:
        about = "maximum tokens of a prompt and its answer (default: what the task needs, within the model's positions)"
        add("--max-model-len", type=positive, metavar="N", help=about)
    add("--tensor-parallel-size", type=positive, metavar="N", help="GPUs over which the model is split (default: 1)")
    about = "share of each GPU's memory that vLLM takes (default: vLLM's)"
    add("--gpu-memory-utilization", type=share, metavar="SHARE", help=about)
    about = "neither compile nor capture CUDA graphs: starts faster, answers more slowly"
    add("--enforce-eager", action="store_true", help=about)


def add_engine_choice(command: argparse.ArgumentParser, engines: Sequence[str]) -> None:
    """Add --engine with these values, and --kv-cache-dtype, to the parser of a task."""
    about = "auto: transformers for a Hugging Face folder, Megatron-Core for a checkpoint or a model on several GPUs"
    command.add_argument("--engine", choices=engines, default="auto", help=about)
    about = "of the keys and values: auto, that of the model; fp8, half of bf16's memory, with small errors"
    command.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help=about)


def add_cuda_graphs(command: argparse.ArgumentParser) -> None:
    """Add --cuda-graphs and --no-cuda-graphs to the parser of a task that generates."""
    about = "generate by CUDA graphs, in Megatron-Core on one GPU for each model (default: on there)"
    command.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, help=about)


def check_cuda_graphs(args: argparse.Namespace, source: Source) -> None:
    """Raise UsageError for --cuda-graphs where generation cannot use them."""
    if not args.cuda_graphs:
        return
    if not devices.has_cuda():
        raise UsageError("--cuda-graphs: there is no GPU here. Leave the flag out")
    if source.engine != "megatron":
        where = f"this model runs in {source.engine}. Otherwise leave the flag out"
        if args.command == "suite":  # its --engine has no value megatron
            raise UsageError(f"--cuda-graphs: only for a Megatron checkpoint and without --engine vllm; {where}")
        raise UsageError(f"--cuda-graphs: only with --engine megatron; {where}")
    if args.ranks.replica_size > 1:
        raise UsageError("--cuda-graphs: not for a model that several GPUs share")
    if (rope_type := read_rope_type(source)) in LENGTH_DEPENDENT_TYPES:
        raise UsageError(
            f"--cuda-graphs: the rope_type of {source.flag} {source.path} is {rope_type}, whose frequencies change "
            "while a text grows. Leave the flag out"
        )


def check_chat(args: argparse.Namespace, source: Source) -> None:
    """Raise UsageError for --chat if the tokenizer has no chat template, or one that cannot be used."""
    if args.chat:
        source.tokenizer.encode_chat("")


def check_vllm_flags(args: argparse.Namespace, source: Source) -> None:
    """Raise UsageError for flags of vLLM with another engine, and for more GPUs than there are."""
    if source.engine != "vllm":
        for name in ("max_model_len", "tensor_parallel_size", "gpu_memory_utilization", "enforce_eager"):
            if value := getattr(args, name, None):
                raise UsageError(f"{format_flag(name, value)}: only with --engine vllm")
    elif devices.has_cuda() and (args.tensor_parallel_size or 1) > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise UsageError(f"--tensor-parallel-size {args.tensor_parallel_size}: there are {gpus} GPUs here")


def check_harness_cache(args: argparse.Namespace, source: Source) -> None:
    """Raise NotAvailable for --kv-cache-dtype fp8 if lm_eval runs the model with transformers."""
    if source.engine != "vllm" and args.kv_cache_dtype == "fp8":
        raise NotAvailable(
            "--kv-cache-dtype fp8: lm_eval with transformers keeps keys and values in the model's dtype. Use "
            "--engine vllm, or leave the flag out."
        )


def read_vllm_settings(args: argparse.Namespace, source: Source, longest: int, added: int = 1) -> VllmSettings | None:
    """Check the flags of vLLM; return its settings, or None with another engine.

    Args:
        args: the parsed flags.
        source: the model.
        longest: tokens of the longest prompt and its answer.
        added: tokens that a BOS or a chat template may add to them.

    Raises:
        UsageError: a flag of vLLM without --engine vllm, or vLLM would reject its value or the prompts.
    """
    check_vllm_flags(args, source)
    if source.engine != "vllm":
        return None
    length, positions = args.max_model_len, source.max_positions
    _check_length("--max-model-len", length, positions)
    if longest > (length or positions):
        raise too_long(longest, length or positions)
    # vLLM counts the last token of an answer, which has no position: nothing is predicted after it.
    return _make_settings(args, length or min(longest + added, positions + 1))


def read_harness_settings(args: argparse.Namespace, source: Source) -> VllmSettings | None:
    """Do the same for the task harness, whose --max-length is for both engines."""
    check_vllm_flags(args, source)
    check_harness_cache(args, source)
    if source.engine != "vllm":
        return None
    _check_length("--max-length", args.max_length, source.max_positions)
    return _make_settings(args, args.max_length)


def _check_length(flag: str, length: int | None, positions: int) -> None:
    if length and length > positions:
        raise UsageError(f"{flag} {length}: the model's max_position_embeddings is {positions}. Give at most that")


def _make_settings(args: argparse.Namespace, length: int | None) -> VllmSettings:
    gpus = args.tensor_parallel_size or 1
    return VllmSettings(
        length, gpus, args.gpu_memory_utilization, args.enforce_eager, args.batch_size, args.kv_cache_dtype
    )
