"""Prompts of the long-context tasks: length, questions and reproducibility."""

import argparse
import ast
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.tasks import kv, lines, needle
from megatron_cream.evaluation.tasks.filler import (
    Haystack,
    LazyList,
    draw_distinct,
    find_strings,
    fit,
    load_sentences,
    split_sentences,
)
from megatron_cream.evaluation.tasks.ruler import niah
from megatron_cream.evaluation.tasks.ruler import suite as ruler
from megatron_cream.evaluation.tasks.task import Example
from tests.task_tokenizers import NAMES, tokenizer

ROOT = Path(__file__).parents[2]
GENERATED = [task for task in ruler.TASKS if not task.startswith("qa_")]


def make(task: str, lengths, *, tokens=None, seed=0, per_cell=1):
    """Build the examples of a task, or of RULER's task of that name."""
    tokens = tokens or tokenizer("sentencepiece")
    if task == "needle":
        return list(needle.examples(tokens, lengths=lengths, depths=[0, 0.3, 1], seed=seed, per_cell=per_cell))
    if task == "lines":
        return list(lines.examples(tokens, lengths=lengths, seed=seed, per_cell=per_cell))
    if task == "kv":
        return list(kv.examples(tokens, keys=[], lengths=lengths, seed=seed, per_cell=per_cell))
    return list(ruler.examples(tokens, lengths=lengths, tasks=[task], seed=seed, per_cell=per_cell))


# Patterns of the unit of filler in each task's prompts; the test below measures the longest one in tokens.
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
    """Prompt and answer fit, and the unused tokens are too few for another unit of filler."""
    tokens = tokenizer(name)
    for example in make(task, [1300, 5001], tokens=tokens):
        room = example.length - example.max_new_tokens - len(tokens.encode(example.prompt))
        units = re.findall(UNITS.get(task, r"\S+ "), example.prompt)
        longest = max(len(tokens.encode(unit)) for unit in set(units))
        # Another word in cwe is added 3 times (once below 4096 tokens) and can lengthen numbers;
        # another step of fwe can add a word of each rank.
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
    """An example does not depend on the other lengths and counts, nor on global random state."""
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
    """The hash seed has no effect, so that a run can resume by example names."""
    code = (
        "import hashlib\n"
        "from megatron_cream.evaluation.tasks import kv, lines, needle\n"
        "from megatron_cream.evaluation.tasks.ruler import suite as ruler\n"
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
    score = {"needle": needle, "lines": lines, "kv": kv}.get(task, ruler).score
    for example in make(task, [1500], per_cell=2):
        wrong = [answer[::-1] if answer[::-1] != answer else "x" for answer in example.answers]
        assert score(example, f" {', '.join(example.answers)}. And then more text") == 1
        assert score(example, f" {', '.join(wrong)}.") == 0
        assert score(example, "") == 0


# needle


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", needle.KINDS)
def test_needle_lies_at_its_depth(name, kind):
    """The needle is between two sentences, as near to the depth (in tokens of filler) as they allow."""
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


def test_samples_of_the_sandwich_have_their_own_filler():
    """The fact is always the same, so that samples with the same filler would be one prompt, counted several times."""
    options = dict(lengths=[900, 1200], depths=[0.5, 1], needle="sandwich")
    first = list(needle.examples(tokenizer("byte-level"), **options))
    made = list(needle.examples(tokenizer("byte-level"), per_cell=6, **options))
    fillers = {example.prompt.replace(needle._SANDWICH, "")[:400] for example in made if example.depth == 1}
    assert len({example.prompt for example in made}) == len(made) == 24 and len(fillers) == 6
    assert [example for example in made if example.name.endswith("/0")] == first
    assert list(needle.examples(tokenizer("byte-level"), per_cell=6, seed=1, **options))[1].prompt != made[1].prompt
    more = {each.name: each for each in needle.examples(tokenizer("byte-level"), per_cell=8, **options)}
    assert all(more[example.name] == example for example in made)


def test_needle_scoring():
    (number,) = needle.examples(tokenizer("byte-level"), lengths=[700], depths=[0.5])
    assert needle.score(number, f"1{number.answers[0]}") == 0  # a longer number is wrong
    (fact,) = needle.examples(tokenizer("byte-level"), lengths=[700], depths=[0.5], needle="sandwich")
    assert needle.score(fact, " Eat a SANDWICH at Dolores Park") == pytest.approx(4 / 7)
    assert needle.score(fact, "parking, sitting, eating, sandwiches, sundays") == 0


def test_needle_rouge_l():
    """Calculated by hand: the sentence has 19 distinct words; the common subsequence is 'eat a sandwich'."""
    target = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
    assert needle.rouge_l(f"{target}\n{target}") == pytest.approx(1)
    words = set(target.rstrip(".").split())
    precision, recall = 3 / 3, 3 / len(words)
    assert needle.rouge_l("eat a sandwich\nand more") == pytest.approx(2 * precision * recall / (precision + recall))
    assert needle.rouge_l("") == needle.rouge_l(" ...\n") == 0


def test_grid():
    assert needle.build_grid(1024, 32700, 10, 6) == (
        [1024, 4543, 8063, 11582, 15102, 18621, 22141, 25660, 29180, 32700],
        pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]),
    )
    assert needle.build_grid(100, 100, 5, 1) == ([100], [0])


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
    """Outputs of LongChat-7b-16k at 680 lines get the verdicts of LongEval."""
    assert lines.score(Example("", "", (str(label),), 35, 0), output) == right


def kv_pairs(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """Return the pairs, parsed as JSON, and the requested key."""
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
    # The requested pair is the same at every position.
    assert len({example.answers for example in made if example.part == "75_keys"}) == 1


# Filler


def test_standard_library_filler():
    found = load_sentences()
    assert len(set(found)) == len(found) and sum(map(len, found)) > 500_000
    assert all(sentence == " ".join(sentence.split()) != "" for sentence in found)


def test_strings_are_found_in_the_order_of_ast_walk():
    tree = ast.parse(Path(argparse.__file__).read_bytes())
    walked = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert list(find_strings(tree)) == walked


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
    """The pieces join to the first words of the repeated sentences; cuts are at the nearest sentence start."""

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
    drawn = LazyList(draw_distinct(lambda: rng.randint(0, 30)))
    five = drawn.first(5)
    assert drawn.first(20)[:5] == five == drawn.first(5) and len(set(drawn.first(31))) == 31
