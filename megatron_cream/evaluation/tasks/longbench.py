"""LongBench (Y. Bai and others, arXiv 2308.14508): 21 data sets, which the user downloads.

As published (github.com/THUDM/LongBench): the data, the order of a prompt's parts and their labels, the maximum
lengths of answers, the metrics, and that a prompt that is too long loses its middle. Different here: the wording
of the instructions, so scores are similar to published ones but not equal.

Metrics are in `longbench_metrics`.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.data.compressed import bounded_lines
from megatron_cream.evaluation.tasks import longbench_metrics as metrics
from megatron_cream.evaluation.tasks.filler import TooShort
from megatron_cream.evaluation.tasks.sources import (
    check_distinct_names,
    import_package,
    parse_lines,
    read_json_lines,
    report_read_errors,
)
from megatron_cream.evaluation.tasks.task import Example, Tokenizer

_FIELDS = ("input", "context", "answers", "all_classes", "_id")
_SHORT = "Answer as briefly as you can, with a single phrase where possible, and explain nothing."
_ONLY = "Give the answer alone, without any other words."
_QASPER = (
    "Answer as briefly as you can, with a single phrase or sentence where possible. If the article does not tell, "
    'write "unanswerable". If it is a yes/no question, answer "yes", "no" or "unanswerable". Explain nothing.'
)
_PASSAGES = (
    f"Answer the question from the passages that are given. {_ONLY}\n\nThese are the passages.\n{{context}}\n\n"
    f"Answer the question from the passages that are given. {_ONLY}\n\nQuestion: {{input}}\nAnswer:"
)
_CODE = "Please go on with the code below. \n"


@dataclass(frozen=True)
class Dataset:
    """The prompt and the scoring of one data set.

    prompt: template with {context} and {input}.
    max_new_tokens: maximum tokens of an answer, as published.
    metric: (output, answer, classes) -> 0 to 1.
    first_line: whether only the output's first line is scored, as published.
    chat: whether `--chat` puts the prompt into the chat template; as published, not for few-shot prompts and code.
    """

    prompt: str
    max_new_tokens: int
    metric: metrics.Metric
    first_line: bool = False
    chat: bool = True


DATASETS = {
    "narrativeqa": Dataset(
        f"Here are a story, which is a novel or the script of a film, and a question about it. {_SHORT}\n\n"
        f"Story: {{context}}\n\nNow answer the question about the story. {_SHORT}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        metrics.f1,
    ),
    "qasper": Dataset(
        f"Here are a scientific article and a question about it. {_QASPER}\n\nArticle: {{context}}\n\n"
        f"Now answer the question about the article. {_QASPER}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        metrics.f1,
    ),
    "multifieldqa_en": Dataset(
        "Read the text below and answer in few words.\n\n{context}\n\n"
        f"Now answer the question about the text above. {_ONLY}\n\nQuestion: {{input}}\nAnswer:",
        64,
        metrics.f1,
    ),
    "multifieldqa_zh": Dataset(
        "请阅读下面的文字，并用中文简短作答：\n\n{context}\n\n"
        "现在请根据上面的文字回答问题，只给出答案，不要写其他内容。\n\n问题：{input}\n回答：",
        64,
        metrics.f1_zh,
    ),
    "hotpotqa": Dataset(_PASSAGES, 32, metrics.f1),
    "2wikimqa": Dataset(_PASSAGES, 32, metrics.f1),
    "musique": Dataset(_PASSAGES, 32, metrics.f1),
    "dureader": Dataset(
        "请根据所给的文章回答问题。\n\n文章：{context}\n\n请根据上面的文章回答问题。\n\n问题：{input}\n回答：",
        128,
        metrics.rouge_l_zh,
    ),
    "gov_report": Dataset(
        "Here is a report of a government agency. Write a summary of it, one page long.\n\nReport:\n{context}\n\n"
        "Now write a summary of the report, one page long.\n\nSummary:",
        512,
        metrics.rouge_l,
    ),
    "qmsum": Dataset(
        "Here are the transcript of a meeting and a query, which is a question or an instruction. Answer the query in "
        "one sentence or a few.\n\nTranscript:\n{context}\n\nNow answer the query about the meeting in one sentence or "
        "a few.\n\nQuery: {input}\nAnswer:",
        512,
        metrics.rouge_l,
    ),
    "multi_news": Dataset(
        "Here are several news articles. Write a summary of all of them, one page long.\n\nNews:\n{context}\n\n"
        "Now write a summary of all the news, one page long.\n\nSummary:",
        512,
        metrics.rouge_l,
    ),
    "vcsum": Dataset(
        "下面是一份会议记录，请阅读后写一段话，概括会议内容。\n会议记录：\n{context}\n\n会议总结：",
        512,
        metrics.rouge_l_zh,
    ),
    "trec": Dataset(
        "Tell of which type the last question below is. Some questions with their types come first.\n\n"
        "{context}\n{input}",
        64,
        metrics.classification,
        first_line=True,
        chat=False,
    ),
    "triviaqa": Dataset(
        f"Answer the question from the passage that is given. {_ONLY} Some examples come first.\n\n"
        "{context}\n\n{input}",
        32,
        metrics.f1,
        first_line=True,
        chat=False,
    ),
    "samsum": Dataset(
        "Summarize the dialogue in a few short sentences. Some examples come first.\n\n{context}\n\n{input}",
        128,
        metrics.rouge_l,
        first_line=True,
        chat=False,
    ),
    "lsht": Dataset(
        "请给出最后一则新闻的类别，前面是一些例子。\n\n{context}\n{input}",
        64,
        metrics.classification,
        first_line=True,
        chat=False,
    ),
    "passage_count": Dataset(
        "Below are paragraphs from Wikipedia, some of them more than once. Read them with care and find out how many "
        "different paragraphs there are, counting those that come again only once.\n\n{context}\n\n"
        "Give the number of different paragraphs. Write the number alone, such as 1, 2, 3.\n\nThe final answer is: ",
        32,
        metrics.number,
    ),
    "passage_retrieval_en": Dataset(
        "Below are 30 paragraphs from Wikipedia and an abstract of one of them. Find out which paragraph the abstract "
        "is of.\n\n{context}\n\nThis is the abstract.\n\n{input}\n\nGive the number of the paragraph that the abstract "
        'is of. Write it as "Paragraph 1", "Paragraph 2" and so on.\n\nThe answer is: ',
        32,
        metrics.paragraph,
    ),
    "passage_retrieval_zh": Dataset(
        "下面有若干段文字和其中一段的摘要，请找出摘要来自哪一段。\n\n{context}\n\n下面是摘要\n\n{input}\n\n"
        '请写出摘要所属段落的编号，格式为"段落1"、"段落2"等\n\n答案是：',
        32,
        metrics.paragraph,
    ),
    "lcc": Dataset(f"{_CODE}{{context}}Next line of code:\n", 64, metrics.code_similarity, chat=False),
    "repobench-p": Dataset(f"{_CODE}{{context}}{{input}}Next line of code:\n", 64, metrics.code_similarity, chat=False),
}
"""Name -> data set. LongBench-E's files, NAME_e.jsonl, use the prompt and metric of NAME."""

