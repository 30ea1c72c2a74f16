"""The flags of tools/evaluate.py."""

import argparse
import json
import math

from megatron_cream.checkpoint.convert import DTYPES
from megatron_cream.common.cli import OneLineParser, path, path_or_name, positive, program_name
from megatron_cream.evaluation.conventions import CONVENTIONS
from megatron_cream.evaluation.engine_flags import add_cuda_graphs, add_engine, add_engine_choice
from megatron_cream.evaluation.suites import SUITES
from megatron_cream.evaluation.tasks import longbench, needle
from megatron_cream.evaluation.tasks.ruler import suite as ruler


def build_parser(description: str) -> argparse.ArgumentParser:
    """Build the parser with one subcommand per task; `args.command` is the task's name.

    A bad flag prints one line and exits with code 2.
    """
    main_parser = OneLineParser(
        prog=program_name(),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = main_parser.add_subparsers(required=True, metavar="TASK", dest="command")

    def command(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        about = f"{summary[0].upper()}{summary[1:]}. {details}"
        return commands.add_parser(
            name, help=summary, description=about, allow_abbrev=False, formatter_class=_WithDefaults
        )

    added = command(
        "perplexity",
        "perplexity by context length, and LongPPL",
        "A window of the context length slides over each document in steps of --stride and scores each token once. "
        "LongPPL (arXiv 2410.23771) is the perplexity of the tokens that a long context makes likelier. "
        "docs/evaluation.md defines the conventions.",
    )
    add = added.add_argument
    add("--dataset", type=path, nargs="+", required=True, help=".jsonl, .txt (also .gz) or .parquet files, or folders")
    add("--json-key", default="text", help="key of a record's text")
    _add_lengths(add)
    about = "whose definition; cream: the first N - 1 tokens in one window; pose: a BOS before each window"
    add("--convention", choices=CONVENTIONS, default="ours", help=about)
    add("--stride", type=positive, help="tokens by which the window moves (default: 256)")
    add("--documents", type=positive, default=50, help="maximum number of documents; the first that are long enough")
    add("--min-tokens", type=positive, help="minimum tokens of a document (default: the longest of --lengths)")
    add("--longppl", action=argparse.BooleanOptionalAction, help="default: on if --lengths exceed --short-context")
    add("--short-context", type=positive, default=4096, help="LongPPL: tokens of the short context")
    add("--short-block", type=positive, default=1024, help="LongPPL: tokens that share a short context")
    add("--alpha", type=_finite, default=2.0, help="LongPPL: minimum log-probability gain of a key token")
    add("--beta", type=_finite, default=-2.0, help="LongPPL: minimum log-probability of a key token")
    add("--longppl-bos", action="store_true", help="LongPPL: score the text after a BOS; its authors do not")
    about = "LongPPL: another model that finds the key tokens"
    add("--key-token-model", type=path_or_name, metavar="MODEL", help=about)
    add_engine_choice(added, ("auto", "megatron"))  # vLLM gives no log-probabilities of a prompt
    _add_prefill(added)

    added = command(
        "needle",
        "needle in a haystack: one fact in long text, by length and depth",
        "The default grid is that of CREAM's paper: 10 lengths by 6 depths.",
    )
    add = added.add_argument
    add("--min-length", type=positive, default=1024, help="tokens of prompt and answer together")
    add("--max-length", type=positive, help="default: the model's number of positions")
    add("--length-steps", type=positive, default=10, help="number of lengths, evenly spaced")
    add("--depth-steps", type=positive, default=6, help="number of depths, evenly spaced from start to end")
    add("--needle", choices=needle.KINDS, default="number", help="a city's random number, or the published sandwich")
    _add_haystack(add)
    _add_generation(added, samples=5, of="cell")

    added = command("lines", "LongChat-Lines: the number on one of many lines")
    add = added.add_argument
    _add_lengths(add)
    count = dict(type=positive, nargs="+", action=_Ascending, default=[], metavar="N")
    add("--lines", **count, help="numbers of lines, instead of lengths")
    add("--data", type=path, nargs="+", default=[], help="LongEval's published N_lines.jsonl files, instead of both")
    _add_generation(added, samples=50, of="length or file")

    added = command("kv", "key-value retrieval of Lost in the Middle, by the place of the gold pair")
    add = added.add_argument
    add("--keys", **count, help="numbers of pairs (default: 75 140)")
    _add_lengths(add, default="none")
    places = "places of the gold pair, counted from 0; for --keys or --data"
    add("--gold", type=int, nargs="+", action=_Ascending, metavar="PLACE", help=places)
    add("--data", type=path, nargs="+", default=[], help="published kv-retrieval-N_keys.jsonl.gz, instead of both")
    _add_generation(added, samples=50, of="place")

    added = command(
        "ruler",
        "RULER's 13 tasks, and the effective length",
        f"Up to the effective length the mean over all 13 tasks is at least {ruler.THRESHOLD} percent at every tested "
        "length. It is not reported if tasks are skipped.",
    )
    add = added.add_argument
    _add_lengths(add)
    add("--tasks", nargs="+", choices=ruler.TASKS, metavar="NAME", help=f"default: all of {', '.join(ruler.TASKS)}")
    _add_haystack(add)
    _add_ruler_files(add)
    _add_generation(added, samples=50, of="task and length (500 in the paper)")

    added = command("longbench", "LongBench's 21 data sets, from your download")
    add = added.add_argument
    add("--data", type=path, required=True, help="folder with NAME.jsonl files, or data.zip")
    add("--length", type=positive, help="longer prompts lose their middle (default: the model's positions)")
    add("--datasets", nargs="+", metavar="NAME", help="default: all in --data")
    about = "of lcc and repobench-p: as fuzzywuzzy computes it with python-Levenshtein (indel) or without (difflib)"
    add("--code-similarity", choices=longbench.CODE_SIMILARITIES, default="indel", help=about)
    plain = ", ".join(name for name, dataset in longbench.DATASETS.items() if not dataset.chat)
    _add_generation(added, samples=None, of="data set at most (default: all)", chat=f"; not those of {plain}")

    added = command(
        "harness",
        "tasks of EleutherAI's lm-evaluation-harness (pip install lm_eval accelerate)",
        "A Megatron checkpoint is first exported to a temporary Hugging Face folder.",
    )
    add = added.add_argument
    add("--tasks", required=True, help="task names, separated by commas")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's own)")
    add("--limit", type=positive, metavar="N", help="maximum questions per task")
    add("--include-path", type=path, metavar="FOLDER", help="folder of your own tasks, as YAML files")
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    about = 'JSON for tasks that generate or choose data by length, such as {"max_seq_lengths": [4096, 8192]} for ruler'
    add("--metadata", type=_json_object, default={}, metavar="JSON", help=about)
    about = "maximum tokens of a prompt and its answer; longer prompts lose their beginning (default: the model's)"
    add("--max-length", "--max-model-len", type=positive, metavar="N", help=about)
    add("--batch-size", type=positive, default=8, help="prompts per batch")
    add_engine(added, _probability, has_length=False)
    _add_model(added)

    tasks = list(commands.choices)
    added = command(
        "suite",
        "a list of evaluations: short, long or paper",
        "short: short texts, by lm_eval's boolq, piqa, winogrande, truthfulqa_mc2, hellaswag (10 "
        "examples before each question) and arc_challenge (25). long: RULER, needle, kv and lines, LongBench v2 and "
        "BABILong at --lengths. paper: the evaluations of CREAM's paper. Evaluations whose data or package is missing "
        "are left out by name.",
    )
    add = added.add_argument
    add("suite", choices=SUITES, metavar="NAME", help=", ".join(SUITES))
    _add_lengths(add)
    add("--samples", type=positive, help="examples per cell, length or task (default: each task's own)")
    add("--limit", type=positive, metavar="N", help="maximum questions per task of lm_eval")
    add("--dataset", type=path, nargs="+", default=[], help="paper: files or folders of text for perplexity")
    add("--longbench", type=path, help="paper: folder of LongBench's NAME.jsonl files, or data.zip")
    _add_haystack(add)
    _add_ruler_files(add)
    add("--include-path", type=path, metavar="FOLDER", help="folder of your own tasks for lm_eval, as YAML files")
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--batch-size", type=positive, help="prompts per batch (default: each task's own)")
    add_engine(added, _probability, has_length=False)
    add_cuda_graphs(added)
    _add_model(added, "model", metavar="MODEL")

    added = command(
        "compare",
        "what an extension gained and cost, from the results of two models",
        "Pairs the examples of both models and writes a page with intervals: comparison.md, comparison.html, which "
        "holds its pictures, and comparison.json. No model is run.",
    )
    add = added.add_argument
    about = "results of the {} model: a folder that a task or a suite has filled, or a folder of such folders"
    add("base", type=path, metavar="BASE", help=about.format("base"))
    add("extended", type=path, metavar="EXTENDED", help=about.format("extended"))
    add("--tasks", nargs="+", choices=tasks, metavar="TASK", help=f"of {', '.join(tasks)}; default: all that are there")
    add("--suite", choices=SUITES, metavar="NAME", help="compare BASE/NAME and EXTENDED/NAME, which suites have filled")
    about = "fill the results into the model card in this folder (default: the extended model's own, if it has one)"
    add("--card", type=path, metavar="FOLDER", help=about)
    add("--output", type=path, metavar="FOLDER", help="of the page, new (default: EXTENDED/compare)")
    add("--overwrite", action="store_true", help="replace an earlier comparison in --output")
    return main_parser


def _add_lengths(add, default: str = "4096 8192 .. up to the model's positions") -> None:
    help_text = f"context lengths in tokens, prompt and answer together (default: {default})"
    add("--lengths", type=positive, nargs="+", action=_Ascending, default=[], metavar="N", help=help_text)


def _add_haystack(add) -> None:
    add("--haystack", type=path, help="folder of .txt files; default: prose of Python's standard library")


def _add_ruler_files(add) -> None:
    add("--squad", type=path, help="dev-v2.0.json, for qa_1; without it qa_1 is skipped")
    add("--hotpotqa", type=path, help="hotpot_dev_distractor_v1.json, for qa_2; without it qa_2 is skipped")


def _add_generation(command: argparse.ArgumentParser, *, samples: int | None, of: str, chat: str = "") -> None:
    add = command.add_argument
    add("--samples", type=positive, default=samples, help=f"examples per {of}")
    add("--seed", type=int, default=0, help="seed of the examples and of sampling")
    add("--temperature", type=_non_negative, default=0.0, help="0 always takes the likeliest token")
    add(
        "--top-p",
        type=_probability,
        default=1.0,
        help="draw from the likeliest tokens that have this probability together",
    )
    about = f"put prompts into the tokenizer's chat template, which adds tokens{chat}"
    add("--chat", action="store_true", help=about)
    add("--batch-size", type=positive, default=4, help="prompts per batch; changes answers only by rounding")
    add_engine(command, _probability)
    add_cuda_graphs(command)
    _add_prefill(command, "--max-num-batched-tokens")


def _add_prefill(command: argparse.ArgumentParser, *synonyms: str) -> None:
    add = command.add_argument
    about = "GPUs that share one model, with torchrun; for Megatron-Core"
    add("--tensor-model-parallel-size", type=positive, default=1, metavar="N", help=about)
    about = "GPUs that split the keys and values of long prompts; each has the weights"
    add("--context-parallel-size", type=positive, default=1, metavar="N", help=about)
    about = "tokens of a context read at once; limits memory"
    add("--prefill-chunk", *synonyms, type=positive, default=4096, metavar="N", help=about)
    _add_model(command)


def _add_model(command: argparse.ArgumentParser, name: str = "--model", **options) -> None:
    add = command.add_argument
    about = "Hugging Face folder (or name on its Hub), or Megatron checkpoint"
    add(name, type=path_or_name, help=about, **(options or {"required": True}))
    add("--ckpt-step", type=int, metavar="ITERATION", help="step of a Megatron checkpoint (default: the newest)")
    add("--tokenizer", type=path, help="Hugging Face folder or sentencepiece .model (default: the model's own)")
    add("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--output", type=path, metavar="FOLDER", help="default: runs/evaluation/MODEL/TASK")
    add("--overwrite", action="store_true", help="start again and replace the results in --output")


class _WithDefaults(argparse.HelpFormatter):
    """Help that appends a flag's default, unless it is None, empty or a boolean."""

    def _get_help_string(self, action):
        hidden = action.default in (None, [], {}, argparse.SUPPRESS) or isinstance(action.default, bool)
        return action.help if hidden else f"{action.help} (default: %(default)s)"


class _Ascending(argparse.Action):
    """Action that stores numbers in ascending order, without duplicates."""

    def __call__(self, _parser, namespace, values, _option=None):
        setattr(namespace, self.dest, sorted(set(values)))


def _non_negative(text: str) -> float:
    return _number(text, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def _finite(text: str) -> float:
    return _number(text, math.isfinite, "a finite number")


def _probability(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "above 0 and at most 1")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r}: must be a JSON object, such as {{"max_seq_lengths": [4096]}}')
    return value


def _number(text: str, is_valid, requirement: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be {requirement}")
    return value
