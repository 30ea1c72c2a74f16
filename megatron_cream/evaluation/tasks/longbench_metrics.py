"""LongBench's metrics, as published (github.com/THUDM/LongBench, metrics.py), of one output and one answer.

Each takes (output, answer, classes) and returns a score from 0 to 1. Some need packages: `rouge`, `thefuzz` and,
for Chinese, `jieba`. These are the published packages or their successors.

Two published bugs are fixed here. An output without a full stop that was too long for `rouge`'s recursion scored
0. And of two adjacent classes whose names are part of the correct class's name, only one was ignored.
"""

import contextlib
import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher

from megatron_cream.evaluation.tasks.sources import import_package

Metric = Callable[[str, str, Sequence[str]], float]

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"
    "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANY_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def f1(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return SQuAD's F1 of words, ignoring articles, punctuation and case."""

    def tokens(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()

    return _overlap(tokens(output), tokens(answer))


def f1_zh(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the F1 of Chinese words, ignoring punctuation and case."""

    def tokens(text: str) -> list[str]:
        plain = ("".join(word.lower().translate(_ANY_PUNCTUATION).split()) for word in _split_chinese(text))
        return [word for word in plain if word]

    return _overlap(tokens(output), tokens(answer))


def rouge_l(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the ROUGE-L F1; 0 if the output or the answer has no words."""
    if not output.replace(".", "").strip() or not answer.replace(".", "").strip():
        return 0.0
    rouge = import_package("rouge").Rouge(metrics=["rouge-l"])
    with _raise_recursion_limit(len(output.split()) + len(answer.split())):
        return rouge.get_scores(output, answer)[0]["rouge-l"]["f"]


def rouge_l_zh(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the ROUGE-L F1 of Chinese words."""
    return rouge_l(" ".join(_split_chinese(output)), " ".join(_split_chinese(answer)))


def classification(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return 1 / (number of classes in the output) if the correct one is among them, else 0.

    Classes whose names are part of the correct class's name do not count.
    """
    named = [name for name in classes if name in output and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def number(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the output that are the correct one."""
    numbers = re.findall(r"\d+", output)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def paragraph(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Score like `number`, for an answer such as "Paragraph 7" or "段落7"."""
    named = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    return number(output, named.group(1)) if named else 0.0


def code_similarity(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the Indel similarity, to 2 digits, of the output's first line of code and the answer.

    1 - (insertions and deletions) / (characters of both). The published code calls fuzzywuzzy, which computes this
    if python-Levenshtein is installed, and `code_similarity_by_difflib` if not; thefuzz always computes this.
    """
    return import_package("thefuzz.fuzz").ratio(_first_line_of_code(output), answer) / 100


def code_similarity_by_difflib(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the same by Python's difflib (Ratcliff and Obershelp): never higher than `code_similarity`."""
    line = _first_line_of_code(output)
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


MODULES = {
    f1_zh: ("jieba",),
    rouge_l: ("rouge",),
    rouge_l_zh: ("jieba", "rouge"),
    code_similarity: ("thefuzz.fuzz",),
}
"""Metric -> modules that it needs, to check before generation starts."""


def _first_line_of_code(output: str) -> str:
    """The first line that is neither comment nor Markdown."""
    lines = output.lstrip("\n").split("\n")
    return next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")


def _overlap(output: Sequence[str], answer: Sequence[str]) -> float:
    """Return the F1 of two bags of words."""
    same = (Counter(output) & Counter(answer)).total()
    return 2 * same / (len(output) + len(answer)) if same else 0.0


def _split_chinese(text: str) -> list[str]:
    jieba = import_package("jieba")
    jieba.setLogLevel(logging.WARNING)  # no messages about loading the dictionary
    return list(jieba.cut(text, cut_all=False))


@contextlib.contextmanager
def _raise_recursion_limit(more: int) -> Iterator[None]:
    """Raise Python's recursion limit: `rouge` recurses once per common word."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + more)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
