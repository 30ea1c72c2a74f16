"""RULER's tasks: published settings, answers and scores."""

import contextlib
import re
from collections import Counter

import numpy as np
import pytest
from scipy.special import zeta

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.tasks.ruler import niah
from megatron_cream.evaluation.tasks.ruler import suite as ruler
from tests.evaluation.test_tasks import GENERATED, make


def test_published_settings():
    """Compare (haystack, key kind, value kind, keys, values, queries) with RULER's scripts/synthetic.yaml."""
    published = {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }
    ours = {name: (s.haystack, s.key, s.value, s.keys, s.values, s.queries) for name, s in niah.SETTINGS.items()}
    assert ours == published
    assert len(ruler.TASKS) == 13
    answers = {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(published, 128)
    assert {task: make(task, [1200])[0].max_new_tokens for task in GENERATED} == answers


@pytest.mark.parametrize("task", niah.SETTINGS)
def test_needles_answer_the_question(task):
    setting = niah.SETTINGS[task]
    kinds = {
        "words": r"[a-z]+-[a-z]+",
        "numbers": r"[1-9]\d{6}",
        "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    }
    depths = set()
    for example in make(task, [1600], per_cell=8):
        context, question = example.prompt.rsplit("\n", 1)
        found = re.findall(r"A special magic \w+ of (\S+) is: (\S+)\.", context)
        assert all(re.fullmatch(kinds[setting.key], key) for key, _ in found)
        assert all(re.fullmatch(kinds[setting.value], value) for _, value in found)
        values = {}
        for key, value in found:
            values.setdefault(key, []).append(value)
        assert len({value for _, value in found}) == len(found)  # answers are unique
        asked = re.search(r" of (.*) that the text mentions\?", question).group(1)
        asked = [key for key in re.split(r", and |, ", asked)]
        assert len(asked) == setting.queries
        assert sorted(example.answers) == sorted(value for key in asked for value in values[key])
        assert all(len(values[key]) == setting.values for key in values) or setting.haystack == "needle"
        assert question.endswith(" is" if len(example.answers) == 1 else " are")
        if setting.haystack == "needle":
            assert len(found) > 10
        else:
            assert len(found) == setting.keys * setting.values
        if example.depth is not None:
            at = context.index(example.answers[0]) / len(context)
            assert at == pytest.approx(example.depth, abs=0.2)
            depths.add(example.depth)
    assert (len(depths) > 3) == (setting.keys * setting.values == 1)


def test_variables_have_the_value():
    """Interpreting the assignments gives the answers."""
    asked_for = set()
    for example in make("vt", [2000], per_cell=5):
        solved, asked = example.prompt.split("\n\nRemember", 1)
        for problem, answers in ((asked, list(example.answers)), (solved, solved.split(":")[-1].split())):
            values = {}
            for name, value in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+)$", problem, re.MULTILINE):
                assert name not in values
                values[name] = values.get(value, value)  # a variable is assigned after its source
            value = re.search(r"have the value (\d{5}) in", problem).group(1)
            assert [name for name in values if values[name] == value] == answers and len(answers) == 5
            asked_for.add(value)
        assert {len(name) for name in example.answers} == {5}
    assert len(asked_for) > 5


@pytest.mark.parametrize(("length", "times"), [(2000, (6, 1)), (6000, (30, 3))])
def test_common_words_are_the_most_common(length, times):
    for example in make("cwe", [length], per_cell=3):
        problem = example.prompt.rsplit("Below is", 1)[1].split("\nQuestion")[0].split("\n")[1]
        listed = re.findall(r"(\d+)\. ([a-z-]+)", problem)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {counts[word] for word in example.answers} == {times[0]} and len(example.answers) == 10
        assert {counts[word] for word in counts if word not in example.answers} == {times[1]}
        solved = example.prompt.split("\nBelow is")[0]
        solved_list, answer = solved.split("\nQuestion")[0], solved.rsplit(":", 1)[1]
        common = {word for word, _ in Counter(re.findall(r"\d+\. ([a-z-]+)", solved_list)).most_common(10)}
        assert set(re.findall(r"\d+\. ([a-z-]+)", answer)) == common
        assert not common & set(counts)


@pytest.mark.parametrize("length", [600, 1000, 3000, 20000])
def test_coded_words_follow_the_zeta_distribution(length):
    for example in make("fwe", [length], per_cell=3):
        text = example.prompt.split("most often. ")[1].split("\nQuestion")[0].split()
        counts = Counter(text).most_common()
        assert counts[0][0] == "..."
        assert tuple(word for word, _ in counts[1:4]) == example.answers
        by_rank = [times for _, times in counts]
        assert len(set(by_rank[:4])) == 4 and by_rank[3] > by_rank[4]
        # Exactly these counts follow from some size N.
        ranks = np.arange(1, 200)
        sizes = range(by_rank[0], 2 * by_rank[0])
        published = [(size * ranks**-2.0 / zeta(2)).astype(int) for size in sizes]
        assert any([int(n) for n in times if n] == by_rank for times in published)


def test_shortest_coded_texts_have_one_answer():
    """At the shortest lengths that fit, the five most common words have distinct counts."""
    made = []
    for length in range(300, 700, 7):
        with contextlib.suppress(UsageError):
            made += make("fwe", [length])
    assert 20 < len(made) < 57
    for example in made:
        text = example.prompt.split("most often. ")[1].split("\nQuestion")[0].split()
        times = [n for _, n in Counter(text).most_common(5)]
        assert times == sorted(set(times), reverse=True)


def test_effective_length():
    assert ruler.effective_length({4096: 90, 8192: 86, 16384: 85.6, 32768: 70}) == 16384
    assert ruler.effective_length({32768: 90, 4096: 90, 8192: 85.5}) == 4096  # stops at the first failure
    assert ruler.effective_length({4096: 50, 8192: 90}) is None
    assert ruler.effective_length({}) is None
    assert ruler.effective_length({4096: 50, 8192: 90}, threshold=50) == 8192


def test_string_match():
    (example,) = make("niah_multiquery", [1500])
    first, second = example.answers[:2]
    assert ruler.score(example, f"{first} and {second}") == 0.5
    (common,) = make("cwe", [1500])
    assert ruler.score(common, " ".join(common.answers).upper()) == 1
