"""Flags of the evaluation at long lengths inside a training job: --long-eval-*."""

from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Literal

from megatron_cream.common.errors import UsageError

TASKS = ("needle", "kv", "perplexity")


@dataclass
class LongEvalConfig:
    """Watching a run at its target lengths."""

    long_eval_interval: int | None = None
    """Evaluate at the target lengths every so many steps, and at the last. Default: not at all."""

    long_eval_tasks: str = "needle,kv"
    """Of needle, kv (retrieval by teacher forcing) and perplexity (of held-out documents), with commas between."""

    long_eval_lengths: list[int] | None = field(default=None)
    """Context lengths, in tokens. Default: --target-length."""

    long_eval_samples: int = 2
    """Prompts of a task at each length, for each of five depths; of perplexity five times as many documents."""

    long_eval_share: float = 0.1
    """Of the run's time, what this may take, 0 to 1, best checkpoints included: an evaluation beyond is left out."""

    long_eval_best: Literal["accuracy", "perplexity", "none"] | None = None
    """Keep the best checkpoint in best/ of --save by the mean accuracy of needle and kv, or the mean perplexity.
    Default: accuracy where one of them is run, else perplexity."""


def fill(args: Namespace) -> None:
    """What follows from other flags: lengths, and what picks the best."""
    if args.long_eval_interval is None:
        return
    args.long_eval_lengths = sorted(set(args.long_eval_lengths or [args.target_length]))
    if args.long_eval_best is None:
        args.long_eval_best = "perplexity" if tasks(args) == ("perplexity",) else "accuracy"


def tasks(args: Namespace) -> tuple[str, ...]:
    """The names in --long-eval-tasks, once each."""
    return tuple(dict.fromkeys(name.strip() for name in args.long_eval_tasks.split(",")))


def check(args: Namespace) -> None:
    """Raises UsageError at what cannot run. After `fill`."""
    if args.long_eval_interval is None:
        for given in fields(LongEvalConfig):
            if getattr(args, given.name) != given.default:
                flag = "--" + given.name.replace("_", "-")
                raise UsageError(f"{flag} {getattr(args, given.name)}: only with --long-eval-interval")
        return
    for name in ("long_eval_interval", "long_eval_samples"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if not 0 < args.long_eval_share <= 1:
        raise UsageError(f"--long-eval-share {args.long_eval_share}: must be above 0 and at most 1")
    _check_tasks(args)
    for length in args.long_eval_lengths:
        if length < 2:
            raise UsageError(f"--long-eval-lengths {length}: must be 2 or more")
        if length > args.max_position_embeddings:
            raise UsageError(
                f"--long-eval-lengths {length}: beyond the {args.max_position_embeddings} positions of this run; "
                "give less, or a larger --target-length or --max-position-embeddings"
            )
    _check_best(args)


def _check_tasks(args: Namespace) -> None:
    for name in tasks(args):
        if name not in TASKS:
            raise UsageError(f"--long-eval-tasks {args.long_eval_tasks}: {name!r} is none of {', '.join(TASKS)}")
        if name != "perplexity" and args.tokenizer_type.startswith("Null"):
            raise UsageError(
                f"--long-eval-tasks {name}: --tokenizer-type {args.tokenizer_type} reads no text; take perplexity alone"
            )


def _check_best(args: Namespace) -> None:
    best, names = args.long_eval_best, tasks(args)
    if best == "none":
        return
    if best == "perplexity" and "perplexity" not in names or best == "accuracy" and names == ("perplexity",):
        raise UsageError(f"--long-eval-best {best}: --long-eval-tasks {args.long_eval_tasks} does not measure it")
    if args.skip_train:
        return
    if args.save is None:
        raise UsageError(
            "--save is missing: --long-eval-interval keeps the best checkpoint there; or take --long-eval-best none"
        )
