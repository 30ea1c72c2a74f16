"""One training run: the setup around Megatron's trainer, and the reports of failures."""

import contextlib
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_cream.checkpoint import (
    after_save,
    checksums,
    optimizer_shards,
    optimizer_state,
    pretrained,
    saving,
    schedule,
    staging,
    start,
)
from megatron_cream.common import console, entry
from megatron_cream.common.errors import (
    OtherWeights,
    UsageError,
    is_dead_data_worker,
    is_full_shared_memory,
    is_lost_peer,
    is_out_of_memory,
    one_line,
    reason,
)
from megatron_cream.common.files import lock_folder
from megatron_cream.config import parse, values
from megatron_cream.config.expected import Expected
from megatron_cream.data.recent import RecentSamples
from megatron_cream.data.usage import Usage
from megatron_cream.distributed import launcher, rendezvous, watchdog
from megatron_cream.optimizer import finite, lora_plus
from megatron_cream.patches import cuda_graphs, install_all, table
from megatron_cream.training import evaluations, out_of_memory, progress, record, signals, summary
from megatron_cream.training.watch import evaluate_during_training

PROGRAM = "pretrain_cream.py"


@dataclass(frozen=True)
class Job:
    """The functions of a training, as Megatron's `pretrain` takes them.

    datasets: provides the training, validation and test data.
    forward_step: computes the loss of one micro-batch.
    recent_samples: the samples that the data loader read last, named in the log when a gradient is not finite.
    choose_graphs: returns why the run should use CUDA graphs though no flag says so, or None, from the flags as given
        and as checked.
    predict: returns what the planner expects of the run, or None, from the flags as given and as checked.
    usage: describes the data that was used of each source, at the end.
    """

    datasets: Callable
    forward_step: Callable
    recent_samples: RecentSamples
    choose_graphs: parse.GraphChoice
    predict: Callable[[list[str], Namespace], Expected | None]
    usage: Usage


def train(job: Job, argv: list[str] | None = None) -> Namespace:
    """Run one training, from flags to checkpoint.

    Args:
        job: data and forward step.
        argv: the flags; None takes those of the command line.

    Returns: the flags after all checks, with defaults filled in.

    Raises:
        UsageError: the flags are wrong, or a file that they name is.
    """
    table.check_all()
    signals.install()
    parsed = parse.parse(argv, job.choose_graphs)
    args, origin, data, model = parsed.args, parsed.origin, parsed.data, parsed.model
    if message := summary.finished_message(args, origin):
        if args.rank == 0:
            print(message, flush=True)
        return args
    args.curr_iteration = 0  # Megatron sets it in training, which --skip-train leaves out
    _install_patches(args)
    flops = values.flops_per_token(args, data, model.lora)
    with console.redirect_output(args.console, args.save) as terminal:
        print(parsed.output if args.console == "progress" else _shorten(parsed.output), end="")
        step_line = progress.StepLine(
            total_steps=values.count_steps(args),
            tokens_per_step=args.global_batch_size * args.seq_length,
            ranks=args.world_size,
            flops_per_token=flops,
            stream=terminal,
        )

        def say(line: str) -> None:
            print(line, file=terminal, flush=True)

        saving.install(say, Path(args.save) if args.save else None)
        if args.async_save:
            staging.install(
                in_background=not args.optimizer_cuda_graph, in_first_step=values.is_async_save_size_known(args)
            )
        watch = evaluations.build_watch(args, data, step_line) if args.long_eval_interval else None
        if args.save:
            with rendezvous.share_errors():
                _open_folder(args, origin, argv)
        if args.ckpt_format == "torch_dist":
            args.save_retain_interval = None  # `after_save` deletes old checkpoints instead of Megatron
        finite.install(args.nan_policy, lambda norm: _log_non_finite(norm, job.recent_samples, terminal))
        if args.rank == 0:
            expected = job.predict(sys.argv[1:] if argv is None else argv, args)
            say(summary.describe_run(args, origin, data, model.lora, expected, parsed.graphs))
        perplexity = None
        if args.eval_lengths:
            perplexity = evaluations.build_perplexity_callback(args, data, origin.weights, terminal)
        with (
            signals.exit_on_signal(args, say),
            progress.print_steps(step_line, args.log_interval),
            evaluate_during_training(watch, args, origin.weights),
            watchdog.watch(args.timeout_minutes),
        ):
            pretrain(
                pretrain_cfg_container_from_args(args, model),
                job.datasets,
                ModelType.encoder_or_decoder,
                job.forward_step,
                non_loss_data_func=perplexity,
                store=rendezvous.open_store(),
            )
        if args.rank == 0 and not args.skip_train and args.dataloader_type == "single":
            for line in job.usage.describe_sources(args.consumed_train_samples):
                say(f"used    {line}")
    return args


def _shorten(words: str) -> str:
    """Remove Megatron's list of 800 arguments and its note on NVIDIA's one_logger.

    runs/TIME.yaml in --save has the arguments.
    """
    words = re.sub(r"^-+ arguments -+\n.*?^-+ end of arguments -+\n", "", words, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^WARNING: one_logger package is required .*\n", "", words, flags=re.MULTILINE)


def _install_patches(args: Namespace) -> None:
    """Install the replacements of Megatron's functions that this run needs."""
    install_all.install(args)
    schedule.install()
    optimizer_state.install()
    optimizer_shards.install()
    lora_plus.install(args.lora_plus_ratio)
    if values.can_use_one_pass_optimizer(args):
        from megatron_cream.optimizer import one_pass  # imports Triton

        one_pass.install()
    if args.checkpoint_checksums:
        checksums.install()


def _open_folder(args: Namespace, origin: start.Origin, argv: list[str] | None) -> None:
    """Create and lock --save on rank 0, and write its first files."""
    if args.rank != 0:
        return
    folder = Path(args.save)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder, "--save")
        start.reject_other_run(origin.flags)  # it may have saved before the lock was taken
        record.write(args, sys.argv[1:] if argv is None else argv)
        pretrained.copy_model_files(args, is_new=not origin.continues_save)
        loaded = start.find_checkpoint(origin.flags)
        after_save.install(args, loaded and loaded[1])
    except OSError as error:
        raise UsageError(f"--save {args.save}: {reason(error)}") from error


