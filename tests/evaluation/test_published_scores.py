"""Scores equal the published ones: RULER's string match and mean, LongBench's chat prompts and code similarity."""

import json
import sys
from difflib import SequenceMatcher
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.evaluation import pictures, report
from megatron_cream.evaluation.results import SUMMARY, open_results
from megatron_cream.evaluation.runner import Generation, Plan, run_task
from megatron_cream.evaluation.tasks import longbench
from megatron_cream.evaluation.tasks import longbench_metrics as metrics
from megatron_cream.evaluation.tasks.ruler import suite as ruler
from megatron_cream.evaluation.tasks.task import Example
from tests.evaluation_models import Knows, is_picture, save_llama, small_tokenizer
from tests.evaluation_models import run_evaluate as run

PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
"""Data sets whose prompts LongBench's pred.py leaves out of the chat template."""


def record(part: str, length: int, score: float) -> dict:
    return {"part": part, "length": length, "depth": None, "score": score}


# RULER


@settings(max_examples=200, deadline=None)
@given(st.text("aB7 \t\n\x00\x1f\x20", max_size=9), st.lists(st.text("ab7\n ", min_size=1, max_size=3), min_size=1))
def test_ruler_matches_in_the_stripped_output(output, answers):
    """As in RULER's evaluate.py and constants.py.

    Strip, replace control characters by line feeds, strip again, and ignore case.
    """
    shown = "".join("\n" if ord(letter) < 32 else letter for letter in output.strip()).strip().lower()
    found = [shown.find(answer.lower()) >= 0 for answer in answers]
    for part, expected in (("vt", sum(found) / len(found)), ("qa_1", max(found) * 1.0)):
        assert ruler.score(Example("x", "", tuple(answers), 1, 1, part=part), output) == expected


def test_ruler_without_control_characters_finds_no_blank_at_the_edge():
    asked = Example("x", "", ("1944 ",), 1, 1, part="qa_1")
    assert ruler.score(asked, "in 1944 and later") == 1
    assert ruler.score(asked, " 1944 ") == 0  # stripped, as published


def test_effective_length_is_of_thirteen_tasks(tmp_path):
    whole = [record(task, length, 1.0) for task in ruler.TASKS for length in (4096, 8192)]
    without_qa = [r for r in whole if not r["part"].startswith("qa_")]
    one_less = [r for r in whole if (r["part"], r["length"]) != ("cwe", 8192)]
    for records, length, missing, title in (
        (whole, 8192, [], "effective length 8,192 (at least 85.6 %)"),
        (without_qa, None, ["qa_1", "qa_2"], "mean over 11 of 13 tasks, no effective length"),
        (one_less, None, ["cwe"], "mean over 12 of 13 tasks, no effective length"),
    ):
        summary = report.summarise("ruler", records)
        assert summary["effective_length"] == length and summary["missing_tasks"] == missing
        assert summary["tasks"] == 13 - len(missing) and summary["threshold"] == (None if missing else 0.856)
        shown = report.build_table("ruler", summary).title
        assert shown.endswith(title) and ("85.6" in shown) == (not missing)
        pictures.draw("ruler", summary, tmp_path / "picture.png")
        assert is_picture(tmp_path / "picture.png")
    failed = report.summarise("ruler", [r | {"score": 0.8} for r in whole])
    assert report.build_table("ruler", failed).title.endswith("effective length below the shortest (at least 85.6 %)")


# LongBench


def test_few_shot_and_code_prompts_stay_plain(tmp_path):
    """With --chat, exactly these prompts reach the model without the chat template."""
    tokenizer = small_tokenizer(tmp_path)
    for name in longbench.DATASETS:
        fields = {"input": f"about {name}", "context": "text", "answers": ["a"], "all_classes": None, "_id": "0"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(fields) + "\n")
    made = list(longbench.examples(tokenizer, folder=tmp_path, length=2000))
    asked = {}
    model = Knows(tokenizer, {})

    def generate(prompts, *args, **kwargs):
        (ids,) = prompts
        asked[len(asked)] = tokenizer.decode(ids)
        return [[]]

    model.generate = generate
    plan = Plan(made, len(made), None, lambda example, output: {"score": 0.0})
    with open_results(tmp_path / "out", settings={}, model={}, model_path=tmp_path, overwrite=False) as results:
        run_task(lambda: model, plan, Generation(batch_size=1, chat=True), results)
    plain = {text for text in asked.values() if "<user>" not in text}
    expected = {tokenizer.decode(tokenizer.encode_prompt(e.prompt)) for e in made if e.part in PLAIN}
    assert len(asked) == 21 and plain == expected and len(plain) == 6


