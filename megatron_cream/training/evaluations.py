"""Evaluations during training: at target lengths, and perplexity at --eval-lengths."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from megatron.training import get_tokenizer
from megatron.training.utils import is_last_rank

from megatron_cream.checkpoint import base_weights
from megatron_cream.checkpoint.best import BestCheckpoint
from megatron_cream.common.files import append_line, to_json
from megatron_cream.config import values
from megatron_cream.config.run_data import RunData
from megatron_cream.evaluation import perplexity
from megatron_cream.evaluation.long_evaluation import LongEvaluation, Settings
from megatron_cream.evaluation.models.tokenizer import TrainingTokenizer
from megatron_cream.optimizer import finite
from megatron_cream.training import progress
from megatron_cream.training.watch import Watch


def build_watch(args: Namespace, data: RunData, step_line: progress.StepLine) -> Watch:
    """Build the evaluation at the target lengths (--long-eval-interval)."""
    settings = Settings(
        tasks=values.long_eval_tasks(args),
        lengths=args.long_eval_lengths,
        samples=args.long_eval_samples,
        held_out=data.held_out,
        interval=args.long_eval_interval,
        share=args.long_eval_share,
        score=None if args.long_eval_best == "none" else args.long_eval_best,
        folder=Path(args.save) if args.save else None,
    )
    tokenizer = TrainingTokenizer(get_tokenizer()) if settings.tasks != ("perplexity",) else None
    evaluation, best = LongEvaluation(tokenizer, settings), None
    if settings.score and settings.folder and not args.skip_train:
        base = base_weights.folder_of(args.lora_base)
        best = BestCheckpoint(settings.folder, settings.describe(), clean=args.rank == 0, base=base)
    return Watch(evaluation, settings, best, step_line)


def build_perplexity_callback(args: Namespace, data: RunData, weights: str, terminal: TextIO) -> Callable:
    """Return the function that Megatron calls with the model at the end of every evaluation.

    Args:
        args: Megatron's.
        data: the data of the run.
        weights: the flag and value that name the run's weights, for messages.
        terminal: the stream that gets the results.
    """
    folder = Path(args.save) if args.save else None
    longest = max(args.eval_lengths)
    documents = perplexity.read_held_out_documents(data.held_out, longest, args.eval_documents)

    def evaluate(model) -> None:
        scored = min(args.eval_lengths) // 2
        result = perplexity.measure_perplexity(model, documents, args.eval_lengths, scored)
        if args.skip_train:
            finite.check_values(result.values(), weights)
        if not is_last_rank():
            return
        iteration = args.iteration if args.skip_train else args.curr_iteration + 1
        text = ", ".join(f"{n}: {value:.2f}" for n, value in result.items())
        print(f"perplexity by context length | {text}", file=terminal, flush=True)
        progress.log_values({f"perplexity/{n}": value for n, value in result.items()}, iteration)
        if folder:
            record = dict(iteration=iteration, documents=len(documents), perplexity=result)
            append_line(folder / "perplexity_by_length.jsonl", to_json(record))

    return evaluate
