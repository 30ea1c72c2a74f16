"""evaluate.py suite: lists of evaluations, what is left out, resuming, and the comparison of two suites."""

import json
import re
import shlex
import shutil

import pytest
import torch

from megatron_cream.commands import evaluate as command
from megatron_cream.commands import suite
from megatron_cream.common import devices
from megatron_cream.common.errors import NotAvailable, UsageError
from megatron_cream.evaluation.comparison import measures
from megatron_cream.evaluation.comparison.sides import read_pairs
from megatron_cream.evaluation.flags import build_parser
from megatron_cream.evaluation.results import SUMMARY
from megatron_cream.evaluation.suites import SUITE, SUITES, Options, list_runs
from tests.evaluation.test_comparison import change_settings, needles, questions, write_result
from tests.evaluation_models import records_of, save_llama, save_own_task, save_tokenizer
from tests.evaluation_models import run_evaluate as run
from tests.hf_models import save_model

SHORT = ["boolq", "piqa", "winogrande", "truthfulqa_mc2", "hellaswag", "arc_challenge"]
NAMES = {
    "short": SHORT,
    "long": ["ruler", "needle", "kv", "lines", "longbench2", "babilong_4k", "babilong_8k"],
    "paper": ["lines", "kv", "needle", "longbench", "perplexity", *SHORT],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "hf")


def states_of(folder) -> dict[str, str]:
    return {each["name"]: each["state"] for each in json.loads((folder / SUITE).read_text())["runs"]}


@pytest.mark.parametrize("name", SUITES)
def test_every_evaluation_of_a_suite_is_a_command(name, tmp_path):
    """All flags of each run parse, and the published numbers of examples are asked for."""
    words = ["suite", name, "hf", "--lengths", 4096, 8192, "--samples", 3, "--limit", 5, "--haystack", tmp_path]
    words += ["--dataset", "books", "--longbench", "LongBench", "--engine", "vllm", "--enforce-eager", "--chat"]
    words += ["--kv-cache-dtype", "fp8"]
    args = build_parser("").parse_args(list(map(str, words)))
    runs = list_runs(name, Options(args.lengths, *(getattr(args, each) for each in list(Options.__annotations__)[1:])))
    assert [each.name for each in runs] == NAMES[name] and not any(each.missing for each in runs)
    shots = {}
    for each in runs:
        parsed = build_parser("").parse_args([*each.words, *suite._list_flags(args, each.words[0])])
        assert parsed.model == "hf" and getattr(parsed, "enforce_eager", True)
        assert parsed.kv_cache_dtype == "fp8"
        if parsed.command == "harness":
            assert parsed.limit == 5 and each.dataset
            shots[each.name] = parsed.num_fewshot
        elif parsed.command == "needle":
            assert (parsed.min_length, parsed.max_length, parsed.samples) == (1024, 8192, 3)
    if name != "long":
        assert shots == dict.fromkeys(SHORT) | {"hellaswag": 10, "arc_challenge": 25}
    else:
        assert json.dumps({"max_seq_lengths": "8k"}) in runs[-1].words


@pytest.mark.slow
def test_a_suite_with_what_is_at_hand(monkeypatch, model, tmp_path, capsys):
    """Two tasks have data; the others are left out by name. A finished suite runs nothing again."""
    for name in ("boolq", "hellaswag"):
        save_own_task(tmp_path, name)
    monkeypatch.setattr(suite, "_has_dataset", lambda name: False)
    flags = ["suite", "short", model, "--include-path", tmp_path, "--limit", 6, "--output", tmp_path / "short"]
    assert run(monkeypatch, *flags) == 0
    shown = capsys.readouterr()
    assert states_of(tmp_path / "short") == {
        name: "finished" if name in ("boolq", "hellaswag") else "left out" for name in SHORT
    }
    assert "piqa left out: baber/piqa is not in the local cache, and huggingface.co is out of reach" in shown.err
    for each in json.loads((tmp_path / "short" / SUITE).read_text())["runs"]:
        if each["state"] == "finished":
            scores = [record["score"] for record in records_of(tmp_path / "short" / each["name"])]
            assert len(scores) == 6 and each["score"] == pytest.approx(sum(scores) / 6)
    settings = json.loads((tmp_path / "short" / "hellaswag" / SUMMARY).read_text())["settings"]
    assert settings["num_fewshot"] == 10
    advice = shlex.split(next(line for line in shown.out.splitlines() if line.startswith("Next: ")))
    assert build_parser("").parse_args(advice[advice.index("suite") :]).suite == "short"
    monkeypatch.setitem(command.RUNS, "harness", None)
    assert run(monkeypatch, *flags) == 0


