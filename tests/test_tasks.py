"""Prompts of the long-context tasks: their size, what they ask, and that nothing else changes them."""

import contextlib
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import zeta

from megatron_cream.errors import UsageError
from megatron_cream.evaluation.task import Example
from megatron_cream.evaluation.tasks import TASKS, kv, lines, needle, ruler
from megatron_cream.evaluation.tasks.filler import Drawn, Haystack, distinct, fit, sentences, split_sentences
from megatron_cream.evaluation.tasks.ruler import niah
from tests.task_tokenizers import NAMES, tokenizer

ROOT = Path(__file__).parents[1]
GENERATED = [task for task in ruler.TASKS if not task.startswith("qa_")]


def make(task: str, lengths, *, tokens=None, seed=0, per_cell=1):
    """Examples of a task by its name, or of RULER's task of that name."""
    tokens = tokens or tokenizer("sentencepiece")
    if task == "needle":
        return list(needle.examples(tokens, lengths=lengths, depths=[0, 0.3, 1], seed=seed, per_cell=per_cell))
    if task == "lines":
        return list(lines.examples(tokens, lengths=lengths, seed=seed, per_cell=per_cell))
    if task == "kv":
        return list(kv.examples(tokens, keys=[], lengths=lengths, seed=seed, per_cell=per_cell))
    return list(ruler.examples(tokens, lengths=lengths, tasks=[task], seed=seed, per_cell=per_cell))


# The longest unit of filler in a prompt, as a pattern; the sizes below are in tokens of it.
UNITS = {
    "lines": r"line \S+: REGISTER_CONTENT is <\d+>\n",
    "kv": r'"[0-9a-f-]{36}": "[0-9a-f-]{36}",\n ',
    "vt": re.escape(niah.NOISE) + "\n",
    "niah_single_1": re.escape(niah.NOISE) + "\n",
    "niah_multikey_2": r"A special magic .*\.\n",
    "niah_multikey_3": r"A special magic .*\.\n",
    "cwe": r"\d+\. [\w-]+ ",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["needle", "lines", "kv", *GENERATED])
def test_prompts_fill_their_length(task, name):
    """Prompt and answer fit, and the room left is less than one unit of filler more would take."""
    tokens = tokenizer(name)
    for example in make(task, [1300, 5001], tokens=tokens):
        room = example.length - example.max_new_tokens - len(tokens.encode(example.prompt))
        units = re.findall(UNITS.get(task, r"\S+ "), example.prompt)
        longest = max(len(tokens.encode(unit)) for unit in set(units))
        # A word more of cwe comes 3 times (once below 4096 tokens) and makes numbers longer; one
        # more step of fwe can add a word of each rank.
        times = {"cwe": 4, "fwe": 6}.get(task, 1)
        assert 0 <= room < times * longest + 4, (example.name, room, longest)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=40, max_size=200),
    header=st.integers(0, 30),
    least=st.integers(1, 5),
    guess=st.one_of(st.none(), st.integers(0, 400)),
    share=st.floats(0, 0.99),
)
def test_fit_is_the_largest_that_fits(sizes, header, least, guess, share):
    totals = np.cumsum(sizes) + header
    budget = int(share * totals[-1])
    calls = []

    class Ones:
        def encode(self, text):
            calls.append(text)
            return [0] * int(text)

    def prompt(n: int) -> str:
        return str(totals[n - 1] if n <= len(totals) else totals[-1] + 50 * (n - len(totals)))

    def call() -> int:
        return fit(Ones(), prompt, task="t", length=budget + 7, max_new_tokens=7, least=least, guess=guess)

    if totals[least - 1] > budget:
        with pytest.raises(UsageError, match=f"{budget + 7}: too short for t, which takes {totals[least - 1] + 7}"):
            call()
    else:
        assert call() == max(n for n in range(1, len(totals) + 1) if totals[n - 1] <= budget)
        assert len(calls) <= 40


