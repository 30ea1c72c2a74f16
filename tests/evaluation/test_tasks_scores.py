"""LongBench's metrics against independent implementations."""

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.tasks import longbench, needle
from megatron_cream.evaluation.tasks import longbench_metrics as metrics
from megatron_cream.evaluation.tasks.longbench import LongBenchExample

WORDS = st.lists(st.sampled_from("red green blue Red, one two".split()), max_size=8)


def lcs(a, b) -> int:
    """Return the length of the longest common subsequence, by its recursive definition."""
    if not a or not b:
        return 0
    return lcs(a[:-1], b[:-1]) + 1 if a[-1] == b[-1] else max(lcs(a[:-1], b), lcs(a, b[:-1]))


@settings(deadline=None)
@given(WORDS, WORDS)
def test_f1_by_matching_words_one_by_one(output, answer):
    left = [word.lower().strip(",") for word in answer]
    same = 0
    for word in output:
        if (word := word.lower().strip(",")) in left:
            left.remove(word)
            same += 1
    precision, recall = same / max(1, len(output)), same / max(1, len(answer))
    expected = 2 * precision * recall / (precision + recall) if same else 0
    assert metrics.f1(" ".join(output), " ".join(answer)) == pytest.approx(expected)


def test_f1_normalizes_as_squad():
    assert metrics.f1("The  quick, brown fox!", "a quick brown FOX") == 1
    assert metrics.f1("an answer", "the") == 0
    assert metrics.f1("theater", "the ater") == 0  # articles are whole words


def test_f1_zh():
    assert metrics.f1_zh("我来到北京清华大学。", "我来到北京清华大学") == 1
    # jieba splits its example into 我 / 来到 / 北京 / 清华大学; the output has two of the four words.
    assert metrics.f1_zh("北京清华大学", "我来到北京清华大学") == pytest.approx(2 * 2 / (2 + 4))
    assert metrics.f1_zh("，。！", "我来到北京") == 0


@settings(deadline=None)
@given(st.permutations("abcdefg"), st.permutations("abcdefg"), st.integers(1, 7), st.integers(1, 7))
def test_rouge_l_by_the_definition(output, answer, n, m):
    """Without repeated words, the score of `rouge` is the F1 of the longest common subsequence."""
    output, answer = output[:n], answer[:m]
    same = lcs(output, answer)
    expected = 2 * same / (n + m)
    assert metrics.rouge_l(" ".join(output), " ".join(answer)) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_of_long_and_of_empty_outputs():
    rng = random.Random(0)
    words = [str(i) for i in range(900)]
    limit = sys.getrecursionlimit()
    assert metrics.rouge_l(" ".join(words), " ".join(words)) == pytest.approx(1)
    rng.shuffle(words)
    assert 0 < metrics.rouge_l(" ".join(words), " ".join(map(str, range(900)))) < 0.2
    assert sys.getrecursionlimit() == limit
    assert metrics.rouge_l("", "a") == metrics.rouge_l(" . ", "a") == metrics.rouge_l("a", "") == 0


def test_rouge_l_zh():
    assert metrics.rouge_l_zh("我来到北京清华大学", "我来到北京清华大学") == pytest.approx(1)
    assert metrics.rouge_l_zh("清华大学", "我来到北京清华大学") == pytest.approx(2 * 1 / (1 + 4))


@settings(deadline=None)
@given(st.text("ab(=) ", max_size=7), st.text("ab(=) ", min_size=1, max_size=7))
def test_code_similarity_is_of_the_common_subsequence(output, answer):
    expected = 2 * lcs(output, answer) / (len(output) + len(answer))
    assert metrics.code_similarity(output, answer) == pytest.approx(expected, abs=0.00501)


def test_code_similarity_takes_the_first_line_of_code():
    assert metrics.code_similarity("\n\n```python\n# add\n// or\nx = 1\ny = 2", "x = 1") == 1
    assert metrics.code_similarity("# only a comment", "x = 1") == 0