def test_a_suite_leaves_out_what_its_tokenizer_cannot_do(monkeypatch, tmp_path, capsys):
    """The paper's perplexity starts with a BOS, which SmolLM2's tokenizer does not put before a text."""
    model = save_llama(tmp_path / "model", bos=False)
    (tmp_path / "books.txt").write_text("A sentence of a book. " * 400)
    monkeypatch.setattr(suite, "_has_dataset", lambda name: False)
    for name in ("lines", "kv", "needle"):
        monkeypatch.setitem(command.RUNS, name, lambda args: write_result(args.output, args.command, [], results={}))
    flags = ["suite", "paper", model, "--lengths", 1024, "--samples", 1, "--dataset", tmp_path / "books.txt"]
    assert run(monkeypatch, *flags, "--output", tmp_path / "paper") == 0
    states = states_of(tmp_path / "paper")
    assert states["perplexity"] == "left out" and states["lines"] == "finished"
    assert "perplexity left out: --convention cream: the tokenizer of --model puts no BOS" in capsys.readouterr().err


def test_failures_and_missing_files(monkeypatch, model, tmp_path, capsys):
    """A failed evaluation does not stop the others, and runs again; what is missing is named."""
    asked, broken = [], {"lines": UsageError("--lengths: too short"), "kv": NotAvailable("needs a package")}

    def fake(args):
        asked.append(args.command)
        if args.command in broken:
            raise broken[args.command]
        if not args.output.exists():
            write_result(args.output, args.command, [], results={"score": 0.5})

    for name in ("lines", "kv", "needle", "harness"):
        monkeypatch.setitem(command.RUNS, name, fake)
    monkeypatch.setattr(suite, "_has_dataset", lambda name: name == "baber/piqa")
    flags = ["suite", "paper", model, "--lengths", 1024, "--output", tmp_path]
    assert run(monkeypatch, *flags) == 2
    shown = capsys.readouterr().err
    assert "lines failed: --lengths: too short" in shown and "kv left out: needs a package" in shown
    assert (
        "longbench left out: --longbench is missing" in shown and "perplexity left out: --dataset is missing" in shown
    )
    assert shown.endswith("error: suite paper: lines failed. The same command runs only these again\n")
    assert asked == ["lines", "kv", "needle", "harness"]
    broken.clear()
    assert run(monkeypatch, *flags) == 0
    broken |= {"lines": UsageError("again"), "kv": KeyboardInterrupt()}
    changed = json.loads((tmp_path / SUITE).read_text())
    for state in changed["runs"][:2]:  # lines and kv
        state["state"] = "failed"
    (tmp_path / SUITE).write_text(json.dumps(changed))
    assert run(monkeypatch, *flags) == 130
    assert states_of(tmp_path)["needle"] == "finished", "an interruption keeps what is finished"
    broken.clear()
    assert run(monkeypatch, *flags) == 0
    assert asked[4:] == ["lines", "kv"] * 3 and list(states_of(tmp_path).values()).count("finished") == 4

    assert run(monkeypatch, "suite", "short", model, "--output", tmp_path) == 2
    assert "has results of suite paper. Give another folder, or --overwrite" in capsys.readouterr().err
    monkeypatch.setattr(suite, "_has_dataset", lambda name: False)
    assert run(monkeypatch, "suite", "short", model, "--output", tmp_path / "none") == 2
    assert "suite short: nothing was run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_an_evaluation_without_memory_does_not_stop_the_others(monkeypatch, model, tmp_path, capsys, error):
    def fake(args):
        if args.command == "lines":
            raise error
        write_result(args.output, args.command, [], results={"score": 0.5})

    for name in ("lines", "kv", "needle", "harness"):
        monkeypatch.setitem(command.RUNS, name, fake)
    assert run(monkeypatch, "suite", "paper", model, "--lengths", 1024, "--output", tmp_path) == 2
    assert re.search(r"lines failed: .*memory", capsys.readouterr().err)
    assert states_of(tmp_path)["lines"] == "failed" and states_of(tmp_path)["needle"] == "finished"