@pytest.mark.parametrize("task", ["needle", "lines", "kv", *GENERATED])
def test_examples_depend_on_nothing_else(task):
    """The same example whatever other lengths and numbers are asked for, and no global random state."""
    before = random.getstate(), np.random.get_state()[1].tolist()
    alone = make(task, [1400])
    more = {example.name: example for example in make(task, [2100, 1400], per_cell=2)}
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert len(more) == 4 * len(alone)
    assert all(more[example.name] == example for example in alone)
    assert len({example.prompt for example in more.values()}) == len(more)
    other = make(task, [1400], seed=1)
    assert [example.name for example in other] == [example.name for example in alone]
    assert all(a.answers != b.answers for a, b in zip(alone, other, strict=True))


def test_examples_are_the_same_in_every_process():
    """Whatever the hash seed: a run resumes by name."""
    code = (
        "import hashlib\n"
        "from megatron_cream.evaluation.tasks import kv, lines, needle, ruler\n"
        "class Bytes:\n"
        "    def encode(self, text): return list(text.encode())\n"
        "made = [*needle.examples(Bytes(), lengths=[6000], depths=[0.5]), *lines.examples(Bytes(), lengths=[6000])]\n"
        "made += [*kv.examples(Bytes()), *ruler.examples(Bytes(), lengths=[9000])]\n"
        "print(len(made), hashlib.sha256(repr(made).encode()).hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PATH": ""},
        )
        for seed in ("1", "2")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout and runs[0].stdout.startswith("23 ")


@pytest.mark.parametrize("task", ["needle", "lines", "kv", *GENERATED])
def test_gold_scores_1_and_wrong_0(task):
    score = TASKS[task if task in TASKS else "ruler"].score
    for example in make(task, [1500], per_cell=2):
        wrong = [answer[::-1] if answer[::-1] != answer else "x" for answer in example.answers]
        assert score(example, f" {', '.join(example.answers)}. And then more text") == 1
        assert score(example, f" {', '.join(wrong)}.") == 0
        assert score(example, "") == 0


# needle


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", needle.KINDS)
def test_needle_lies_at_its_depth(name, kind):
    """By token offset in the filler, as near as the sentences allow; and between two of them."""
    tokens = tokenizer(name)
    depths = np.linspace(0, 1, 9).tolist()
    made = needle.examples(tokens, lengths=[1500, 7000], depths=depths, needle=kind)
    fact = r"\n(The special magic number of \w+ is \d+\.|The best thing to do in San Francisco is eat .*\.)\n"
    for example in made:
        filler = example.prompt.split("\n", 2)[2].rsplit("\n\n", 1)[0]
        before, _, after = re.split(fact, f"\n{filler}\n")
        counts = [len(tokens.encode(part)) for part in (before, after)]
        longest = max(len(tokens.encode(sentence)) for sentence in split_sentences(f"{before} {after}"))
        assert abs(counts[0] - example.depth * sum(counts)) <= longest / 2 + 0.02 * sum(counts)
        if 0 < example.depth < 1:
            assert re.search(r"[.!?][\"')\]]*$", before.strip())
        assert example.depth > 0 or not before.strip()
        assert example.depth < 1 or not after.strip()


def test_needle_scoring():
    (number,) = needle.examples(tokenizer("byte-level"), lengths=[700], depths=[0.5])
    assert needle.score(number, f"1{number.answers[0]}") == 0  # a longer number is another one
    (fact,) = needle.examples(tokenizer("byte-level"), lengths=[700], depths=[0.5], needle="sandwich")
    assert needle.score(fact, " Eat a SANDWICH at Dolores Park") == pytest.approx(4 / 7)
    assert needle.score(fact, "parking, sitting, eating, sandwiches, sundays") == 0


