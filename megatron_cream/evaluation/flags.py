"""The flags of tools/evaluate.py."""

import argparse
import math

from megatron_cream.checkpoint.convert import DTYPES
from megatron_cream.common.cli import OneLineParser, path, path_or_name, positive, program_name
from megatron_cream.evaluation.models.language_model import ENGINES
from megatron_cream.evaluation.tasks import needle
from megatron_cream.evaluation.tasks.ruler import suite as ruler


def build_parser(description: str) -> argparse.ArgumentParser:
    """Of all tasks; `command` is the task's name. A fault is one line and exit code 2."""
    main_parser = OneLineParser(
        prog=program_name(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    commands = main_parser.add_subparsers(required=True, metavar="TASK", dest="command")

    def command(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        about = f"{summary[0].upper()}{summary[1:]}. {details}"
        return commands.add_parser(
            name, help=summary, description=about, allow_abbrev=False, formatter_class=_WithDefaults
        )

    added = command(
        "perplexity", "perplexity by context length, and LongPPL",
        "Each token of a document is scored once, by a window of the context length that moves on by --stride. "
        "LongPPL (arXiv 2410.23771) is the perplexity of the tokens that a long context makes likelier.",
    )  # fmt: skip
    add = added.add_argument
    add("--dataset", type=path, nargs="+", required=True, help=".jsonl, .txt (also .gz) or .parquet files, or folders")
    add("--json-key", default="text", help="key of the text in a record")
    _add_lengths(add)
    add("--stride", type=positive, default=256, help="tokens that a window moves on by")
    add("--documents", type=positive, default=50, help="the first so many that are long enough")
    add("--min-tokens", type=positive, help="of a document; by default the longest of --lengths")
    add("--longppl", action=argparse.BooleanOptionalAction, help="by default if --lengths go beyond --short-context")
    add("--short-context", type=positive, default=4096, help="LongPPL: tokens of the short context")
    add("--short-block", type=positive, default=1024, help="LongPPL: tokens that share a short context")
    add("--alpha", type=_finite, default=2.0, help="LongPPL: a key token's gain by the long context is above this")
    add("--beta", type=_finite, default=-2.0, help="LongPPL: and its log-probability with it is above this")
    about = "LongPPL: another model that tells the key tokens"
    add("--key-token-model", type=path_or_name, metavar="MODEL", help=about)
    _add_prefill(added)

    added = command(
        "needle", "needle in a haystack: one fact in long text, by length and depth",
        "The defaults are the grid of CREAM's paper: 10 lengths by 6 depths.",
    )  # fmt: skip
    add = added.add_argument
    add("--min-length", type=positive, default=1024, help="tokens of prompt and answer together")
    add("--max-length", type=positive, help="by default what the model has positions for")
    add("--length-steps", type=positive, default=10, help="lengths, evenly from the shortest to the longest")
    add("--depth-steps", type=positive, default=6, help="depths, evenly from the start to the end")
    add("--needle", choices=needle.KINDS, default="number", help="a random number of a city, or the published sandwich")
    _add_haystack(add)
    _add_generation(added, samples=5, of="cell")

    added = command("lines", "LongChat-Lines: the number on one of many lines")
    add = added.add_argument
    _add_lengths(add)
    count = dict(type=positive, nargs="+", action=_Ascending, default=[], metavar="N")
    add("--lines", **count, help="numbers of lines, in place of lengths")
    add("--data", type=path, nargs="+", default=[], help="LongEval's published N_lines.jsonl files, in place of those")
    _add_generation(added, samples=50, of="length or file")

    added = command("kv", "key-value retrieval of Lost in the Middle, by the place of the gold pair")
    add = added.add_argument
    add("--keys", **count, help="numbers of pairs (default: 75 140)")
    _add_lengths(add, default="none")
    places = "places of the gold pair, from 0; with --keys or --data"
    add("--gold", type=int, nargs="+", action=_Ascending, metavar="PLACE", help=places)
    add("--data", type=path, nargs="+", default=[], help="published kv-retrieval-N_keys.jsonl.gz files, in their place")
    _add_generation(added, samples=50, of="place")

    added = command(
        "ruler", "RULER's 13 tasks, and the effective length",
        f"The effective length is the longest up to which the mean over tasks is at least {ruler.THRESHOLD} percent.",
    )  # fmt: skip
    add = added.add_argument
    _add_lengths(add)
    add("--tasks", nargs="+", choices=ruler.TASKS, metavar="NAME", help=f"of {', '.join(ruler.TASKS)}; default: all")
    _add_haystack(add)
    add("--squad", type=path, help="dev-v2.0.json, for qa_1, which is left out without it")
    add("--hotpotqa", type=path, help="hotpot_dev_distractor_v1.json, for qa_2, which is left out without it")
    _add_generation(added, samples=50, of="task and length (500 in the paper)")

    added = command("longbench", "LongBench's 21 data sets, which you have downloaded")
    add = added.add_argument
    add("--data", type=path, required=True, help="folder with NAME.jsonl files, or data.zip")
    add("--length", type=positive, help="longer prompts lose their middle; default: the model's positions")
    add("--datasets", nargs="+", metavar="NAME", help="default: all that are there")
    _add_generation(added, samples=None, of="data set at most, all by default")

    added = command(
        "harness", "tasks of EleutherAI's lm-evaluation-harness (pip install lm_eval accelerate)",
        "A Megatron checkpoint is exported to a temporary Hugging Face folder first.",
    )  # fmt: skip
    add = added.add_argument
    add("--tasks", required=True, help="names, with commas between them")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question; default: the task's own")
    add("--limit", type=positive, metavar="N", help="so many questions of each task")
    add("--include-path", type=path, metavar="FOLDER", help="with tasks of your own, as YAML")
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--batch-size", type=positive, default=8, help="prompts at once")
    _add_model(added)
    return main_parser


def _add_lengths(add, default: str = "4096 8192 .. up to the model's positions") -> None:
    help_text = f"context lengths in tokens, prompt and answer together (default: {default})"
    add("--lengths", type=positive, nargs="+", action=_Ascending, default=[], metavar="N", help=help_text)


def _add_haystack(add) -> None:
    add("--haystack", type=path, help="folder of .txt files; default: prose of Python's standard library")


def _add_generation(command: argparse.ArgumentParser, *, samples: int | None, of: str) -> None:
    add = command.add_argument
    add("--samples", type=positive, default=samples, help=f"examples of each {of}")
    add("--seed", type=int, default=0, help="of the examples, and of sampling")
    add("--temperature", type=_non_negative, default=0.0, help="0 takes the likeliest token each time")
    add(
        "--top-p",
        type=_probability,
        default=1.0,
        help="draw from the likeliest tokens that have this probability together",
    )
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template, which adds tokens")
    add("--batch-size", type=positive, default=4, help="prompts at once; changes answers by rounding alone")
    engine = "auto: transformers or Megatron-Core, by the kind of --model"
    add("--engine", choices=ENGINES, default="auto", help=engine)
    _add_prefill(command)


def _add_prefill(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prefill-chunk", type=positive, default=4096, help="tokens of a context read at once; bounds memory"
    )
    _add_model(command)


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    about = "Hugging Face folder (or name on its Hub), or Megatron checkpoint"
    add("--model", type=path_or_name, required=True, help=about)
    add("--ckpt-step", type=int, metavar="ITERATION", help="of a Megatron checkpoint; default: the newest")
    add("--tokenizer", type=path, help="Hugging Face folder or sentencepiece .model; default: the model's own")
    add("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--output", type=path, metavar="FOLDER", help="default: runs/evaluation/MODEL/TASK")
    add("--overwrite", action="store_true", help="begin anew, whatever results are in --output")


class _WithDefaults(argparse.HelpFormatter):
    """Adds a default to a flag's help where it is a value that says something."""

    def _get_help_string(self, action):
        silent = action.default in (None, [], argparse.SUPPRESS) or isinstance(action.default, bool)
        return action.help if silent else f"{action.help} (default: %(default)s)"


class _Ascending(argparse.Action):
    """Numbers, each once, the smallest first."""

    def __call__(self, _parser, namespace, values, _option=None):
        setattr(namespace, self.dest, sorted(set(values)))


def _non_negative(text: str) -> float:
    return _number(text, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def _finite(text: str) -> float:
    return _number(text, math.isfinite, "a finite number")


def _probability(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "above 0 and at most 1")


def _number(text: str, right, words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not right(value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be {words}")
    return value
