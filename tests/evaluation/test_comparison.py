"""evaluate.py compare: confidence intervals against oracles, comparison pages, and one-line errors."""

import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats

from megatron_cream.checkpoint import card
from megatron_cream.commands import evaluate as command
from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.comparison import measures
from megatron_cream.evaluation.comparison.bootstrap import bootstrap_mean
from megatron_cream.evaluation.comparison.sides import read_pairs
from megatron_cream.evaluation.models.language_model import compute_digest
from megatron_cream.evaluation.result_lines import format_line
from megatron_cream.evaluation.results import FORMER_SETTINGS, RESULTS, SUMMARY
from tests import forked_commands
from tests.processes import ROOT

LENGTHS, DEPTHS = (4096, 8192), (0.0, 0.5, 1.0)
CARD = (
    f"---\nlibrary_name: transformers\n---\n\nMine.\n\n{card.BEGIN}\n\nNot measured yet.\n\n{card.END}\n\nMine too.\n"
)


def write_result(folder, task, records, *, model="base", settings=(), **changes):
    """Write a finished evaluate.py folder of a base model (4,096 positions) or its extension (8,192)."""
    folder.mkdir(parents=True)
    (folder / RESULTS).write_text("".join(map(format_line, records)))
    summary = {
        "settings": {"command": task, "tokenizer": None, "seed": 0, "lengths": list(LENGTHS), **dict(settings)},
        "model": {"format": "huggingface", "step": None, "digest": f"{model}-digest", "engine": "transformers",
                  "dtype": "float32"},
        "model_path": f"somewhere/{model}", "versions": {"gpu": "none"}, "tokenizer": "same",
        "positions": 4096 if model == "base" else 8192, "line_checksums": "crc32", "finished": True, "results": {},
    }  # fmt: skip
    (folder / SUMMARY).write_text(json.dumps(summary | changes))


def needles(found, count=4):
    """Return `count` records of each length and depth, scored by `found(length, number)`."""
    return [
        dict(name=f"needle/number/{length}/{depth:g}/{i}", part="number", length=length, depth=depth, prompt_tokens=99,
             output="", answers=["7"], score=float(found(length, i)))
        for length in LENGTHS for depth in DEPTHS for i in range(count)
    ]  # fmt: skip


def questions(right):
    return [dict(name=f"piqa/{i}", part="piqa", length=0, depth=None, metric="acc", prompt="h", score=float(i < right))
            for i in range(20)]  # fmt: skip


def documents(nll):
    rows = lambda i: {str(length): dict(nll=(nll + i / 100) * 1000, tokens=1000) for length in LENGTHS}
    return [dict(name=f"book/{i}", tokens=8192, lengths=rows(i)) for i in range(12)]


@pytest.fixture
def sides(tmp_path):
    """Write results of a base and an extended model, and return the two folders.

    The extended model finds more needles at 8,192 tokens, has lower perplexity and is worse at a short task.
    """
    base, extended = tmp_path / "base", tmp_path / "extended"
    write_result(base / "needle", "needle", needles(lambda length, i: length == 4096))
    write_result(extended / "needle", "needle", needles(lambda length, i: i < 3), model="extended")
    write_result(base / "harness", "harness", questions(18))
    write_result(extended / "harness", "harness", questions(9), model="extended")
    write_result(base / "perplexity", "perplexity", documents(3.0))
    write_result(extended / "perplexity", "perplexity", documents(2.0), model="extended")
    return base, extended


def run(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "compare", *map(str, flags)])
    return command.main()


def test_the_interval_is_that_of_all_resamples():
    """Three values have 27 resamples; a weighted mean is the ratio of two sums."""
    values, weights = np.array([0.0, 1.0, 4.0]), np.array([1.0, 2.0, 5.0])
    for these in (np.ones(3), weights):
        drawn = np.array(list(itertools.product(range(3), repeat=3)))
        means = (values * these)[drawn].sum(1) / these[drawn].sum(1)
        interval = bootstrap_mean(values, these)
        assert interval.mean == pytest.approx(np.average(values, weights=these))
        expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
        assert (interval.low, interval.high) == pytest.approx(tuple(expected))
    assert bootstrap_mean(values) == bootstrap_mean(values.copy())  # seeded
    assert bootstrap_mean(np.full(7, 0.1)).high == 0.1


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(5).normal(0.3, 2, size=300)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    ours, spread = bootstrap_mean(values), np.std(values) / np.sqrt(300)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * spread)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * spread)


