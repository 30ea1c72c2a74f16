"""Checks of --long-eval-*, the evaluation at long context lengths during training."""

from argparse import Namespace
from dataclasses import fields

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.config.options import LONG_EVAL_TASKS, LongEvalConfig
from megatron_cream.config.values import long_eval_tasks


def check(args: Namespace) -> None:
    """Raise UsageError if the long evaluation cannot run; call it after `fill`."""
    if args.long_eval_interval is None:
        for given in fields(LongEvalConfig):
            if getattr(args, given.name) != given.default:
                raise UsageError(f"{to_flag(given.name)} {getattr(args, given.name)}: only with --long-eval-interval")
        return
    for name in ("long_eval_interval", "long_eval_samples"):
        if getattr(args, name) < 1:
            raise UsageError(f"{to_flag(name)} {getattr(args, name)}: must be 1 or more")
    if not 0 < args.long_eval_share <= 1:
        raise UsageError(f"--long-eval-share {args.long_eval_share}: must be above 0 and at most 1")
    _check_tasks(args)
    for length in args.long_eval_lengths:
        if length < 2:
            raise UsageError(f"--long-eval-lengths {length}: must be 2 or more")
        if length > args.max_position_embeddings:
            raise UsageError(
                f"--long-eval-lengths {length}: beyond the {args.max_position_embeddings} positions of this run; "
                "give a smaller length, or a larger --target-length or --max-position-embeddings"
            )
    _check_best(args)


def _check_tasks(args: Namespace) -> None:
    for name in long_eval_tasks(args):
        if name not in LONG_EVAL_TASKS:
            raise UsageError(
                f"--long-eval-tasks {args.long_eval_tasks}: unknown task {name!r}; choose from "
                f"{', '.join(LONG_EVAL_TASKS)}"
            )
        if name != "perplexity" and args.tokenizer_type.startswith("Null"):
            raise UsageError(
                f"--long-eval-tasks {name}: --tokenizer-type {args.tokenizer_type} cannot encode text; use only "
                "perplexity"
            )


def _check_best(args: Namespace) -> None:
    best, names = args.long_eval_best, long_eval_tasks(args)
    if best == "none":
        return
    if (best == "perplexity" and "perplexity" not in names) or (best == "accuracy" and names == ("perplexity",)):
        raise UsageError(f"--long-eval-best {best}: --long-eval-tasks {args.long_eval_tasks} does not measure it")
    if args.skip_train:
        return
    if args.save is None:
        raise UsageError(
            "--save is missing: --long-eval-interval keeps the best checkpoint there; give it, or --long-eval-best none"
        )
