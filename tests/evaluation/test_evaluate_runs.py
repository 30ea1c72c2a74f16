"""Evaluation runs with a model that does not compute: scores, batches, memory errors, results, means, pictures."""

import json
import math
import re
import shutil

import pytest

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation import pictures, plans, report
from megatron_cream.evaluation.comparison import measures
from megatron_cream.evaluation.comparison.sides import read_pairs
from megatron_cream.evaluation.models.generation import derive_seed
from megatron_cream.evaluation.results import RESULTS, SUMMARY, open_results
from megatron_cream.evaluation.runner import Generation, OutOfMemory, Plan, report_out_of_memory, run_task
from megatron_cream.evaluation.tasks.task import Example
from tests.evaluation.test_comparison import write_result
from tests.evaluation_models import Knows, is_picture, records_of, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def all_plans(tokenizer) -> dict[str, Plan]:
    common = dict(samples=2, seed=0)
    nothing = dict(haystack=None, squad=None, hotpotqa=None)
    return {
        "needle": plans.plan_needle(
            tokenizer, lengths=[400, 700], depths=[0, 0.5, 1], kind="number", haystack=None, **common
        ),
        "lines": plans.plan_lines(tokenizer, lengths=[500, 900], lines_counts=[], files=[], **common),
        "kv": plans.plan_kv(tokenizer, keys=[4, 6], lengths=[600], gold=None, files=[], **common),
        "ruler": plans.plan_ruler(tokenizer, lengths=[1500, 1800], tasks=None, **nothing, **common),
    }


@pytest.mark.parametrize("task", ["needle", "lines", "kv", "ruler"])
def test_gold_answers_score_one(tokenizer, tmp_path, task):
    """Gold answers score 1 and wrong answers 0 everywhere, and the counts equal the plan's."""
    plan = all_plans(tokenizer)[task]
    examples = list(plan.examples)
    assert len(examples) == plan.count and sum(e.length for e in examples) == plan.tokens
    assert len({example.name for example in examples}) == plan.count
    assert [draft.name for draft in plan.list_drafts()] == [example.name for example in examples]
    answers = {e.prompt: " " + ", ".join(e.answers) for e in examples}
    for name, said, expected in (("all", answers, 1.0), ("none", dict.fromkeys(answers, " no"), 0.0)):
        again = all_plans(tokenizer)[task]
        with open_results(tmp_path / name, settings={}, model={}, model_path=tmp_path, overwrite=False) as results:
            model = Knows(tokenizer, said)
            records = run_task(lambda model=model: model, again, Generation(batch_size=3), results)
        assert [record["name"] for record in records] == [example.name for example in examples]
        summary = report.summarise(task, records)
        assert summary["score"] == expected and summary["examples"] == plan.count
        if task == "ruler":
            assert summary["effective_length"] is None and summary["missing_tasks"] == ["qa_1", "qa_2"]
            assert set(summary["by_task"]) == {e.part for e in examples} and len(summary["by_task"]) == 11
        pictures.draw(task, summary, tmp_path / f"{name}.png")
        assert is_picture(tmp_path / f"{name}.png")
        assert report.build_table(task, summary).row_count > 0


def some_examples(count: int) -> list[Example]:
    """Build prompts of unsorted, distinct lengths."""
    return [Example(f"e{i}", "word " * (i * 7 % count + 1) + str(i), ("yes",), 5, 100 + i) for i in range(count)]


def plan_of(examples: list[Example]) -> Plan:
    return Plan(iter(examples), len(examples), None, lambda example, output: {"score": float("yes" in output)})


