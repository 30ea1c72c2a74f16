"""The suites of `evaluate.py suite`: lists of runs of the other commands.

short: tasks on short texts, which a longer window may make worse; with the examples of CREAM's paper.
long: tasks at each length, which it should make better.
paper: the evaluations of CREAM's paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import read_json

SUITES = ("short", "long", "paper")

SUITE = "suite.json"
"""The file beside a suite's results that lists its runs."""


@dataclass(frozen=True)
class Run:
    """One run of another command of evaluate.py.

    name: of the run and its folder.
    words: the command and its flags, without those of the model.
    dataset: on the Hugging Face Hub, for tasks of lm_eval.
    missing: the flag without which the run is left out, and what its file is; empty if it is given or not needed.
    """

    name: str
    words: tuple[str, ...]
    dataset: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Options:
    """What the flags of `suite` give to its runs.

    lengths: context lengths in tokens, ascending.
    samples: examples per cell, length or task; None takes each command's default.
    limit: maximum questions per task of lm_eval; None takes all.
    haystack, squad, hotpotqa, longbench, dataset: files and folders of data; None where not given.
    include_path: folder of own tasks for lm_eval; TASK.yaml there replaces lm_eval's task, and needs no download.
    """

    lengths: Sequence[int]
    samples: int | None = None
    limit: int | None = None
    haystack: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    longbench: Path | None = None
    dataset: Sequence[Path] = ()
    include_path: Path | None = None


def read_states(folder: Path, flag: str) -> dict[str, Any]:
    """Return what `suite` wrote into its folder; {} if it wrote nothing there.

    Args:
        folder: of a suite's results.
        flag: names the folder in messages.

    Returns: {"suite", "model", "lengths", "runs": [{"name", "state", "words"}]}.
    """
    if not (folder / SUITE).is_file():
        return {}
    found = read_json(folder / SUITE, "a list of evaluate.py suite")
    try:
        complete = {"suite", "model"} <= found.keys() and all({"name", "state"} <= run.keys() for run in found["runs"])
    except (AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UsageError(f"{flag} {folder}: its {SUITE} is not from evaluate.py suite. Give another folder")
    return found


def list_runs(suite: str, options: Options) -> list[Run]:
    """Return the runs of a suite, in order."""
    return {"short": _list_short, "long": _list_long, "paper": _list_paper}[suite](options)


_SHORT = (
    ("boolq", "aps/super_glue", None),
    ("piqa", "baber/piqa", None),
    ("winogrande", "allenai/winogrande", None),
    ("truthfulqa_mc2", "truthfulqa/truthful_qa", None),
    ("hellaswag", "Rowan/hellaswag", 10),
    ("arc_challenge", "allenai/ai2_arc", 25),
)
"""(task of lm_eval, its dataset, examples before each question)."""

_BABILONG_LONGEST = 131072


def _list_short(options: Options) -> list[Run]:
    return [_harness(options, task, dataset, *_flags(num_fewshot=shots)) for task, dataset, shots in _SHORT]


def _list_long(options: Options) -> list[Run]:
    lengths, samples = _flags(lengths=options.lengths), _flags(samples=options.samples)
    files = _flags(haystack=options.haystack, squad=options.squad, hotpotqa=options.hotpotqa)
    runs = [
        Run("ruler", ("ruler", *lengths, *samples, *files)),
        _needle(options),
        Run("kv", ("kv", *lengths, *samples)),
        Run("lines", ("lines", *lengths, *samples)),
        _harness(options, "longbench2", "recursal/longbench-v2"),
    ]
    for length in options.lengths:
        if length % 1024 == 0 and length <= _BABILONG_LONGEST:
            size = ("--metadata", f'{{"max_seq_lengths": "{length // 1024}k"}}')
            run = _harness(options, "babilong_longctx", "RMT-team/babilong-1k-samples", *size)
            runs.append(Run(f"babilong_{length // 1024}k", run.words, run.dataset))
    return runs


def _list_paper(options: Options) -> list[Run]:
    lengths, samples = _flags(lengths=options.lengths), _flags(samples=options.samples)
    texts, longbench = _flags(dataset=options.dataset), _flags(data=options.longbench)
    no_texts = "" if options.dataset else "--dataset is missing: files of GovReport, Proof-pile, PG19 or Books3"
    no_longbench = "" if options.longbench else "--longbench is missing: the folder of LongBench's data sets"
    return [
        Run("lines", ("lines", *lengths, *samples)),
        Run("kv", ("kv", "--keys", "75", "140", *samples)),
        _needle(options),
        Run("longbench", ("longbench", *longbench, *samples), missing=no_longbench),
        Run("perplexity", ("perplexity", *texts, *lengths, "--convention", "cream"), missing=no_texts),
        *_list_short(options),
    ]


def _needle(options: Options) -> Run:
    ends = _flags(min_length=min(1024, options.lengths[0]), max_length=options.lengths[-1])
    return Run("needle", ("needle", *ends, *_flags(samples=options.samples, haystack=options.haystack)))


def _harness(options: Options, task: str, dataset: str, *words: str) -> Run:
    folder = options.include_path
    is_own = folder is not None and (folder / f"{task}.yaml").is_file()
    own = _flags(limit=options.limit, include_path=folder)
    return Run(task, ("harness", "--tasks", task, *words, *own), dataset="" if is_own else dataset)


def _flags(**values: Any) -> tuple[str, ...]:
    """Return the flags of the values that are given."""
    words: list[str] = []
    for name, value in values.items():
        if value is None or (isinstance(value, Sequence) and not value):
            continue
        words.append(to_flag(name))
        words += map(str, value) if isinstance(value, Sequence) and not isinstance(value, str) else [str(value)]
    return tuple(words)