def matched(a: str, b: str) -> int:
    """Count the characters that Ratcliff and Obershelp match: the longest common block, then both sides of it."""
    blocks = ((n, i, j) for i in range(len(a)) for j in range(len(b)) for n in [common(a[i:], b[j:])])
    n, i, j = max(blocks, key=lambda block: (block[0], -block[1], -block[2]), default=(0, 0, 0))
    return n + matched(a[:i], b[:j]) + matched(a[i + n :], b[j + n :]) if n else 0


def common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(max_examples=100, deadline=None)
@given(st.text("ab(= ", max_size=9), st.text("ab(= ", min_size=1, max_size=9))
def test_code_similarity_of_both_kinds(output, answer):
    """fuzzywuzzy without python-Levenshtein follows the definition, and never exceeds the score with it."""
    both = Fraction(200 * matched(output, answer), len(output) + len(answer))
    ours = metrics.code_similarity_by_difflib(output, answer)
    assert ours == pytest.approx(float(both) / 100, abs=0.00501)
    assert ours <= metrics.code_similarity(output, answer)


def test_code_similarities_differ(monkeypatch):
    """Pairs reported by users of fuzzywuzzy and thefuzz score differently with and without python-Levenshtein."""
    for output, answer, indel, by_difflib in (
        ("tide", "diet", 0.5, 0.25),
        ("A L I E N S", "A S A L", 0.44, 0.33),
        ("cadb", "abc", 0.57, 0.29),
    ):
        asked = Example("x", "", (answer,), 1, 1, part="lcc_e")
        assert longbench.score(asked, output) == longbench.score(asked, output, "indel") == indel
        assert longbench.score(asked, f"# comment\n{output}\nmore", "difflib") == by_difflib
    monkeypatch.setitem(sys.modules, "thefuzz", None)
    monkeypatch.delitem(sys.modules, "thefuzz.fuzz", raising=False)
    assert longbench.score(asked, "cadb", "difflib") == 0.29  # needs no package
    long = "x = 1; " * 60
    assert metrics.code_similarity_by_difflib(long + "y", long) == round(
        SequenceMatcher(None, long + "y", long).ratio(), 2
    )


# Results of earlier versions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "hf")


LONGBENCH = "longbench --length 1500 --data {0}/data".split()
PERPLEXITY = "perplexity --dataset {0}/texts.jsonl --lengths 60 --stride 30 --short-context".split()


@pytest.mark.parametrize(
    ("flags", "refusal", "same"),
    [
        ("ruler --lengths 700 --samples 1 --tasks vt".split(), "answers_stripped false, not true", None),
        ([*LONGBENCH, "--chat"], 'plain_datasets [], not ["trec"]', None),
        ([*LONGBENCH, "--code-similarity", "difflib"], 'code_similarity "indel", not "difflib"', LONGBENCH),
        ([*PERPLEXITY, "20"], "longppl_bos true, not false", [*PERPLEXITY, "20", "--longppl-bos"]),
        ([*PERPLEXITY, "99", "--convention", "pose"], 'convention "ours", not "pose"', [*PERPLEXITY, "99"]),
    ],
)
def test_results_of_earlier_versions_are_not_mixed(monkeypatch, capsys, tmp_path, model, flags, refusal, same):
    """A folder without the newer settings resumes if their values match; otherwise the error names the setting."""
    (tmp_path / "data").mkdir()
    fields = {"input": "Type:", "context": "text", "answers": ["A"], "all_classes": ["A"], "_id": "0"}
    (tmp_path / "data" / "trec.jsonl").write_text(json.dumps(fields) + "\n")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "some words of a long text " * 30}) + "\n")

    def evaluate(given) -> tuple[int, str]:
        given = [flag.format(tmp_path) for flag in given]
        capsys.readouterr()
        code = run(monkeypatch, *given, "--model", model, "--output", tmp_path / "out")
        return code, capsys.readouterr().err

    assert evaluate(same or flags)[0] == 0
    file = tmp_path / "out" / SUMMARY
    summary = json.loads(file.read_text())
    new = {"answers_stripped", "code_similarity", "convention", "longppl_bos", "plain_datasets"}
    settings_before = {key: value for key, value in summary["settings"].items() if key not in new}
    file.write_text(json.dumps(summary | {"settings": settings_before}))
    if same:
        assert evaluate(same)[0] == 0
        file.write_text(json.dumps(summary | {"settings": settings_before}))
    code, said = evaluate(flags)
    assert code == 2 and refusal in said.splitlines()[-1] and "--overwrite" in said
    assert evaluate([*flags, "--overwrite"])[0] == 0
