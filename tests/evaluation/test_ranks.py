"""tools/evaluate.py with several ranks: the results of one rank, resuming at another number of ranks, bad layouts."""

import json
import re
from pathlib import Path

import psutil
import pytest
import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation import fit
from megatron_cream.evaluation import ranks as ranks_module
from megatron_cream.evaluation.models import language_model
from megatron_cream.evaluation.parts import PartResults
from megatron_cream.evaluation.ranks import Ranks
from megatron_cream.evaluation.results import RESULTS, SUMMARY, open_results
from tests.evaluation_fixtures import alone, models
from tests.evaluation_models import run_evaluate as run_alone
from tests.faults.kill import wait_for
from tests.forked_commands import FRESH_TORCHRUN
from tests.launch import ROOT, torchrun
from tests.processes import ending_with_test

__all__ = ["alone", "models"]  # fixtures
SCRIPT = ROOT / "tools" / "evaluate.py"
SPLIT = "--tensor-model-parallel-size"
NEEDLE = "needle --min-length 300 --max-length 500 --length-steps 2 --depth-steps 3 --samples 2 --batch-size 1".split()


def read_results(folder: Path) -> tuple[bytes, dict]:
    """Return results.jsonl and the results of summary.json; no other rank's file may be left."""
    assert sorted(file.name for file in folder.iterdir()) == ["picture.png", RESULTS, SUMMARY]
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["finished"]
    return (folder / RESULTS).read_bytes(), summary["results"]


@pytest.mark.parametrize(
    "ranks, engine",
    [
        (2, []),
        *(
            pytest.param(n, flags, marks=pytest.mark.slow)
            for n, flags in [(4, [SPLIT, 2]), (2, ["--context-parallel-size", 2])]
        ),
    ],
    ids=["dp2", "tp2-dp2", "cp2"],
)
def test_ranks_have_the_results_of_one(monkeypatch, models, tmp_path, ranks, engine):
    """Both files are equal, byte for byte, and only one rank prints; TP 2 runs the folder in Megatron-Core."""
    assert run_alone(monkeypatch, *NEEDLE, "--model", models["ckpt"], "--output", tmp_path / "one") == 0
    found = torchrun(ranks, *NEEDLE, *engine, "--model", models["hf"], "--output", tmp_path / "many", script=SCRIPT)
    assert found.returncode == 0, found.stderr[-3000:]
    assert read_results(tmp_path / "many") == read_results(tmp_path / "one")
    assert found.stdout.count("numbers: summary.json") == 1
    used = json.loads((tmp_path / "many" / SUMMARY).read_text())["model"]["engine"]
    assert used == ("megatron" if engine else "transformers")


@pytest.mark.slow
def test_a_killed_rank_ends_all(monkeypatch, models, tmp_path):
    """torchrun ends the others, and one rank resumes with the results of both."""
    flags = [*NEEDLE, "--samples", 20, "--batch-size", 2, "--model", models["hf"], "--output", tmp_path / "out"]
    command = [*FRESH_TORCHRUN, "--nproc_per_node=2", SCRIPT, *flags]

    def both_have_results() -> bool:
        files = list((tmp_path / "out").glob("results*.jsonl"))
        return len(files) == 2 and all(file.stat().st_size for file in files)

    with open(tmp_path / "log", "w") as log:
        process = psutil.Popen(ending_with_test(command), stdout=log, stderr=log, cwd=tmp_path)
    wait_for(both_have_results, process)
    ranks = [child for child in process.children(recursive=True) if str(SCRIPT) in child.cmdline()]
    ranks[-1].kill()
    assert process.wait(60) == 1 and not any(rank.is_running() for rank in ranks)
    kept = {line for file in (tmp_path / "out").glob("results*.jsonl") for line in read_names(file)}
    assert run_alone(monkeypatch, *flags) == 0
    assert kept <= set(read_names(tmp_path / "out" / RESULTS)[: len(kept)])
    assert len(read_results(tmp_path / "out")[0].splitlines()) == 120


def read_names(file: Path) -> list[str]:
    """Return the names in the complete lines of a results file."""
    return [json.loads(line)["name"] for line in file.read_bytes().split(b"\n")[:-1]]


@pytest.mark.slow
def test_perplexity_on_ranks_is_that_of_one(monkeypatch, models, tmp_path):
    """Perplexity and LongPPL agree within rounding, with documents shared out and with TP 2 x CP 2."""
    texts = tmp_path / "texts.jsonl"
    text = (ROOT / "LICENSE").read_text()
    texts.write_text("".join(json.dumps({"text": text[begin:]}) + "\n" for begin in (0, 500, 1000)))
    flags = ["perplexity", "--dataset", texts, "--lengths", 150, 300, "--stride", 70, "--model", models["ckpt"]]
    flags += ["--short-context", 128, "--short-block", 50, "--alpha", 0.05, "--beta", -9]
    assert run_alone(monkeypatch, *flags, "--output", tmp_path / "one") == 0
    expected = read_results(tmp_path / "one")[1]
    for ranks, name, more in ((2, "dp", []), (4, "tp-cp", [SPLIT, 2, "--context-parallel-size", 2])):
        found = torchrun(ranks, *flags, *more, "--output", tmp_path / name, script=SCRIPT)
        assert found.returncode == 0, found.stderr[-3000:]
        measured = read_results(tmp_path / name)[1]
        for length, row in expected.items():
            assert measured[length]["tokens"] == row["tokens"] > 0 and row["key_tokens"] > 0
            assert measured[length]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
            assert measured[length]["longppl"] == pytest.approx(row["longppl"], rel=1e-3)