CODE_SIMILARITIES = {"indel": metrics.code_similarity, "difflib": metrics.code_similarity_by_difflib}
"""Name -> metric of lcc and repobench-p."""


@dataclass(frozen=True)
class LongBenchExample(Example):
    """An example of LongBench.

    classes: the classes of a classification task, else empty.
    """

    classes: tuple[str, ...] = ()


def examples(
    tokenizer: Tokenizer,
    *,
    folder: Path,
    length: int,
    datasets: Sequence[str] | None = None,
    most: int | None = None,
    code_similarity: str = "indel",
) -> Iterator[LongBenchExample]:
    """Yield the examples of the user's data; an example's part is the name of its data set.

    Args:
        tokenizer: the model's tokenizer.
        folder: a folder with NAME.jsonl files, or the published data.zip.
        length: tokens of prompt and answer together; longer prompts lose their middle.
        datasets: names from DATASETS, also with _e; None takes all data sets in `folder`.
        most: maximum examples per data set, the first ones; None takes all.
        code_similarity: a name from CODE_SIMILARITIES; `score` will be called with it.

    Raises:
        UsageError: there is no data, a data set is unknown, a file is damaged, the length is too short, or a
            package that a metric needs is not installed.
    """
    found = _find_readers(Path(folder))
    known = {name: read for name, read in found.items() if _base_name(name) in DATASETS}
    if not known:
        raise UsageError(f"--data {folder}: there is no NAME.jsonl of LongBench's data sets, such as narrativeqa.jsonl")
    for name in datasets or ():
        if _base_name(name) not in DATASETS:
            raise UsageError(f"--datasets {name}: must be one of {', '.join(DATASETS)}")
        if name not in known:
            raise UsageError(f"--datasets {name}: {folder} has only {', '.join(sorted(known))}")
        if datasets.count(name) > 1:
            raise UsageError(f"--datasets {name}: given twice")
    chosen = datasets or sorted(known)
    for name in chosen:
        for module in metrics.MODULES.get(_metric(name, code_similarity), ()):
            import_package(module)
    for name in chosen:
        places: dict[str, str] = {}
        for i, (where, record) in enumerate(known[name]()):
            if i == most:
                break
            example = _build_example(tokenizer, name, where, record, length)
            if (other := places.setdefault(example.name, where)) != where:
                raise UsageError(f"{where}: _id {record['_id']!r} is also that of {other}")
            yield example


