"""Extend a Llama's context window with CREAM, on NVIDIA Megatron.

The embedded default: a tiny Llama and text that is already on this machine, CPU or GPU:

    torchrun --nproc_per_node=2 pretrain_cream.py

A recipe, and any flag of Megatron's or ours on top of it (--help lists them all):

    torchrun --nproc_per_node=2 pretrain_cream.py --config examples/llama2_7b_32k.yaml --data-path data/pile ...

What would run, without running it:

    python pretrain_cream.py --config examples/llama2_7b_32k.yaml --print-config
"""

import sys

if sys.version_info < (3, 12):
    sys.exit(f"megatron_cream needs Python 3.12 or newer; this is Python {sys.version.split()[0]}")

from megatron_cream.common import entry

if __name__ == "__main__":
    entry.start()  # before the imports, which take seconds

from megatron_cream.common import processes
from megatron_cream.distributed import launcher

if __name__ == "__mp_main__":  # the writer of --async-save, which imports this first
    processes.end_with_parent()
else:
    launcher.follow()

from megatron_cream.patches import platform

platform.setup()  # before anything of Megatron is imported

import functools
import os
from argparse import Namespace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.utils import is_last_rank

from megatron_cream.checkpoint import after_save, checksums, optimizer_state, pretrained, saving, schedule, start
from megatron_cream.checkpoint.best import BestCheckpoint
from megatron_cream.common import console
from megatron_cream.common.errors import (
    UsageError,
    is_dead_data_worker,
    is_full_shared_memory,
    is_lost_peer,
    one_line,
    reason,
)
from megatron_cream.common.files import append_line, hold, to_json
from megatron_cream.config import parse
from megatron_cream.config.checks import evaluation as evaluation_checks
from megatron_cream.data.dataset import LongDocumentDataset
from megatron_cream.data.recent import RecentSamples
from megatron_cream.distributed import rendezvous, watchdog
from megatron_cream.evaluation.long_evaluation import LongEvaluation
from megatron_cream.evaluation.models.tokenizer import TrainingTokenizer
from megatron_cream.evaluation.perplexity import held_out_documents, perplexity_by_length
from megatron_cream.model.attention import AttentionBackend
from megatron_cream.optimizer import finite
from megatron_cream.patches import compat
from megatron_cream.training import progress, record, signals
from megatron_cream.training.watch import Watch, loaded_from, watching

recent_samples = RecentSamples()


def get_batch(data_iterator, samples: int) -> dict[str, torch.Tensor]:
    """The next micro-batch of this rank, [samples, n / context_parallel_size] each.

    Every pipeline stage gets one, since rotary needs `position_ids` in every layer. Where tensor-parallel ranks share
    it, the first sends it in one piece of known size: `broadcast_data` of Megatron sends the sizes first and waits for
    the device to read them, at every micro-batch.
    """
    names = ["tokens", "labels", "loss_mask", "position_ids"]
    packed = None
    if data_iterator is not None:
        data = {name: tensor.long() for name, tensor in next(data_iterator).items()}
        recent_samples.add(get_args().curr_iteration, data)
        packed = torch.stack([data[name].cuda(non_blocking=True) for name in names])
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        shape = (len(names), samples, get_args().seq_length)
        packed = torch.empty(shape, dtype=torch.long, device="cuda") if packed is None else packed.view(shape)
        torch.distributed.broadcast(packed, group=parallel_state.get_tensor_model_parallel_group(), group_src=0)
    batch = dict(zip(names, packed, strict=True))
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor):
    """The summed loss of a micro-batch, its number of tokens, and both to report.

    Args:
        loss_mask: [b, n], 1 where a token counts.
        losses: float32 [b, n], each token's cross-entropy.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(  # once: each look at the loss waits for the device
            result=loss,
            rejection_func=lambda value: not torch.isfinite(value),
            message="found NaN or Inf in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )
    num_tokens = mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def forward_step(data_iterator, model):
    """One micro-batch through this rank's part of the model."""
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, args.micro_batch_size if model.training else args.eval_micro_batch_size)
    timers("batch-generator").stop()
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, functools.partial(loss_func, batch["loss_mask"])


