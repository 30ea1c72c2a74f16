"""`evaluate.py suite NAME MODEL`: a list of evaluations by one name, with one folder of results."""

import gc
import os
import socket
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_cream.common import devices
from megatron_cream.common.advice import command_line
from megatron_cream.common.cli import program_name, to_flag
from megatron_cream.common.errors import NotAvailable, UsageError, is_out_of_memory, one_line
from megatron_cream.common.files import atomic_write, read_json, to_json
from megatron_cream.evaluation.engine_flags import (
    check_chat,
    check_cuda_graphs,
    check_harness_cache,
    check_vllm_flags,
)
from megatron_cream.evaluation.harness import check_include_path
from megatron_cream.evaluation.models.hf_model import check_cache_dtype
from megatron_cream.evaluation.models.language_model import Source
from megatron_cream.evaluation.results import SUMMARY
from megatron_cream.evaluation.runner import OutOfMemory
from megatron_cream.evaluation.suites import SUITE, Options, Run, list_runs, read_states
from megatron_cream.evaluation.tasks.filler import TooShort, load_sentences

_MODEL_FLAGS = ("ckpt_step", "tokenizer", "dtype", "kv_cache_dtype")
_TASK_FLAGS = (
    "batch_size", "chat", "engine", "tensor_parallel_size", "gpu_memory_utilization", "enforce_eager",
)  # fmt: skip
_HUB = "huggingface.co"

DEFAULT_OUTPUT = Path("runs", "evaluation")
"""Holds the folders MODEL/TASK and MODEL/SUITE."""


def run_suite(
    args: Namespace,
    *,
    source: Source,
    lengths: list[int],
    parser: ArgumentParser,
    run: Callable[[Namespace], None],
) -> None:
    """Run a suite's evaluations one after another, and list what ran and what did not.

    Evaluations that an earlier run of the same command finished are not run again.

    Args:
        args: the flags of `suite`.
        source: the model.
        lengths: the default of --lengths.
        parser: reads the flags of each evaluation.
        run: runs one evaluation.

    Raises:
        UsageError: every evaluation would reject a flag, none has results, or one failed.
    """
    given = {name: getattr(args, name) for name in Options.__dataclass_fields__ if name != "lengths"}
    options = Options(lengths=args.lengths or lengths, **given)
    runs = list_runs(args.suite, options)
    _check_flags(args, source, runs)
    described = {"suite": args.suite, "model": source.identity(), "lengths": options.lengths}
    finished, states = _find_finished(args, described), []
    for each in runs:
        words = [*each.words, *_list_flags(args, each.words[0])]
        state = finished.get(each.name, {})
        if state.get("words") != words:
            print(f"== {args.suite}: {each.name}", flush=True)
            state = _run_one(each, args.output / each.name, [*words, *_overwrite(args)], parser, run)
            if reason := state.get("reason"):
                print(f"{program_name()}: {each.name} {state['state']}: {reason}", file=sys.stderr)
        states.append({"name": each.name} | state | {"words": words})
        # An interruption must not lose what an earlier run finished further down the list.
        later = [finished[other.name] for other in runs[len(states) :] if other.name in finished]
        _write(args.output, described | {"runs": states + later})
    _print_table(args, states)
    if failed := [state["name"] for state in states if state["state"] == "failed"]:
        raise UsageError(f"suite {args.suite}: {', '.join(failed)} failed. The same command runs only these again")
    if not any(state["state"] == "finished" for state in states):
        raise UsageError(f"suite {args.suite}: nothing was run. The lines above say what is missing")
    _print_next(args, options)


def _check_flags(args: Namespace, source: Source, runs: Sequence[Run]) -> None:
    """Raise UsageError for a flag that each evaluation that takes it would reject."""
    check_cuda_graphs(args, source)
    check_chat(args, source)
    check_vllm_flags(args, source)
    if all(each.words[0] == "harness" for each in runs):
        check_harness_cache(args, source)
    if source.engine == "transformers":
        check_cache_dtype(source.path, args.kv_cache_dtype)
    check_include_path(args.include_path)
    if args.haystack:
        load_sentences(args.haystack)


