"""LongBench's metrics, as published (github.com/THUDM/LongBench, metrics.py): of one output and one answer.

Each is called with (output, answer, classes), and is from 0 to 1. The packages that some need are
`rouge`, `thefuzz` and, for Chinese, `jieba`; they are the published ones, or their successors.

Two published faults are not kept: an output without a full stop that is too long for `rouge`'s
recursion counted 0; and of two classes in a row that are part of the right one's name, only one
was left out.
"""

import contextlib
import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_cream.evaluation.tasks.sources import import_package

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"
    "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANY_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def f1(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """SQuAD's F1 of words, less articles, punctuation and case."""

    def tokens(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()

    return _overlap(tokens(output), tokens(answer))


def f1_zh(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of Chinese words, less punctuation and case."""

    def tokens(text: str) -> list[str]:
        plain = ("".join(word.lower().translate(_ANY_PUNCTUATION).split()) for word in _split_chinese(text))
        return [word for word in plain if word]

    return _overlap(tokens(output), tokens(answer))


def rouge_l(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L, F1; 0 where the output has no words."""
    if not output.replace(".", "").strip() or not answer.replace(".", "").strip():
        return 0.0
    rouge = import_package("rouge").Rouge(metrics=["rouge-l"])
    with _raise_recursion_limit(len(output.split()) + len(answer.split())):
        return rouge.get_scores(output, answer)[0]["rouge-l"]["f"]


def rouge_l_zh(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L, F1, of Chinese words."""
    return rouge_l(" ".join(_split_chinese(output)), " ".join(_split_chinese(answer)))


def classification(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1 / (classes named in the output) where the right one is among them; parts of its name do not count."""
    named = [name for name in classes if name in output and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def number(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the output that are the right one."""
    numbers = re.findall(r"\d+", output)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def paragraph(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """As `number`, for an answer such as "Paragraph 7" or "段落7"."""
    named = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    return number(output, named.group(1)) if named else 0.0


def code_similarity(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the output's first line that is neither comment nor Markdown, to 2 digits."""
    lines = output.lstrip("\n").split("\n")
    line = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    return import_package("thefuzz.fuzz").ratio(line, answer) / 100


MODULES = {
    f1_zh: ("jieba",),
    rouge_l: ("rouge",),
    rouge_l_zh: ("jieba", "rouge"),
    code_similarity: ("thefuzz.fuzz",),
}
"""Metric -> modules it needs, for a check before anything is generated."""


def _overlap(output: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of two bags of words."""
    same = (Counter(output) & Counter(answer)).total()
    return 2 * same / (len(output) + len(answer)) if same else 0.0


def _split_chinese(text: str) -> list[str]:
    jieba = import_package("jieba")
    jieba.setLogLevel(logging.WARNING)  # it reports how it loads its dictionary
    return list(jieba.cut(text, cut_all=False))


@contextlib.contextmanager
def _raise_recursion_limit(more: int) -> Iterator[None]:
    """`rouge` walks back along the common words of two texts by recursion, one call a word."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + more)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