def train_valid_test_datasets_provider(train_val_test_num_samples, vp_stage=None):
    """Built on the first tensor-parallel rank of every pipeline stage."""
    args, (train, valid, test) = get_args(), train_val_test_num_samples
    if args.start_eval_at_iter and valid is not None:
        valid += args.eval_iters * args.eval_global_batch_size  # Megatron 0.19 forgets the evaluation at that very step
    # An earlier start may have had larger batches, and has evaluated, perhaps more often than these flags say.
    if train and args.train_iters:
        left = max(args.train_iters - args.iteration, 0) * args.global_batch_size
        train = max(train, args.consumed_train_samples + left)
    counts = [train, valid + args.consumed_valid_samples if valid else valid, test]
    datasets = BlendedMegatronDatasetBuilder(
        LongDocumentDataset,
        counts,
        lambda: parallel_state.get_tensor_model_parallel_rank() == 0,
        parse.dataset_config(args, get_tokenizer()),
    ).build()
    # Megatron's samplers take no empty data set, which --eval-iters 0 asks for.
    return [None if count == 0 else data for data, count in zip(datasets, counts, strict=True)]


train_valid_test_datasets_provider.is_distributed = True


def train(argv: list[str] | None = None) -> Namespace:
    """One training run, from flags to checkpoint.

    Args:
        argv: the flags; None takes the command line's.

    Returns: what the flags came to.

    Raises:
        UsageError: the flags cannot run.
    """
    signals.install()
    args, words = parse.parse(argv)
    if said := start.finished_message(args):
        if args.rank == 0:
            print(said, flush=True)
        return args
    args.curr_iteration = 0  # until Megatron's training sets it, which --skip-train has none of
    compat.apply(args)
    schedule.install()
    optimizer_state.install()
    if parse.one_pass_optimizer(args):
        from megatron_cream.optimizer import one_pass

        one_pass.install()
    if args.checkpoint_checksums:
        checksums.install()
    with console.divert(args.console, args.save) as terminal:
        print(words, end="")
        step_line = progress.StepLine(
            total_steps=args.train_iters or (args.train_samples or 0) // args.global_batch_size,
            tokens_per_step=args.global_batch_size * args.seq_length,
            ranks=args.world_size,
            flops_per_token=parse.flops_per_token(args),
            stream=terminal,
        )

        def say(line: str) -> None:
            print(line, file=terminal, flush=True)

        saving.install(say, Path(args.save) if args.save else None)
        watch = _watch(args, step_line) if args.long_eval_interval else None
        if args.save:
            rendezvous.agree(lambda: _open_folder(args, argv), args.rank, args.world_size)
        if args.ckpt_format == "torch_dist":
            args.save_retain_interval = None  # `after_save` does it, in Megatron's place
        finite.install(args.nan_policy, lambda norm: _say_not_finite(norm, terminal))
        if args.rank == 0:
            print(f"attention: {AttentionBackend(**args.attention)}", file=terminal, flush=True)
        with (
            signals.leaving(args, say),
            progress.each_step(step_line, args.log_interval),
            watching(watch, args),
            watchdog.watching(args.timeout_minutes),
        ):
            pretrain(
                pretrain_cfg_container_from_args(args, parse.model_config(args)),
                train_valid_test_datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
                non_loss_data_func=_perplexity_at_evaluations(args, terminal) if args.eval_lengths else None,
                store=rendezvous.common_store(args.rank, args.world_size),
            )
    return args


def _open_folder(args: Namespace, argv: list[str] | None) -> None:
    """--save is this run's own from here on; its first files."""
    if args.rank != 0:
        return
    try:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        hold(Path(args.save), "--save")
        if not pretrained.is_between(args):
            start.refuse_another_run(args)  # one that had the folder until now
        pretrained.carry(args)
        record.write(args, sys.argv[1:] if argv is None else argv)
        loaded = start.source(args)
        after_save.install(args, loaded and loaded[1])
    except OSError as error:
        raise UsageError(f"--save {args.save}: {reason(error)}") from error


def _say_not_finite(norm: float, terminal) -> None:
    """On rank 0 that it is so, and on each data-parallel rank what it had read."""
    args = get_args()
    if args.rank == 0:
        done = "is left out" if args.nan_policy == "skip" else "stops the run"
        print(f"step {args.curr_iteration + 1}: the gradient's norm is {norm}: {done}", file=terminal, flush=True)
    if parallel_state.is_pipeline_first_stage():
        for line in recent_samples.lines(args.curr_iteration):
            print(f"step {args.curr_iteration + 1}, rank {args.rank}: {line}", file=terminal, flush=True)