def test_one_rank_resumes_what_two_left(monkeypatch, models, tmp_path):
    """The results of a killed rank are merged, also behind a line that it did not finish, and not computed again."""
    flags = [*NEEDLE, "--model", models["hf"], "--output", tmp_path]
    assert run_alone(monkeypatch, *flags) == 0
    lines = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
    description = json.loads((tmp_path / SUMMARY).read_text())
    options = dict(settings=description["settings"], model=description["model"], model_path=models["hf"])
    (tmp_path / RESULTS).write_text("".join(lines[:5]))
    with open_results(tmp_path, **options, overwrite=False) as results:
        part = PartResults(tmp_path, 1, results.run, [])
    record = {key: value for key, value in json.loads(lines[9]).items() if key != "crc32"}
    part.add(record | {"output": "KEPT"}, (1, 2, 0))
    part.add(json.loads(lines[10]), (1, 3, 0))
    part.close()
    (path,) = tmp_path.glob("results.rank1.*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    assert run_alone(monkeypatch, *flags) == 0
    kept = read_results(tmp_path)[0].decode().splitlines(keepends=True)
    assert kept[:5] == lines[:5] and '"output": "KEPT"' in kept[5] and '"order"' not in kept[5]
    assert sorted(kept[6:]) == sorted([*lines[5:9], *lines[10:]])


def test_a_part_of_another_run_is_not_merged(tmp_path):
    """A part with other settings, or one that --overwrite replaces, does not become a result."""
    options = dict(model={}, model_path=tmp_path)
    record = {"name": "a", "part": "", "length": 1, "depth": None, "score": 1.0}
    with open_results(tmp_path, settings={"seed": 0}, overwrite=False, **options) as results:
        results.add(record | {"name": "b"})
        part = PartResults(tmp_path, 1, results.run, [])
    part.add(record, (0, 0, 0))
    part.close()
    with open_results(tmp_path, settings={"seed": 1}, overwrite=True, **options) as results:
        assert list(tmp_path.glob("results.rank*"))  # until the first new result is on disk
        results.add(record | {"name": "c"})
        assert not list(tmp_path.glob("results.rank*")) and list(results.records) == ["c"]
    with open_results(tmp_path, settings={"seed": 1}, overwrite=False, **options) as results:
        assert list(results.records) == ["c"]


def test_wrong_layouts_are_one_line(monkeypatch, models, tmp_path, capsys):
    """An unusable number of ranks, engine or size ends with one line before anything is loaded."""
    monkeypatch.setattr(ranks_module.rendezvous, "open_store", lambda *_: None)
    monkeypatch.setattr(language_model, "load", None)
    needle = [*NEEDLE, "--model", models["hf"], "--output", tmp_path / "out"]
    for world_size, flags, words in [
        (1, [*needle, SPLIT, 2], f"{SPLIT} 2: needs 2 ranks. Start torchrun --nproc_per_node=2"),
        (6, [*needle, SPLIT, 4], f"{SPLIT} 4: torchrun's 6 ranks cannot be shared out. Use --nproc_per_node=4."),
        (
            2,
            [*needle, SPLIT, 2, "--context-parallel-size", 2],
            f"{SPLIT} 2 --context-parallel-size 2: torchrun's 2 ranks",
        ),
        (3, [*needle, SPLIT, 3], f"{SPLIT} 3: the model has 4 attention heads, 2 key heads and "),
        (2, [*needle, "--engine", "vllm"], "--engine vllm: vLLM starts its own processes. Start it without torchrun"),
        (2, ["compare", tmp_path, tmp_path], "compare: runs in one process. Start it without torchrun."),
    ]:
        variables = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=world_size, MASTER_ADDR="localhost", MASTER_PORT=1)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        assert run_alone(monkeypatch, *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"evaluate.py: error: {words}")
    assert not (tmp_path / "out").exists()


def test_memory_is_checked_before_loading(models):
    """Llama-2-7B's 256K take 12.5 + 128 GiB; the flags that the message advises fit."""
    config = json.loads((models["hf"] / "config.json").read_text())
    config |= dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    config |= dict(num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    folder = models["hf"].parent / "7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    source = language_model.Source(folder, None, None, "megatron", torch.bfloat16)
    options = dict(tokens=262144, memory=80 * fit.GIB)
    with pytest.raises(UsageError) as caught:
        fit.describe_fit(source, Ranks(), batch=4, **options)
    assert "12.6 GiB of weights and 512.0 GiB of keys and values (262,144 tokens x 4)" in str(caught.value)
    advice = re.search(r"nproc_per_node=(\d) with --tensor-model-parallel-size (\d)\.$", str(caught.value))
    assert advice and advice[1] == advice[2] == "8"
    line = fit.describe_fit(source, Ranks(0, 8, 8), batch=4, **options)
    assert (
        line
        == "8 GPUs a model: 1.6 GiB of weights and 64.0 GiB of keys and values (262,144 tokens x 4) on each GPU of 80 GiB"
    )
    with pytest.raises(UsageError, match=r"Use --batch-size 1\.$"):
        fit.describe_fit(source, Ranks(0, 4, 4), batch=4, **options)
    assert fit.describe_fit(source, Ranks(0, 4, 4), batch=1, **options).startswith("4 GPUs a model: 3.1 GiB of weights")