def score(example: Example, output: str, code_similarity: str = "indel") -> float:
    """Return the data set's metric for the best of the answers.

    Args:
        example: made by `examples`.
        output: the model's answer.
        code_similarity: a name from CODE_SIMILARITIES, for lcc and repobench-p.
    """
    dataset = DATASETS[_base_name(example.part)]
    if dataset.first_line:
        output = output.lstrip("\n").split("\n")[0]
    classes = example.classes if isinstance(example, LongBenchExample) else ()
    metric = _metric(example.part, code_similarity)
    return max((metric(output, answer, classes) for answer in example.answers), default=0.0)


def cut_middle(tokenizer: Tokenizer, text: str, most: int) -> str:
    """Cut the middle out of a text of more than `most` tokens; keep its start and end."""
    ids = tokenizer.encode(text)
    result, keep, over = text, most, len(ids) - most
    while over > 0:
        half = max(0, keep // 2)
        start, end = tokenizer.decode(ids[:half]), tokenizer.decode(ids[len(ids) - half :])
        if not text.startswith(" "):
            start = start.removeprefix(" ")  # some tokenizers decode a space before all text
        result = start + end
        # Joining the parts may increase the number of tokens.
        over = len(tokenizer.encode(result)) - most
        keep -= over
    return result


def _build_example(
    tokenizer: Tokenizer, name: str, where: str, record: dict[str, Any], length: int
) -> LongBenchExample:
    dataset = DATASETS[_base_name(name)]
    if length <= dataset.max_new_tokens:
        raise TooShort(f"context length {length}: too short for {name}, whose answer takes {dataset.max_new_tokens}")
    for key, right in (("answers", list), ("all_classes", list | None)):
        if not isinstance(record[key], right):
            raise UsageError(f"{where}: {key} must be a list, not {one_line(repr(record[key]), 60)}")
    parts = {"context": str(record["context"]), "input": str(record["input"])}
    # One pass, because the inserted texts may contain such braces themselves.
    prompt = re.sub(r"\{(context|input)\}", lambda field: parts[field.group(1)], dataset.prompt)
    prompt = cut_middle(tokenizer, prompt, length - dataset.max_new_tokens)
    return LongBenchExample(
        f"longbench/{name}/{record['_id']}",
        prompt,
        tuple(map(str, record["answers"])),
        dataset.max_new_tokens,
        length,
        part=name,
        chat=dataset.chat,
        classes=tuple(map(str, record["all_classes"] or ())),
    )


def _metric(name: str, code_similarity: str) -> metrics.Metric:
    metric = DATASETS[_base_name(name)].metric
    return CODE_SIMILARITIES[code_similarity] if metric is metrics.code_similarity else metric


def _base_name(name: str) -> str:
    return name.removesuffix("_e")


def _find_readers(folder: Path) -> dict[str, Callable[[], Iterator[tuple[str, dict[str, Any]]]]]:
    """Return the name of each .jsonl file with a function that reads its records."""
    if folder.suffix == ".zip":
        with report_read_errors(folder), zipfile.ZipFile(folder) as archive:
            members = [name for name in archive.namelist() if name.endswith(".jsonl")]
        check_distinct_names(f"--data {folder}:", map(Path, members), lambda member: member.stem)
        return {Path(member).stem: partial(_read_zip_member, folder, member) for member in members}
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder. Give a folder with NAME.jsonl files, or data.zip.")
    return {path.stem: partial(read_json_lines, path, _FIELDS) for path in folder.glob("*.jsonl")}


def _read_zip_member(file: Path, member: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with report_read_errors(file), zipfile.ZipFile(file) as archive, archive.open(member) as lines:
        yield from parse_lines(bounded_lines(lines), f"{file}:{member}", _FIELDS)