def _watch(args, step_line: progress.StepLine) -> Watch:
    """The evaluation at the target lengths, --long-eval-interval."""
    names, lengths, best = evaluation_checks.tasks(args), args.long_eval_lengths, None
    evaluation = LongEvaluation(
        TrainingTokenizer(get_tokenizer()) if names != ("perplexity",) else None,
        tasks=names,
        lengths=lengths,
        samples=args.long_eval_samples,
        held_out=parse.held_out_files(args) if "perplexity" in names else [],
    )
    score = None if args.long_eval_best == "none" else args.long_eval_best
    if score and not args.skip_train:
        settings = dict(tasks=",".join(names), lengths=lengths, samples=args.long_eval_samples, best=score)
        best = BestCheckpoint(Path(args.save), settings, clean=args.rank == 0)
    return Watch(
        evaluation,
        interval=args.long_eval_interval,
        last_step=step_line.total_steps,
        share=args.long_eval_share,
        score=score,
        best=best,
        folder=Path(args.save) if args.save else None,
        step_line=step_line,
    )


def _perplexity_at_evaluations(args, terminal):
    """What Megatron calls at the end of every evaluation, with the model: perplexity by length."""
    longest = max(args.eval_lengths)
    documents = held_out_documents(parse.held_out_files(args), longest, args.eval_documents)

    def evaluate(model) -> None:
        scored = min(args.eval_lengths) // 2
        result = perplexity_by_length(model, documents, args.eval_lengths, scored)
        if args.skip_train:
            finite.check_values(result.values(), loaded_from(args))
        if not is_last_rank():
            return
        iteration = args.iteration if args.skip_train else args.curr_iteration + 1
        text = ", ".join(f"{n}: {value:.2f}" for n, value in result.items())
        print(f"perplexity by context length | {text}", file=terminal, flush=True)
        progress.log_values({f"perplexity/{n}": value for n, value in result.items()}, iteration)
        if args.save:
            record = dict(iteration=iteration, documents=len(documents), perplexity=result)
            append_line(Path(args.save) / "perplexity_by_length.jsonl", to_json(record))

    return evaluate


def main() -> int:
    try:
        rank, ranks = launcher.ranks()
    except UsageError as error:
        print(f"pretrain_cream.py: error: {error}", file=sys.stderr)
        return 2
    try:
        if len(sys.argv) == 1:
            from megatron_cream.training.quickstart import quickstart

            quickstart(train)
            finished = None
        else:
            finished = train()
        # Rank 0 may write for long: no other waits for it in a collective.
        if torch.distributed.is_initialized():
            compat.end_cuda_graphs()
            torch.distributed.destroy_process_group()
        if finished:
            pretrained.save_hf(finished)
    except UsageError as error:
        rendezvous.say_once(f"pretrain_cream.py: error: {error}", rank, ranks)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print("pretrain_cream.py: interrupted", file=sys.stderr)
        return 130
    except finite.NotFinite as error:
        print(f"pretrain_cream.py: stopped: {error}", file=sys.stderr)
        return 1
    except saving.SaveFailed as error:
        rendezvous.say_once(f"pretrain_cream.py: error: {error}", rank, ranks)
        return 1
    except Exception as error:
        if isinstance(error, torch.distributed.DistNetworkError) and "EADDRINUSE" in str(error):
            port = os.environ["MASTER_PORT"]
            print(
                f"pretrain_cream.py: error: MASTER_PORT={port} in the environment: is taken; give another",
                file=sys.stderr,
            )
            return 2
        # Memory that ran out, say. Python's own end could wait for ever, for NCCL's collectives, which other ranks
        # never enter. torchrun ends those as soon as this one has ended.
        if is_lost_peer(error):
            print(f"pretrain_cream.py: rank {rank}: another rank is gone: {one_line(error)}", file=sys.stderr)
        elif is_full_shared_memory(error):
            print(
                f"pretrain_cream.py: error: rank {rank}: /dev/shm: No space left on device. Give it more (docker "
                "--shm-size), or have fewer processes: --num-workers 0, no --async-save",
                file=sys.stderr,
            )
        elif is_dead_data_worker(error):
            print(
                f"pretrain_cream.py: error: rank {rank}: what loads its data is gone: {one_line(error)} Is there "
                "memory, room in /dev/shm (docker --shm-size), and was no file of --data-path changed? "
                "Or --num-workers 0",
                file=sys.stderr,
            )
        else:
            sys.excepthook(*sys.exc_info())
        after_save.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    finally:
        after_save.close()
    return 0


if __name__ == "__main__":
    entry.run(main)