def test_batches_are_of_like_lengths(tokenizer, tmp_path):
    """Every example runs once, in batches sorted by length, with a seed that depends on its name only."""
    examples = some_examples(23)
    model = Knows(tokenizer, {example.prompt: " yes" for example in examples})
    with open_results(tmp_path, settings={}, model={}, model_path=tmp_path, overwrite=False) as results:
        records = run_task(lambda: model, plan_of(examples), Generation(batch_size=4, seed=9), results)
    assert [record["name"] for record in records] == [example.name for example in examples]
    assert model.batches == sorted(model.batches) and max(map(len, model.batches)) == 4
    flat = [length for batch in model.batches for length in batch]
    assert flat == sorted(flat) and len(flat) == 23
    assert model.seeds == {tuple(tokenizer.encode_prompt(e.prompt)): derive_seed(9, e.name) for e in examples}


def test_out_of_memory_prints_one_line_and_keeps_results(tokenizer, tmp_path):
    examples = some_examples(20)
    answers = {example.prompt: " yes" for example in examples}
    options = dict(settings={}, model={}, model_path=tmp_path, overwrite=False)
    with open_results(tmp_path, **options) as results:
        model = Knows(tokenizer, answers, fails_at=12)
        with pytest.raises(OutOfMemory) as caught:
            run_task(lambda: model, plan_of(examples), Generation(batch_size=2), results)
    words = re.match(r"out of memory at (\d+) tokens x 2: try a smaller --batch-size, a smaller", str(caught.value))
    assert words and int(words[1]) >= 12 and "\n" not in str(caught.value)
    done = records_of(tmp_path)
    assert 0 < len(done) < 20 and all(record["prompt_tokens"] < 12 for record in done)
    with open_results(tmp_path, **options) as results:
        model = Knows(tokenizer, answers)
        assert len(run_task(lambda: model, plan_of(examples), Generation(batch_size=2), results)) == 20
    assert sum(map(len, model.batches)) == 20 - len(done)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1")])
def test_memory_of_the_host_runs_out(error):
    with pytest.raises(OutOfMemory, match="^out of memory at 9 tokens x 1: try a smaller --prefill-chunk"):
        with report_out_of_memory(9, 1):
            raise error
    with pytest.raises(NotImplementedError, match="no kernel"), report_out_of_memory(9, 1):
        raise NotImplementedError("no kernel")  # a RuntimeError by inheritance


def test_other_errors_are_not_called_memory(tokenizer, tmp_path):
    examples = some_examples(2)
    model = Knows(tokenizer, {})
    with open_results(tmp_path, settings={}, model={}, model_path=tmp_path, overwrite=False) as results:
        with pytest.raises(KeyError):
            run_task(lambda: model, plan_of(examples), Generation(batch_size=2), results)
        model.generate = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("an illegal memory access"))
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run_task(lambda: model, plan_of(examples), Generation(batch_size=2), results)


def test_means_are_grouped_by_task_parameter():
    def record(score, part="", length=0, depth=None):
        return {"score": score, "part": part, "length": length, "depth": depth}

    needle = report.summarise(
        "needle",
        [record(1.0, length=10, depth=0.25), record(0.0, length=10, depth=0.25), record(1.0, length=20, depth=1.0)],
    )
    assert needle["by_length_and_depth"] == {"10": {"0.25": 0.5}, "20": {"1": 1.0}}
    assert needle["score"] == 2 / 3
    kv = report.summarise(
        "kv", [record(1.0, "75_keys", 9, 0.0), record(0.0, "75_keys", 8, 0.0), record(0.5, "", 30, 1)]
    )
    assert kv["by_position"] == {"75_keys": {"0": 0.5}, "30": {"1": 0.5}}
    # The mean is over tasks, not over examples.
    scores = {
        ("vt", 10): [1, 1, 1],
        ("cwe", 10): [0.8],
        ("vt", 20): [0.8],
        ("cwe", 20): [0.8],
        ("vt", 40): [1],
        ("cwe", 40): [1],
    }
    ruler = report.summarise("ruler", [record(s, part, n) for (part, n), many in scores.items() for s in many])
    assert ruler["by_length"] == {"10": 0.9, "20": 0.8, "40": 1.0} and ruler["tasks"] == 2
    longbench = report.summarise("longbench", [record(1.0, "a"), record(0.0, "a"), record(0.0, "a"), record(1.0, "b")])
    assert longbench["score"] == pytest.approx((1 / 3 + 1) / 2)


