"""RULER (C. Hsieh and others, arXiv 2404.06654): thirteen synthetic tasks at any length.

The structure, sizes, answer lengths and grading are as published (NVIDIA/RULER, scripts/synthetic.yaml and
scripts/data/synthetic/). The wording of the prompts and the code are this project's, so scores are similar to
published ones but not equal. Each module lists its other differences. Prompts end with the start of the answer,
as published.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.tasks.filler import Haystack, load_sentences
from megatron_cream.evaluation.tasks.ruler import aggregation, niah, qa, tracing
from megatron_cream.evaluation.tasks.task import Draft, Example, Tokenizer

TASKS = (*niah.SETTINGS, "vt", "cwe", "fwe", "qa_1", "qa_2")
"""RULER's thirteen tasks. qa_1 needs SQuAD's file and qa_2 HotpotQA's, which the user downloads."""

_CONTROL = re.compile("[\x00-\x1f]")

THRESHOLD = 85.6
"""Minimum satisfactory score in percent, as in the paper: Llama-2-7B-chat's score at 4K, a mean over all TASKS."""


def examples(tokenizer: Tokenizer, **options) -> Iterator[Example]:
    """Yield the examples of `drafts`, which has the arguments."""
    for draft in drafts(tokenizer, **options):
        yield draft.build()


def drafts(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    per_cell: int = 1,
    haystack: Path | None = None,
    squad: Path | None = None,
    hotpotqa: Path | None = None,
) -> Iterator[Draft]:
    """Yield `per_cell` examples of each task at each length, not built yet; an example's part is its task.

    Args:
        tokenizer: the model's tokenizer.
        lengths: tokens of prompt and answer together.
        tasks: names from TASKS; None takes all tasks whose data is given.
        seed: seed of the random needles, words and questions.
        per_cell: examples for each task and length.
        haystack: folder of .txt files for the tasks with essays; None takes the standard library's prose.
        squad: SQuAD's dev-v2.0.json (or v1.1).
        hotpotqa: HotpotQA's hotpot_dev_distractor_v1.json.

    Raises:
        UsageError: a task is unknown, or a file is missing or of another format. Building raises it if there are
            fewer questions than examples, a length is too short, or `wonderwords` is not installed.
    """
    files = {"qa_1": squad, "qa_2": hotpotqa}
    if tasks is None:
        tasks = list_default_tasks(squad, hotpotqa)
    essay = None
    if any(task in niah.SETTINGS and niah.SETTINGS[task].haystack == "essay" for task in tasks):
        essay = Haystack(tokenizer, load_sentences(haystack))
    makers = {task: _find_builder(task, essay, files) for task in tasks}
    for length in lengths:
        for task, make in makers.items():
            for i in range(per_cell):
                name = f"ruler/{task}/{length}/{i}"
                yield Draft(name, partial(make, tokenizer, length=length, index=i, seed=f"{seed}/{name}"))


def list_default_tasks(squad: Path | None, hotpotqa: Path | None) -> list[str]:
    """Return TASKS without those whose file is not given."""
    files = {"qa_1": squad, "qa_2": hotpotqa}
    return [task for task in TASKS if task not in files or files[task] is not None]


def score(example: Example, output: str) -> float:
    """Return the share of the answers in the output; for qa, 1 if any is. Ignores case.

    As published, the output is stripped first, and its control characters become ends of lines.
    """
    output = _CONTROL.sub("\n", output.strip()).strip().lower()
    found = [answer.lower() in output for answer in example.answers]
    return float(any(found)) if example.part.startswith("qa_") else sum(found) / len(found)


def effective_length(scores_by_length: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """Return the longest length up to which every score is at least `threshold`.

    The paper takes the largest length that passes, even if a shorter one fails. The results are equal if
    scores fall with length.

    Args:
        scores_by_length: context length -> mean score over the tasks, in percent.
        threshold: the lowest score that passes, in percent.

    Returns: None if the shortest length fails, or there is no length.
    """
    longest = None
    for length in sorted(scores_by_length):
        if scores_by_length[length] < threshold:
            break
        longest = length
    return longest


def _find_builder(task: str, essay: Haystack | None, files: Mapping[str, Path | None]) -> Callable[..., Example]:
    if task in niah.SETTINGS:
        return partial(niah.build_example, task, essay)
    if task in files:
        if files[task] is None:
            flag, name = {
                "qa_1": ("--squad", "SQuAD's dev-v2.0.json"),
                "qa_2": ("--hotpotqa", "HotpotQA's hotpot_dev_distractor_v1.json"),
            }[task]
            raise UsageError(f"{flag} is missing: --tasks {task} needs {name}")
        read = qa.read_squad if task == "qa_1" else qa.read_hotpotqa
        return partial(qa.build_example, task, read(Path(files[task])))
    makers = {
        "vt": tracing.build_example,
        "cwe": aggregation.build_common_words,
        "fwe": aggregation.build_frequent_words,
    }
    if task not in makers:
        raise UsageError(f"--tasks {task}: must be one of {', '.join(TASKS)}")
    return makers[task]