def test_classification():
    classes = ("Food", "Date", "Other number", "Number", "number", "Color")
    assert metrics.classification("It is Food", "Food", classes) == 1
    assert metrics.classification("Food or Date", "Food", classes) == 0.5
    assert metrics.classification("Other number", "Other number", classes) == 1  # "number" is part of the class name
    assert metrics.classification("Date", "Food", classes) == metrics.classification("", "Food", classes) == 0


def test_numbers():
    assert metrics.number("7", "7") == 1
    assert metrics.number("7 of 30, so 7", "7") == pytest.approx(2 / 3)
    assert metrics.number("17", "7") == metrics.number("none", "7") == 0
    assert metrics.paragraph("Paragraph 12", "Paragraph 12") == metrics.paragraph("段落12", "段落12") == 1
    assert metrics.paragraph("Paragraph 1, or Paragraph 12", "Paragraph 12") == 0.5
    assert metrics.paragraph("Paragraph 1", "Paragraph 12") == 0


def example(part: str, answers: tuple[str, ...], classes: tuple[str, ...] = ()) -> LongBenchExample:
    return LongBenchExample("x", "prompt", answers, 1, 1, part=part, classes=classes)


def test_the_best_answer_counts():
    asked = example("hotpotqa", ("red green", "blue"))
    assert longbench.score(asked, "blue") == 1
    assert longbench.score(asked, "red") == pytest.approx(2 / 3)
    assert longbench.score(asked, "one") == 0
    assert longbench.score(example("hotpotqa_e", ("blue",)), "Blue.") == 1


def test_only_the_first_line_where_published():
    """trec, triviaqa, samsum and lsht score the first line after leading line feeds."""
    first_line = {name for name, dataset in longbench.DATASETS.items() if dataset.first_line}
    assert first_line == {"trec", "triviaqa", "samsum", "lsht"}
    assert longbench.score(example("triviaqa", ("blue",)), "\n\nblue\nPassage: red green") == 1
    assert longbench.score(example("hotpotqa", ("blue",)), "\n\nblue\nred green") == pytest.approx(0.5)
    assert longbench.score(example("trec", ("Food",), ("Food", "Date")), "Food\nDate") == 1
    assert longbench.score(example("lsht", ("体育",), ("体育", "科技")), "\n科技\n体育") == 0


def test_published_lengths_and_metrics():
    """Compare with LongBench's config/dataset2maxlen.json and the dataset2metric of its eval.py."""
    lengths = {name: dataset.max_new_tokens for name, dataset in longbench.DATASETS.items()}
    assert lengths == (
        dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128)
        | dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"), 64)
        | dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count"), 32)
        | dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh"), 32)
        | dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512)
    )
    by_metric = {}
    for name, dataset in longbench.DATASETS.items():
        by_metric.setdefault(dataset.metric, set()).add(name)
    assert by_metric == {
        metrics.f1: {"narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"},
        metrics.f1_zh: {"multifieldqa_zh"},
        metrics.rouge_l: {"gov_report", "qmsum", "multi_news", "samsum"},
        metrics.rouge_l_zh: {"dureader", "vcsum"},
        metrics.classification: {"trec", "lsht"},
        metrics.paragraph: {"passage_retrieval_en", "passage_retrieval_zh"},
        metrics.number: {"passage_count"},
        metrics.code_similarity: {"lcc", "repobench-p"},
    }


@pytest.mark.parametrize(
    ("module", "score"),
    [
        ("rouge", lambda: metrics.rouge_l("a", "a")),
        ("rouge", lambda: needle.rouge_l("a")),
        ("jieba", lambda: metrics.f1_zh("a", "a")),
        ("thefuzz", lambda: metrics.code_similarity("a", "a")),
    ],
)
def test_a_missing_package_is_named(module, score, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.fuzz", raising=False)
    with pytest.raises(UsageError, match=f"pip install {module}$"):
        score()