class Page(HTMLParser):
    """Text of an HTML page and the addresses that a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        self.loaded += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_documented_command_writes_a_page(sides, tmp_path):
    """The documented command, run in another folder, writes numbers, pictures and a self-contained HTML file."""
    base, extended = sides
    model = tmp_path / "somewhere" / "extended"  # the path that the results name
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text(CARD)
    for folder in extended.iterdir():
        summary = json.loads((folder / SUMMARY).read_text())
        summary["model"]["digest"] = compute_digest([model])
        (folder / SUMMARY).write_text(json.dumps(summary))
    words = [*forked_commands.python(), ROOT / "tools" / "evaluate.py", "compare", "base", "extended"]
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    out = extended / "compare"

    page = (out / "comparison.md").read_text()
    gain = "| needle, beyond 4K | 12 | 0.0 | 75.0 | +75.0 | +50.0 to +100.0 | better |"
    cost = [
        "| needle, up to 4K | 12 | 100.0 | 75.0 | -25.0 | -50.0 to +0.0 | not clear |",
        "| perplexity, context 4K | 12 | 21.22 ppl | 7.81 ppl | -63.2 % | all alike | better |",
    ]
    assert gain in page.split("### Cost")[0] and all(line in page.split("### Cost")[1] for line in cost)
    assert re.search(r"\| harness: piqa \| 20 \| 90.0 \| 45.0 \| -45.0 \| -65.0 to -25.0 \| worse \|", page)
    assert "| 8K | 50 % | 4 | 0.0 | 75.0 | +75.0 | +25.0 to +100.0 | few examples |" in page
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert sorted(pictures) == sorted(path.name for path in out.glob("*.png")) and len(pictures) == 5
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)

    html = Page((out / "comparison.html").read_text())
    assert len(html.loaded) == 5 and all(value.startswith("data:image/png;base64,") for value in html.loaded)
    assert "needle, beyond 4K" in html.text and "+50.0 to +100.0" in html.text
    data = json.loads((out / "comparison.json").read_text())
    assert data["beyond_base_window"][0]["change"] == {"mean": 75.0, "low": 50.0, "high": 100.0}

    text = (model / "README.md").read_text()
    assert gain in text and "Not measured yet" not in text and "Compared with base (digest `base-digest`)" in text
    assert text.startswith(CARD[: CARD.index(card.BEGIN)]) and text.endswith(CARD[CARD.index(card.END) :])
    assert "README.md: results filled in" in result.stdout and "+50.0 to" in result.stdout


def test_rows_of_each_task(tmp_path):
    """Rows are sorted by length, size and depth, not by completion order; depths are rounded."""
    example = dict(depth=None, part="", length=8192, prompt_tokens=9, output="", answers=["7"])
    records = {
        "kv": [example | dict(name=f"kv/{keys}/{place}", part=f"{keys}_keys", depth=place / (keys - 1))
               for keys in (140, 75) for place in (keys // 2, 0)],
        "ruler": [example | dict(name=f"{task}/{length}", part=task, length=length)
                  for length in (8192, 4096) for task in ("vt", "cwe")],
        "lines": [example | dict(name=f"lines/{count}", part=f"{count}_lines") for count in (1000, 200)],
        "longbench": [example | dict(name=name, part=name, prompt_tokens=8000) for name in ("trec", "qasper")],
    }  # fmt: skip
    for side, score in (("base", 0.0), ("extended", 1.0)):
        for task, some in records.items():
            write_result(tmp_path / side / task, task, [each | {"score": score} for each in some], model=side)
    comparison = measures.compare(read_pairs(tmp_path / "base", tmp_path / "extended"))
    names = {
        title: [[" ".join(row.names) for row in table.rows] for table in tables]
        for title, tables in comparison.tables.items()
    }
    assert names == {
        "kv": [["75 keys", "140 keys"], ["75 keys 0 %", "75 keys 50 %", "140 keys 0 %", "140 keys 50 %"]],
        "ruler": [["4K", "8K"], ["cwe 4K", "cwe 8K", "vt 4K", "vt 8K"]],
        "lines": [["200 lines", "1000 lines"]],
        "longbench": [["qasper", "trec"]],
    }
    assert list(names) == ["kv", "lines", "ruler", "longbench"]
    assert [row.names[0] for row in comparison.beyond] == [f"{name}, beyond 4K" for name in names]
    assert [row.names[0] for row in comparison.within] == ["ruler, up to 4K"]


def test_longbench_is_sorted_by_its_prompts_and_weighs_data_sets_alike(tmp_path):
    """--length only limits prompts; answers of trec have 64 tokens, so 4,032 of the prompt just fit the window."""
    example = dict(depth=None, length=8192, output="", answers=["7"])
    sizes = [("trec_e", 4032, 30), ("qasper", 2000, 10), ("trec_e", 4033, 1), ("qasper", 8192, 3)]
    for side in ("base", "extended"):
        records = [example | dict(name=f"{part}/{tokens}/{i}", part=part, prompt_tokens=tokens,
                                  score=float(part == "trec_e" and side == "extended"))
                   for part, tokens, count in sizes for i in range(count)]  # fmt: skip
        write_result(tmp_path / side, "longbench", records, model=side)
    found = measures.compare(read_pairs(tmp_path / "base", tmp_path / "extended"))
    rows = [(row.names[0], row.examples, row.base.mean, row.extended.mean) for row in (*found.within, *found.beyond)]
    assert rows == [
        ("longbench, up to 4K", 40, 0, pytest.approx(50)),
        ("longbench, beyond 4K", 4, 0, pytest.approx(50)),
    ]
    assert found.within[0].change.low < 50 < found.within[0].change.high


def test_results_that_do_not_say_the_window(monkeypatch, sides):
    """Results of earlier versions have no window, so the page reports neither gains nor costs."""
    for folder in (*sides[0].iterdir(), *sides[1].iterdir()):
        summary = json.loads((folder / SUMMARY).read_text())
        del summary["positions"], summary["tokenizer"]
        (folder / SUMMARY).write_text(json.dumps(summary))
    assert run(monkeypatch, *sides, "--tasks", "needle", "harness") == 0
    page = (sides[1] / "compare" / "comparison.md").read_text()
    assert "### All lengths" in page and "| window | unknown | unknown |" in page and "beyond" not in page
    assert "| needle | 24 | 50.0 | 75.0 |" in page.split("### Short tasks")[0]


def change_summary(folder, **changes):
    file = folder / SUMMARY
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_settings(folder, **changes):
    change_summary(folder, settings=json.loads((folder / SUMMARY).read_text())["settings"] | changes)


def damage(folder):
    lines = (folder / RESULTS).read_text()
    (folder / RESULTS).write_text(lines.replace('"score": 1.0', '"score": 0.0', 1))


def drop(folder, count=1):
    lines = (folder / RESULTS).read_text().splitlines(keepends=True)
    (folder / RESULTS).write_text("".join(lines[count:]))


@pytest.mark.parametrize("side", [0, 1])
def test_results_of_earlier_versions(sides, side):
    """A setting that one side did not write down yet is equal if nothing of it changed; the page shows it."""
    change_settings(sides[side] / "perplexity", **FORMER_SETTINGS)
    assert [pair.task for pair in read_pairs(*sides)] == ["harness", "needle", "perplexity"]
    change_settings(sides[side] / "perplexity", convention="pose")
    ours, theirs = ('"pose"', '"ours"') if side else ('"ours"', '"pose"')
    with pytest.raises(UsageError, match=f"perplexity was run with convention {ours}, in BASE .* with {theirs}"):
        read_pairs(*sides)


def become_another_task(folder):
    change_settings(folder, command="kv")


BAD = {
    "a missing task": (
        lambda b, e: become_another_task(e / "needle"),
        r"EXTENDED: has no results of needle, which BASE has in .*base/needle\. Run evaluate.py needle with the other "
        r"model, or compare --tasks harness perplexity alone",
    ),
    "other lengths": (lambda b, e: change_settings(e / "needle", lengths=[4096]),
                      r"EXTENDED .*needle: needle was run with lengths \[4096\], in BASE .* with \[4096, 8192\]\. Run"),
    "another seed": (lambda b, e: change_settings(b / "needle", seed=3), r"with seed 0, in BASE .*needle with 3\. Run"),
    "another tokenizer": (lambda b, e: change_summary(e / "needle", tokenizer="other"), "another tokenizer than BASE"),
    "another prompt": (lambda b, e: [(e / "needle" / RESULTS).write_text("".join(format_line(
        record | {"prompt_tokens": 98}) for record in needles(lambda *_: 1)))], "has prompt_tokens 98, in BASE 99"),
    "unfinished": (lambda b, e: change_summary(b / "needle", finished=False),
                   "BASE .*needle: needle is not finished. Run its command again: it resumes"),
    "the same model": (lambda b, e: [change_summary(f, model={"digest": "base-digest", "format": "huggingface"})
                                     for f in [*b.iterdir(), *e.iterdir()]], "results of the same model as BASE"),
    "several models": (lambda b, e: change_summary(b / "needle", model={"digest": "x", "format": "huggingface"}),
                       "BASE .*base: harness and needle are results of different models"),
    "examples missing": (lambda b, e: drop(e / "needle"), r"1 examples are not in both .*EXTENDED lacks needle/number/"),
    "a damaged line": (lambda b, e: damage(e / "needle"), r"EXTENDED .*results.jsonl, line 1: .*checksum differs\)\. "
                       "Delete that line and run the evaluation again"),
    "no results": (lambda b, e: [(f / SUMMARY).unlink() for f in b.iterdir()], "BASE .*base: has no results"),
    "another summary": (lambda b, e: (b / "needle" / SUMMARY).write_text("{}"), "BASE .*is not from evaluate.py"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_sides_that_do_not_compare_are_one_line(monkeypatch, sides, capsys, name):
    change, message = BAD[name]
    change(*sides)
    assert run(monkeypatch, *sides) == 2
    said = capsys.readouterr().err
    assert re.match(rf"evaluate.py: error: .*{message}", said) and said.count("\n") == 1
    assert not (sides[1] / "compare").exists()


def test_what_the_lines_advise_works(monkeypatch, sides, capsys):
    """The advised flags work: --tasks with the common tasks, --overwrite of an old page, a new --output."""
    base, extended = sides
    for file in (extended / "needle").iterdir():
        file.unlink()
    assert run(monkeypatch, *sides) == 2
    tasks = re.search(r"compare (--tasks .*) alone", capsys.readouterr().err)[1].split()
    assert run(monkeypatch, *sides, *tasks) == 0
    assert "no model card was filled in: give --card" in capsys.readouterr().out
    assert run(monkeypatch, *sides, *tasks) == 2
    assert "Give a new folder, or --overwrite" in capsys.readouterr().err
    (extended / "compare" / "comparison.md").write_text("older")
    assert run(monkeypatch, *sides, *tasks, "--overwrite") == 0
    assert "needle" not in (extended / "compare" / "comparison.md").read_text()
    assert run(monkeypatch, base / "harness", extended / "harness", "--output", base / "page", "--card", base) == 2
    assert f"--card {base}: its README.md has no place for results" in capsys.readouterr().err
    assert run(monkeypatch, base / "harness", extended / "harness", "--output", base / "page") == 0


def test_text_of_files_is_shown_as_text(monkeypatch, sides, capsys):
    """Names in the results are escaped in HTML and Markdown."""
    evil = "<script>alert(1)</script>|[x](http://a)"
    for side, name in zip(sides, ("base", "extended"), strict=True):
        records = [record | {"part": evil} for record in questions(9)]
        write_result(side / "evil", "harness", records, model=name, settings={"limit": 20})
    assert run(monkeypatch, *sides, "--tasks", "harness") == 0
    html = Page((sides[1] / "compare" / "comparison.html").read_text())
    assert evil in html.text and all(value.startswith("data:") for value in html.loaded)
