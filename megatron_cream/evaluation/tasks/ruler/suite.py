"""RULER (C. Hsieh and others, arXiv 2404.06654): thirteen synthetic tasks at any length.

The structure, sizes, lengths of answers and grading are the published ones (NVIDIA/RULER,
scripts/synthetic.yaml and scripts/data/synthetic/), the words of the prompts and the code are
ours, so scores compare in kind, not digit for digit, with published ones. What is drawn otherwise
than there is said in each module. Prompts end with the start of the answer, as published.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.tasks.filler import Haystack, load_sentences
from megatron_cream.evaluation.tasks.ruler import aggregation, niah, qa, tracing
from megatron_cream.evaluation.tasks.task import Example, Tokenizer

TASKS = (*niah.SETTINGS, "vt", "cwe", "fwe", "qa_1", "qa_2")
"""The thirteen. qa_1 takes SQuAD's file and qa_2 HotpotQA's, of the user."""

THRESHOLD = 85.6
"""Llama-2-7B-chat's score, in percent, at 4K: what the paper calls satisfactory."""


def examples(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    per_cell: int = 1,
    haystack: Path | None = None,
    squad: Path | None = None,
    hotpotqa: Path | None = None,
) -> Iterator[Example]:
    """Yield `per_cell` examples of each task at each length.

    An example's part is its task.

    Args:
        tokenizer: of the model.
        lengths: tokens of prompt and answer together.
        tasks: of TASKS; None is all whose data is there.
        seed: of the random needles, words and questions.
        per_cell: examples of each task and length.
        haystack: folder of .txt files, for the tasks with essays; None is the standard library's prose.
        squad: SQuAD's dev-v2.0.json (or v1.1).
        hotpotqa: HotpotQA's hotpot_dev_distractor_v1.json.

    Raises:
        UsageError: an unknown task, a file that is missing or not such a file, more examples than
            questions, a length that is too short, or `wonderwords` is not installed.
    """
    files = {"qa_1": squad, "qa_2": hotpotqa}
    if tasks is None:
        tasks = [task for task in TASKS if task not in files or files[task] is not None]
    essay = None
    if any(task in niah.SETTINGS and niah.SETTINGS[task].haystack == "essay" for task in tasks):
        essay = Haystack(tokenizer, load_sentences(haystack))
    makers = {task: _find_builder(task, essay, files) for task in tasks}
    for length in lengths:
        for task, make in makers.items():
            for i in range(per_cell):
                yield make(tokenizer, length=length, index=i, seed=f"{seed}/ruler/{task}/{length}/{i}")


def score(example: Example, output: str) -> float:
    """Share of the answers that are in the output, in any case; for questions (qa), 1 where any is."""
    found = [answer.lower() in output.lower() for answer in example.answers]
    return float(any(found)) if example.part.startswith("qa_") else sum(found) / len(found)


def effective_length(scores_by_length: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """Return the longest length whose score, like all shorter ones', reaches `threshold`.

    The paper's is the largest length that passes, whatever the shorter ones do: the same wherever
    scores fall with length. Here a length at which a model fails is not passed over.

    Args:
        scores_by_length: context length -> mean score over the tasks, in percent.
        threshold: the lowest score that passes, in percent.

    Returns: None where the shortest length fails, or there is none.
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
        raise UsageError(f"--tasks {task}: expected some of {', '.join(TASKS)}")
    return makers[task]