def test_needle_rouge_l():
    """By hand: 19 different words in the sentence; the longest common subsequence is 'eat a sandwich'."""
    target = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
    assert needle.rouge_l(f"{target}\n{target}") == pytest.approx(1)
    words = set(target.rstrip(".").split())
    precision, recall = 3 / 3, 3 / len(words)
    assert needle.rouge_l("eat a sandwich\nand more") == pytest.approx(2 * precision * recall / (precision + recall))
    assert needle.rouge_l("") == needle.rouge_l(" ...\n") == 0


def test_grid():
    assert needle.grid(1024, 32700, 10, 6) == (
        [1024, 4543, 8063, 11582, 15102, 18621, 22141, 25660, 29180, 32700],
        pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]),
    )
    assert needle.grid(100, 100, 5, 1) == ([100], [0])


# lines and key-value pairs


def test_lines_are_as_asked():
    tokens = tokenizer("sentencepiece")
    made = list(lines.examples(tokens, lengths=[2000], lines=[2, 30], per_cell=20))
    for example in made:
        record = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", example.prompt, re.MULTILINE)
        names = [name for name, _ in record]
        assert len(set(names)) == len(names) and all(1 <= int(number) <= 50_000 for _, number in record)
        asked = re.search(r"line (\S+): REGISTER_CONTENT is$", example.prompt).group(1)
        assert example.answers == (dict(record)[asked],)
        assert example.depth == pytest.approx(names.index(asked) / (len(names) - 1))
        if example.part:
            assert len(record) == int(example.part.removesuffix("_lines"))
            assert example.length == len(tokens.encode(example.prompt)) + example.max_new_tokens
    assert {example.depth for example in made if example.part == "2_lines"} == {0, 1}
    depths = [example.depth for example in made if example.part != "2_lines"]
    assert min(depths) < 0.25 and max(depths) > 0.75


def test_lines_scoring():
    (example,) = lines.examples(tokenizer("sentencepiece"), lines=[5])
    gold = example.answers[0]
    assert lines.score(example, f" <{gold}>\nline b: REGISTER_CONTENT is <1>") == 1
    assert lines.score(example, f" <1{gold}>") == lines.score(example, f"1, or {gold}") == 0
    assert lines.score(example, "no number") == 0


@pytest.mark.parametrize(
    ("label", "output", "right"),
    [
        (49425, "The <REGISTER\\_CONTENT> in line ancient-race is 49425.", 1),
        (37818, "The <REGISTER\\_CONTENT> in line decisive-array is <37818>.", 1),
        (46892, 'The <REGISTER\\_CONTENT> in line itchy-thorn is "48515".', 0),
        (47059, "The <REGISTER\\_CONTENT> in line curious-bark is 47058.", 0),
    ],
)
def test_lines_scoring_of_published_outputs(label, output, right):
    """LongChat-7b-16k's at 680 lines, with LongEval's verdicts."""
    assert lines.score(Example("", "", (str(label),), 35, 0), output) == right


def kv_pairs(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """The pairs, by json, and the key asked for."""
    text = prompt[prompt.index("{") : prompt.rindex("}") + 1]
    return json.loads(text, object_pairs_hook=list), re.search(r'Key: "(.*)"', prompt).group(1)


def test_kv_pairs_are_as_asked():
    tokens = tokenizer("sentencepiece")
    made = list(kv.examples(tokens, keys=[75, 140, 9], lengths=[1500]))
    places = {}
    for example in made:
        pairs, key = kv_pairs(example.prompt)
        values = dict(pairs)
        assert len(values) == len(pairs) and len(set(values.values())) == len(pairs)
        assert example.answers == (values[key],)
        place = [name for name, _ in pairs].index(key)
        assert example.depth == pytest.approx(place / (len(pairs) - 1))
        places.setdefault(example.part, []).append(place)
        if example.part:
            assert example.part == f"{len(pairs)}_keys"
            assert example.length == len(tokens.encode(example.prompt)) + example.max_new_tokens
    assert places["75_keys"] == [0, 18, 37, 54, 74]
    assert places["140_keys"] == [0, 34, 69, 104, 139]
    assert places["9_keys"] == [0, 2, 4, 6, 8]
    assert places[""] == sorted(set(places[""])) and places[""][0] == 0
    # The same pair is asked for at every place.
    assert len({example.answers for example in made if example.part == "75_keys"}) == 1


# RULER


def test_published_settings():
    """scripts/synthetic.yaml: (haystack, keys' kind, values' kind, keys, values, queries)."""
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
        assert len({value for _, value in found}) == len(found)  # an answer is unique
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
    """An interpreter of the assignments finds the answers."""
    asked_for = set()
    for example in make("vt", [2000], per_cell=5):
        solved, asked = example.prompt.split("\n\nRemember", 1)
        for problem, answers in ((asked, list(example.answers)), (solved, solved.split(":")[-1].split())):
            values = {}
            for name, value in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+)$", problem, re.MULTILINE):
                assert name not in values
                values[name] = values.get(value, value)  # assigned after what it takes its value from
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
        # Some size N gives just these counts.
        ranks = np.arange(1, 200)
        sizes = range(by_rank[0], 2 * by_rank[0])
        published = [(size * ranks**-2.0 / zeta(2)).astype(int) for size in sizes]
        assert any([int(n) for n in times if n] == by_rank for times in published)