def _find_finished(args: Namespace, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the finished evaluations of an earlier run for this model, by name."""
    earlier = {} if args.overwrite else read_states(args.output, "--output")
    if earlier and earlier["suite"] != args.suite:
        raise UsageError(
            f"--output {args.output}: has results of suite {earlier['suite']}. Give another folder, or --overwrite"
        )
    if not earlier or earlier["model"] != described["model"]:
        return {}  # each evaluation says what differs
    return {state["name"]: state for state in earlier["runs"] if state["state"] == "finished"}


def _run_one(
    each: Run, folder: Path, words: list[str], parser: ArgumentParser, run: Callable[[Namespace], None]
) -> dict[str, Any]:
    """Run one evaluation; return its state with the score, or with the reason if it is not finished."""
    if each.missing:
        return {"state": "left out", "reason": each.missing}
    if each.dataset and not _has_dataset(each.dataset):
        return {"state": "left out", "reason": f"{each.dataset} is not in the local cache, and {_HUB} is out of reach"}
    try:
        run(parser.parse_args([*words, "--output", str(folder)]))
    except NotAvailable as error:
        return {"state": "left out", "reason": one_line(error)}
    except (UsageError, TooShort, OutOfMemory) as error:
        return {"state": "failed", "reason": one_line(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"state": "failed", "reason": one_line(error) or "the host has too little memory"}
    finally:  # the next evaluation loads the model again
        gc.collect()
        if devices.has_cuda():
            torch.cuda.empty_cache()
    return {"state": "finished", "score": _find_score(words, read_json(folder / SUMMARY, "a summary")["results"])}


def _list_flags(args: Namespace, command: str) -> list[str]:
    """Return the flags of the model and the engine that this command takes."""
    words = ["--model", args.model]
    for name in (*_MODEL_FLAGS, *(() if command == "perplexity" else _TASK_FLAGS)):
        if value := getattr(args, name):
            words += [to_flag(name), *([] if value is True else [str(value)])]
    if args.cuda_graphs is not None and command not in ("perplexity", "harness"):
        words.append("--cuda-graphs" if args.cuda_graphs else "--no-cuda-graphs")
    return words


def _overwrite(args: Namespace) -> list[str]:
    return ["--overwrite"] if args.overwrite else []


def _has_dataset(name: str) -> bool:
    """Return whether a dataset of the Hugging Face Hub is cached, or can be fetched."""
    from datasets import config
    from huggingface_hub import constants

    prepared = Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")
    downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    if prepared.is_dir() or downloaded.is_dir():
        return True
    if constants.HF_HUB_OFFLINE or config.HF_DATASETS_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HF_ENDPOINT", "https_proxy", "HTTPS_PROXY")):
        return True  # the Hub's name need not be known here
    return _is_hub_known()


@cache
def _is_hub_known() -> bool:
    """Return whether the Hub's name resolves; asked once, because a name server that is silent takes long."""
    try:
        socket.getaddrinfo(_HUB, 443)
    except OSError:
        return False
    return True


def _find_score(words: Sequence[str], results: dict[str, Any]) -> float | None:
    """Return the score of a summary, or lm_eval's accuracy of the task or group; None for perplexity."""
    if words[0] != "harness":
        return results.get("score")
    row = results.get(words[words.index("--tasks") + 1], {})
    return next((row[name] for name in ("acc_norm,none", "acc,none") if isinstance(row.get(name), float)), None)


def _write(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / SUITE) as file:
        file.write(to_json(content, indent=2, ensure_ascii=False) + "\n")


def _print_table(args: Namespace, states: list[dict[str, Any]]) -> None:
    table = Table(title=f"{args.suite}: {args.model}")
    for name in ("evaluation", "", "%", "reason"):
        table.add_column(name, justify="right" if name == "%" else "left", overflow="fold")
    for state in states:
        score = state.get("score")
        percent = "" if score is None else f"{100 * score:.1f}"
        table.add_row(state["name"], state["state"], percent, state.get("reason", ""))
    Console().print(table)


def _print_next(args: Namespace, options: Options) -> None:
    """Advise the same suite for the model to compare with, and the comparison."""
    words = [] if args.suite == "short" else ["--lengths", *map(str, options.lengths)]
    if args.output.parent.parent == DEFAULT_OUTPUT:
        sides = [DEFAULT_OUTPUT / "BASE", args.output.parent, "--suite", args.suite]
    else:
        other = args.output.with_name(f"{args.output.name}-base")
        words, sides = [*words, "--output", other], [other, args.output]
    print(f"Next: {command_line('evaluate', 'suite', args.suite, 'BASE', *words)}")
    print(f"then: {command_line('evaluate', 'compare', *sides)}")
