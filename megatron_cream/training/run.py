"""One training run: what is put in place around Megatron's trainer, and how each way of ending looks to the user."""

import contextlib
import os
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

from megatron_cream.checkpoint import after_save, checksums, optimizer_state, pretrained, saving, schedule, start
from megatron_cream.common import console
from megatron_cream.common.errors import (
    UsageError,
    is_dead_data_worker,
    is_full_shared_memory,
    is_lost_peer,
    one_line,
    reason,
)
from megatron_cream.common.files import lock_folder
from megatron_cream.config import parse, values
from megatron_cream.data.recent import RecentSamples
from megatron_cream.distributed import launcher, rendezvous, watchdog
from megatron_cream.model.attention import AttentionBackend
from megatron_cream.optimizer import finite
from megatron_cream.patches import corrections, cuda_graphs, table
from megatron_cream.training import evaluations, progress, record, signals
from megatron_cream.training.watch import watching

PROGRAM = "pretrain_cream.py"


@dataclass(frozen=True)
class Job:
    """What is trained, and on what.

    datasets: Megatron's provider of the training, validation and test data.
    forward_step: Megatron's forward step.
    recent_samples: what the data loader read last, to be named when a gradient is not finite.
    """

    datasets: Callable
    forward_step: Callable
    recent_samples: RecentSamples


def train(job: Job, argv: list[str] | None = None) -> Namespace:
    """Run one training, from flags to checkpoint.

    Args:
        job: what is trained, and on what.
        argv: the flags; None takes the command line's.

    Returns: what the flags came to.

    Raises:
        UsageError: the flags cannot run.
    """
    table.check_all()
    signals.install()
    args, words = parse.parse(argv)
    if message := start.finished_message(args):
        if args.rank == 0:
            print(message, flush=True)
        return args
    args.curr_iteration = 0  # until Megatron's training sets it, which --skip-train has none of
    _install_patches(args)
    with console.redirect_output(args.console, args.save) as terminal:
        print(words, end="")
        step_line = progress.StepLine(
            total_steps=args.train_iters or (args.train_samples or 0) // args.global_batch_size,
            tokens_per_step=args.global_batch_size * args.seq_length,
            ranks=args.world_size,
            flops_per_token=values.flops_per_token(args),
            stream=terminal,
        )

        def say(line: str) -> None:
            print(line, file=terminal, flush=True)

        saving.install(say, Path(args.save) if args.save else None)
        watch = evaluations.watch_from_flags(args, step_line) if args.long_eval_interval else None
        if args.save:
            rendezvous.check_on_all_ranks(lambda: _open_folder(args, argv), args.rank, args.world_size)
        if args.ckpt_format == "torch_dist":
            args.save_retain_interval = None  # `after_save` does it, in Megatron's place
        finite.install(args.nan_policy, lambda norm: _say_not_finite(norm, job.recent_samples, terminal))
        if args.rank == 0:
            say(f"attention: {AttentionBackend(**args.attention)}")
        with (
            signals.leaving(args, say),
            progress.each_step(step_line, args.log_interval),
            watching(watch, args),
            watchdog.watch(args.timeout_minutes),
        ):
            pretrain(
                pretrain_cfg_container_from_args(args, values.model_config(args)),
                job.datasets,
                ModelType.encoder_or_decoder,
                job.forward_step,
                non_loss_data_func=evaluations.perplexity_by_length(args, terminal) if args.eval_lengths else None,
                store=rendezvous.open_store(args.rank, args.world_size),
            )
    return args


def _install_patches(args: Namespace) -> None:
    corrections.apply(args)
    schedule.install()
    optimizer_state.install()
    if values.can_use_one_pass_optimizer(args):
        from megatron_cream.optimizer import one_pass  # imports Triton

        one_pass.install()
    if args.checkpoint_checksums:
        checksums.install()


def _open_folder(args: Namespace, argv: list[str] | None) -> None:
    """Make --save this run's own from here on, and write its first files."""
    if args.rank != 0:
        return
    try:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        lock_folder(Path(args.save), "--save")
        if not pretrained.uses_intermediate_folder(args):
            start.reject_other_run(args)  # one that had the folder until now
        pretrained.copy_model_files(args)
        record.write(args, sys.argv[1:] if argv is None else argv)
        loaded = start.find_checkpoint(args)
        after_save.install(args, loaded and loaded[1])
    except OSError as error:
        raise UsageError(f"--save {args.save}: {reason(error)}") from error


