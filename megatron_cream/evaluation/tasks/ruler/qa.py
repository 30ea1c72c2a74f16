"""RULER's tasks qa_1 and qa_2: questions of SQuAD and HotpotQA among documents that do not answer them.

As published: a prompt has the question's own documents and as many others as fit (for SQuAD, those of the same
article first), in random order. Questions are in the file's order. If the file has too few documents, they repeat.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.evaluation.tasks.filler import fit
from megatron_cream.evaluation.tasks.sources import read_json_file
from megatron_cream.evaluation.tasks.task import Example, Tokenizer

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """A question with its correct answers.

    own: indices of its own documents.
    related: indices of the other documents of its article.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    related: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """The questions and documents of a file."""

    path: Path
    questions: Sequence[Question]
    documents: Sequence[str]


def read_squad(path: Path) -> Questions:
    """Read SQuAD's JSON of version 1.1 or 2.0, without the questions that have no answer.

    Raises:
        UsageError: the file is missing or is not SQuAD's.
    """
    data = read_json_file(path)
    try:
        articles = [article["paragraphs"] for article in data["data"]]
        index, documents = _index_documents(
            _read_text(paragraph, "context") for paragraphs in articles for paragraph in paragraphs
        )
        questions = []
        for paragraphs in articles:
            article = tuple(dict.fromkeys(index[paragraph["context"]] for paragraph in paragraphs))
            for paragraph in paragraphs:
                own = index[paragraph["context"]]
                related = tuple(i for i in article if i != own)
                for asked in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(_read_text(answer, "text") for answer in asked["answers"]))
                    if answers and not asked.get("is_impossible"):
                        questions.append(Question(_read_text(asked, "question"), answers, (own,), related))
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not SQuAD's JSON ({one_line(repr(error))})") from error
    return _check_questions(path, questions, documents)


def read_hotpotqa(path: Path) -> Questions:
    """Read HotpotQA's JSON of the distractor setting.

    Raises:
        UsageError: the file is missing or is not HotpotQA's.
    """
    data = read_json_file(path)
    if not isinstance(data, list):
        raise UsageError(f"{path}: not HotpotQA's JSON: it is not a list")
    read = []
    for number, case in enumerate(data, start=1):
        try:
            context = [f"{title}\n{''.join(sentences)}" for title, sentences in case["context"]]
            read.append((_read_text(case, "question"), _read_text(case, "answer"), context))
            if not context:
                raise ValueError("context is empty")
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}, record {number}: not one of HotpotQA's ({one_line(repr(error))})") from error
    index, documents = _index_documents(document for _, _, context in read for document in context)
    questions = [
        Question(question, (answer,), tuple(index[document] for document in context), ())
        for question, answer, context in read
    ]
    return _check_questions(path, questions, documents)


def build_example(task: str, data: Questions, tokenizer: Tokenizer, *, length: int, index: int, seed: str) -> Example:
    """Build the example of question `index` at `length`; all randomness is from `seed`.

    Raises:
        UsageError: the file has too few questions.
    """
    if index >= len(data.questions):
        raise UsageError(f"{data.path}: has {len(data.questions)} questions, too few for {index + 1} examples")
    question, rng = data.questions[index], random.Random(seed)
    related = rng.sample(question.related, len(question.related))
    known = {*question.own, *related}
    others = [i for i in range(len(data.documents)) if i not in known]
    rng.shuffle(others)
    order = [*question.own, *related, *others]

    def prompt(size: int) -> str:
        chosen = list(islice(cycle(order), size))
        random.Random(f"{seed}/order").shuffle(chosen)
        return _build_prompt([data.documents[i] for i in chosen], question.text)

    size = fit(tokenizer, prompt, task=task, length=length, max_new_tokens=MAX_NEW_TOKENS, least=len(question.own))
    name = f"ruler/{task}/{length}/{index}"
    return Example(name, prompt(size), question.answers, MAX_NEW_TOKENS, length, part=task)


def _build_prompt(documents: Sequence[str], question: str) -> str:
    task = "Answer the question from the documents that are given. Give the answer alone, without any other words."
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, start=1))
    return f"{task}\n\nThese are the documents.\n\n{context}\n\n{task}\n\nQuestion: {question} Answer:"


def _read_text(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str) or not record[key]:
        raise TypeError(f"{key} must be a non-empty text, not {record[key]!r}")
    return record[key]


def _index_documents(documents: Any) -> tuple[dict[str, int], list[str]]:
    """Return (document -> index, documents) for the sorted documents without duplicates."""
    unique = sorted(set(documents))
    return {document: i for i, document in enumerate(unique)}, unique


def _check_questions(path: Path, questions: list[Question], documents: list[str]) -> Questions:
    if not questions:
        raise UsageError(f"{path}: there are no questions in it")
    return Questions(path, questions, documents)