def test_flags_that_every_evaluation_rejects_are_one_line_at_the_start(monkeypatch, model, tmp_path, capsys):
    def start(args):
        raise UsageError("started")

    for name in ("ruler", "needle", "kv", "lines", "harness"):
        monkeypatch.setitem(command.RUNS, name, start)
    monkeypatch.setattr(suite, "_has_dataset", lambda name: True)
    monkeypatch.setattr(devices, "has_cuda", lambda: False)
    output = ["--lengths", 1024, "--output", tmp_path / "out"]
    plain, sliding = shutil.copytree(model, tmp_path / "plain"), tmp_path / "sliding"
    (plain / "chat_template.jinja").unlink()
    save_model(sliding, "mistral", sliding_window=32)
    save_tokenizer(sliding)
    (tmp_path / "prose.txt").write_text("A sentence of prose.")
    capsys.readouterr()
    for name, folder, flags, words in (
        ("long", model, ["--cuda-graphs"], "--cuda-graphs: there is no GPU here. Leave the flag out"),
        ("long", model, ["--enforce-eager"], "--enforce-eager: only with --engine vllm"),
        ("short", model, ["--tensor-parallel-size", 2], "--tensor-parallel-size 2: only with --engine vllm"),
        ("paper", model, ["--gpu-memory-utilization", 0.5], "--gpu-memory-utilization 0.5: only with --engine vllm"),
        ("short", plain, ["--chat"], "--chat: the model's tokenizer has no chat template"),
        ("short", model, ["--kv-cache-dtype", "fp8"], "fp8: lm_eval with transformers keeps"),
        ("long", sliding, ["--kv-cache-dtype", "fp8"], "fp8: no layer of this model attends to the whole text"),
        ("short", model, ["--include-path", tmp_path / "none"], f"--include-path {tmp_path / 'none'}: no such folder"),
        ("long", model, ["--haystack", tmp_path / "none"], f"--haystack {tmp_path / 'none'}: no such folder"),
    ):
        assert run(monkeypatch, "suite", name, folder, *output, *flags) == 2, flags
        shown = capsys.readouterr()
        assert shown.err.startswith("evaluate.py: error: ") and shown.err.count("\n") == 1 and words in shown.err, shown
        assert not shown.out and not (tmp_path / "out").exists(), flags

    for flags in (["--no-cuda-graphs", "--kv-cache-dtype", "fp8"], ["--chat", "--haystack", tmp_path]):
        assert run(monkeypatch, "suite", "long", model, *output, *flags) == 2
        assert "needle failed: started" in capsys.readouterr().err, flags
    monkeypatch.setattr(devices, "has_cuda", lambda: True)
    assert run(monkeypatch, "suite", "long", model, *output, "--cuda-graphs") == 2
    line = "--cuda-graphs: only for a Megatron checkpoint and without --engine vllm; this model runs in transformers"
    assert line in capsys.readouterr().err


def test_two_suites_compare(tmp_path, monkeypatch, capsys):
    """Evaluations that only one side has are named and left out; other settings are still an error."""
    for side, names in (("base", ["needle", "piqa"]), ("extended", ["needle", "piqa", "boolq"])):
        folder = tmp_path / side / "short"
        runs = [{"name": name, "state": "finished"} for name in names] + [{"name": "arc", "state": "left out"}]
        for name in names:
            task, records = ("needle", needles(lambda *_: 1)) if name == "needle" else ("harness", questions(9))
            write_result(folder / name, task, records, model=side, settings={"tasks": [name]})
        (folder / SUITE).write_text(json.dumps({"suite": "short", "model": {}, "lengths": [], "runs": runs}))
    assert run(monkeypatch, "compare", tmp_path / "base", tmp_path / "extended", "--suite", "short") == 0
    assert "boolq is not compared: only EXTENDED has it" in capsys.readouterr().err
    assert (tmp_path / "extended" / "short" / "compare" / "comparison.md").is_file()
    sides = (tmp_path / "base" / "short", tmp_path / "extended" / "short")
    assert "harness: piqa" in [row.names[0] for row in measures.compare(read_pairs(*sides)).within]
    change_settings(sides[1] / "piqa", limit=7)
    with pytest.raises(UsageError, match="limit 7, in BASE .* with null"):
        read_pairs(*sides)