def _log_non_finite(norm: float, recent_samples: RecentSamples, terminal: TextIO) -> None:
    """Log the gradient norm on rank 0, and the last samples on each data-parallel rank."""
    args = get_args()
    if args.rank == 0:
        action = "the step is skipped" if args.nan_policy == "skip" else "the run stops"
        print(f"step {args.curr_iteration + 1}: the gradient's norm is {norm}: {action}", file=terminal, flush=True)
    if parallel_state.is_pipeline_first_stage():
        for line in recent_samples.lines(args.curr_iteration):
            print(f"step {args.curr_iteration + 1}, rank {args.rank}: {line}", file=terminal, flush=True)


# ------------------------------------------------------------------- the end of a run


def _is_port_in_use(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistNetworkError) and "EADDRINUSE" in str(error)


@dataclass(frozen=True)
class Ending:
    """The message and exit code of one kind of failure.

    matches: returns whether an error is of this kind.
    message: the line after the program's name, which may contain {error}, {line}, {rank} and {port}; or a function of
        error and rank that returns it.
    code: exit code of the process.
    by: who prints it: "rank 0" (or another rank, if rank 0 has not failed), or "each" rank that fails.
    at_once: exit without Python's own cleanup, which can hang in NCCL collectives that other ranks never enter.
        torchrun then ends the other ranks.
    """

    matches: Callable[[BaseException], bool]
    message: str | Callable[[BaseException, int], str]
    code: int
    by: str = "each"
    at_once: bool = False


def _of(*types: type[BaseException]) -> Callable[[BaseException], bool]:
    """Return a function that tells whether an error is of one of these types."""
    return lambda error: isinstance(error, types)


ENDINGS = (
    Ending(_of(OtherWeights), "error: rank {rank}: {error}", 2, at_once=True),
    Ending(_of(UsageError), "error: {error}", 2, by="rank 0"),
    Ending(_of(finite.NonFiniteError), "stopped: {error}", 1),
    Ending(_of(saving.SaveFailed), "error: {error}", 1, by="rank 0"),
    Ending(_is_port_in_use, "error: MASTER_PORT={port} in the environment: the port is in use. Set another", 2),
    Ending(is_lost_peer, "rank {rank}: lost a peer rank: {line}", 1, at_once=True),
    Ending(
        is_full_shared_memory,
        "error: rank {rank}: /dev/shm: No space left on device. Make it larger (docker --shm-size), or use fewer "
        "processes: --num-workers 0, no --async-save",
        1,
        at_once=True,
    ),
    Ending(
        is_dead_data_worker,
        "error: rank {rank}: a data loader worker died: {line}. Check free memory, room in /dev/shm (docker "
        "--shm-size), and that no file of --data-path changed; or use --num-workers 0",
        1,
        at_once=True,
    ),
    Ending(is_out_of_memory, out_of_memory.describe, 1, at_once=True),
)
"""The first match is used. Any other error is a bug: the process exits at once with a traceback and code 1."""


def main(train: Callable[[list[str] | None], Namespace]) -> int:
    """Run the command line, and return the exit code.

    Args:
        train: runs one training from a list of flags; from None, with the flags of the command line.
    """
    try:
        rank, _ = launcher.get_rank_and_world_size()
    except UsageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    try:
        _run(train)
        return 0
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return entry.INTERRUPTED
    except Exception as error:
        return _end(error, rank)
    finally:
        after_save.close()


def _run(train: Callable[[list[str] | None], Namespace]) -> None:
    """Run the quickstart (without flags) or one training, export, and print the next command."""
    if len(sys.argv) == 1:
        from megatron_cream.training.quickstart import quickstart

        quickstart(train)
        finished = None
    else:
        finished = train(None)
    # Rank 0 may write for a long time; without a process group no other rank times out waiting for it.
    if torch.distributed.is_initialized():
        cuda_graphs.reset_graphs()
        torch.distributed.destroy_process_group()
    if finished:
        pretrained.save_hf(finished)
    if finished and finished.rank == 0 and (command := summary.next_command(finished)):
        print(f"Next: {command}", flush=True)


def _format_message(ending: Ending, error: Exception, rank: int) -> str:
    if not isinstance(ending.message, str):
        return ending.message(error, rank)
    port = os.environ.get("MASTER_PORT")
    return ending.message.format(error=error, rank=rank, line=one_line(error).rstrip("."), port=port)


def _end(error: Exception, rank: int) -> int:
    """Print why the run ends, and return its exit code or exit at once."""
    ending = next((kind for kind in ENDINGS if kind.matches(error)), None)
    if ending is None:
        sys.excepthook(type(error), error, error.__traceback__)
    else:
        words = _format_message(ending, error, rank)
        if ending.by == "rank 0":
            rendezvous.print_once(f"{PROGRAM}: {words}")
        else:
            print(f"{PROGRAM}: {words}", file=sys.stderr)
    if ending is None or ending.at_once:
        after_save.close()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1 if ending is None else ending.code)
    return ending.code