def _say_not_finite(norm: float, recent_samples: RecentSamples, terminal: TextIO) -> None:
    """On rank 0 that it is so, and on each data-parallel rank what it had read."""
    args = get_args()
    if args.rank == 0:
        done = "is left out" if args.nan_policy == "skip" else "stops the run"
        print(f"step {args.curr_iteration + 1}: the gradient's norm is {norm}: {done}", file=terminal, flush=True)
    if parallel_state.is_pipeline_first_stage():
        for line in recent_samples.lines(args.curr_iteration):
            print(f"step {args.curr_iteration + 1}, rank {args.rank}: {line}", file=terminal, flush=True)


# ------------------------------------------------------------------- the end of a run


def _is_port_in_use(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistNetworkError) and "EADDRINUSE" in str(error)


@dataclass(frozen=True)
class Ending:
    """How a run that failed ends.

    matches: whether the error is of this kind.
    message: the line, with {error} and {rank}; after the program's name.
    code: of the process.
    by: "rank 0", or another if rank 0 has not found it; "each" rank that meets it.
    at_once: without Python's own end, which could wait for ever, for NCCL's collectives, which other ranks never
        enter. torchrun ends those as soon as this one has ended.
    """

    matches: Callable[[BaseException], bool]
    message: str
    code: int
    by: str = "each"
    at_once: bool = False


def _of(*types: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, types)


ENDINGS = (
    Ending(_of(UsageError), "error: {error}", 2, by="rank 0"),
    Ending(_of(finite.NonFiniteError), "stopped: {error}", 1),
    Ending(_of(saving.SaveFailed), "error: {error}", 1, by="rank 0"),
    Ending(_is_port_in_use, "error: MASTER_PORT={port} in the environment: is taken; give another", 2),
    Ending(is_lost_peer, "rank {rank}: another rank is gone: {line}", 1, at_once=True),
    Ending(
        is_full_shared_memory,
        "error: rank {rank}: /dev/shm: No space left on device. Give it more (docker --shm-size), or have fewer "
        "processes: --num-workers 0, no --async-save",
        1,
        at_once=True,
    ),
    Ending(
        is_dead_data_worker,
        "error: rank {rank}: what loads its data is gone: {line} Is there memory, room in /dev/shm (docker "
        "--shm-size), and was no file of --data-path changed? Or --num-workers 0",
        1,
        at_once=True,
    ),
)
"""The first that matches; any other error is a bug, ends at once with its traceback, and has code 1."""

INTERRUPTED = 130


def main(train: Callable[[list[str] | None], Namespace]) -> int:
    """Run the command line, and return the exit code.

    Args:
        train: one training run from a list of flags, or from the command line's.
    """
    try:
        rank, ranks = launcher.get_rank_and_world_size()
    except UsageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    try:
        _run(train)
        return 0
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _end(error, rank, ranks)
    finally:
        after_save.close()


def _run(train: Callable[[list[str] | None], Namespace]) -> None:
    if len(sys.argv) == 1:
        from megatron_cream.training.quickstart import quickstart

        quickstart(train)
        finished = None
    else:
        finished = train(None)
    # Rank 0 may write for long: no other waits for it in a collective.
    if torch.distributed.is_initialized():
        cuda_graphs.reset_graphs()
        torch.distributed.destroy_process_group()
    if finished:
        pretrained.save_hf(finished)


def _end(error: Exception, rank: int, ranks: int) -> int:
    """Say why the run ends, and return its exit code, or end the process at once."""
    ending = next((kind for kind in ENDINGS if kind.matches(error)), None)
    if ending is None:
        sys.excepthook(type(error), error, error.__traceback__)
    else:
        port = os.environ.get("MASTER_PORT")
        words = ending.message.format(error=error, rank=rank, line=one_line(error), port=port)
        if ending.by == "rank 0":
            rendezvous.print_once(f"{PROGRAM}: {words}", rank, ranks)
        else:
            print(f"{PROGRAM}: {words}", file=sys.stderr)
    if ending is None or ending.at_once:
        after_save.close()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1 if ending is None else ending.code)
    return ending.code