def test_shortest_coded_texts_have_one_answer():
    """Where they begin to fit, no two of the first five ranks tie."""
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
    assert ruler.effective_length({32768: 90, 4096: 90, 8192: 85.5}) == 4096  # a failure is not passed over
    assert ruler.effective_length({4096: 50, 8192: 90}) is None
    assert ruler.effective_length({}) is None
    assert ruler.effective_length({4096: 50, 8192: 90}, threshold=50) == 8192


def test_string_match():
    (example,) = make("niah_multiquery", [1500])
    first, second = example.answers[:2]
    assert ruler.score(example, f"{first} and {second}") == 0.5
    (common,) = make("cwe", [1500])
    assert ruler.score(common, " ".join(common.answers).upper()) == 1


# Filler


def test_standard_library_filler():
    found = sentences()
    assert len(set(found)) == len(found) and sum(map(len, found)) > 500_000
    assert all(sentence == " ".join(sentence.split()) != "" for sentence in found)


@settings(deadline=None)
@given(st.text(alphabet="aB.!?\"') \n", max_size=80))
def test_split_sentences_keeps_the_words(text):
    found = split_sentences(text)
    assert " ".join(found).split() == text.split()
    assert all(re.search(r"[.!?]", sentence) for sentence in found[:-1])


def test_split_sentences():
    text = 'One is e.g. here. "Two!" Three?\nYes (four.) Five'
    assert split_sentences(text) == ["One is e.g. here.", '"Two!"', "Three?", "Yes (four.)", "Five"]


@settings(deadline=None)
@given(
    found=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    words=st.integers(1, 60),
    depths=st.lists(st.floats(0, 1), max_size=4),
)
def test_haystack_split(found, words, depths):
    """The pieces are the first words, sentences repeating; cuts are at the nearest sentence's start."""

    class Words:
        def encode(self, text):
            return text.split()

    texts = [" ".join(f"{i}.{k}" for k in range(size)) for i, size in enumerate(found)]
    pieces = Haystack(Words(), texts).split(words, sorted(depths))
    endless = " ".join(texts * words).split()
    assert " ".join(filter(None, pieces)).split() == endless[:words]
    starts = [i for i in range(words) if endless[i].endswith(".0")] + [words]
    cut = 0
    for depth, piece in zip(sorted(depths), pieces, strict=False):
        cut += len(piece.split())
        assert cut in starts
        assert math.isclose(abs(cut - depth * words), min(abs(s - depth * words) for s in starts), abs_tol=1e-6)


def test_drawn_begins_with_fewer():
    rng = random.Random(0)
    drawn = Drawn(distinct(lambda: rng.randint(0, 30)))
    five = drawn.first(5)
    assert drawn.first(20)[:5] == five == drawn.first(5) and len(set(drawn.first(31))) == 31