def test_kv_by_length_has_five_places(tokenizer, tmp_path):
    """The number of pairs that fit differs by example, and with it the exact depth of a place."""
    plan = plans.plan_kv(tokenizer, keys=[], lengths=[900], gold=None, files=[], samples=8, seed=0)
    examples = [draft.build() for draft in plan.list_drafts()]
    assert len({example.depth for example in examples}) > 5
    records = [
        {"name": e.name, "part": e.part, "length": e.length, "depth": e.depth, "score": 1.0, "prompt_tokens": 800}
        for e in examples
    ]
    means = report.summarise("kv", records)["by_position"]
    assert means == {"900": {"0": 1.0, "0.25": 1.0, "0.5": 1.0, "0.75": 1.0, "1": 1.0}}
    for side in ("base", "extended"):
        write_result(tmp_path / side, "kv", records, model=side)
    (tables,) = measures.compare(read_pairs(tmp_path / "base", tmp_path / "extended")).tables.values()
    rows = [(row.names, row.examples) for row in tables[1].rows]
    assert rows == [(("900", f"{percent} %"), 8) for percent in (0, 25, 50, 75, 100)]


def test_no_key_token_gives_null():
    summary = {"8": {"perplexity": math.e, "tokens": 5, "longppl": None, "key_tokens": 0}}
    table = report.build_table("perplexity", summary)
    assert [list(column.cells) for column in table.columns] == [["8"], ["2.718"], ["5"], ["-"], ["0"]]


def test_one_run_at_a_time(tmp_path):
    options = dict(settings={}, model={}, model_path=tmp_path, overwrite=False)
    with open_results(tmp_path / "out", **options):
        with pytest.raises(UsageError, match="another run is writing there now"):
            with open_results(tmp_path / "out", **options):
                pass
    with open_results(tmp_path / "out", **options):
        pass


def test_damaged_results_are_rejected(tmp_path):
    options = dict(settings={}, model={}, model_path=tmp_path, overwrite=False)
    good = {"name": "a", "score": 1.0, "part": "", "length": 9, "depth": None}
    with open_results(tmp_path / "out", **options) as results:
        results.add(good)
        results.finish({})
    line = (tmp_path / "out" / RESULTS).read_text()
    wrong = [
        "not json",
        '{"name": "b"}',
        "[" * 100_000,
        json.dumps(good | {"name": 5}),
        json.dumps(good | {"score": "1"}),
        json.dumps(good | {"score": 2}),
        json.dumps(good | {"depth": "x"}),
        json.dumps(good | {"length": None}),
        '{"name": "b", "lengths": 5}',
        '{"name": "b", "lengths": {"x": {"nll": 1, "tokens": 1}}}',
        '{"name": "b", "lengths": {"8": {"nll": 1}}}',
        '{"name": "b", "lengths": {"8": {"nll": "1", "tokens": 1}}}',
    ]
    for name, text, reason in [
        *((RESULTS, f"{line}{text}\n{line}", "line 2: not a result") for text in wrong),
        (SUMMARY, "{", "summary.json cannot be read"),
        (SUMMARY, "[" * 100_000, "summary.json cannot be read"),
        (SUMMARY, None, "results.jsonl has no summary.json"),
    ]:
        folder = tmp_path / f"{reason[:6]}"
        shutil.copytree(tmp_path / "out", folder)
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
        data = {file.name: file.read_bytes() for file in folder.iterdir() if file.name == RESULTS}
        with pytest.raises(UsageError, match=re.escape(reason)):
            with open_results(folder, **options):
                pass
        assert data == {file.name: file.read_bytes() for file in folder.iterdir() if file.name == RESULTS}
        shutil.rmtree(folder)
