"""tools/evaluate.py: complete runs on a small model in both formats, resuming, and one-line errors."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.models import language_model
from megatron_cream.evaluation.result_lines import format_line
from megatron_cream.evaluation.results import RESULTS, SUMMARY
from tests import task_tokenizers
from tests.evaluation_fixtures import alone, models
from tests.evaluation_models import POSITIONS, is_picture, records_of, save_llama, save_own_task, save_tokenizer
from tests.evaluation_models import run_evaluate as run

__all__ = ["alone", "models"]  # fixtures
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Write three documents; the second is too short to be evaluated."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    parts = [
        (ROOT / "megatron_cream" / "commands" / "evaluate.py").read_text(),
        "short",
        (ROOT / "LICENSE").read_text(),
    ]
    file.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return file


def summary_of(folder: Path) -> dict:
    return json.loads((folder / SUMMARY).read_text())


NEEDLE = "needle --min-length 400 --max-length 900 --length-steps 2 --depth-steps 3 --samples 2 --batch-size 3".split()
KV = "kv --keys 4 7 --samples 2 --gold 0 3".split()
RULER = "ruler --lengths 700 1000 --samples 1 --tasks niah_single_1 vt".split()
LINES = "lines --lengths 500 --samples 3 --temperature 0.8 --top-p 0.9 --seed 5".split()


@pytest.mark.parametrize("flags", [NEEDLE, KV, RULER, LINES], ids=lambda flags: flags[0])
def test_both_formats_of_a_model_give_the_same_results(monkeypatch, models, tmp_path, flags):
    """The records of both formats are equal, even with different chunks and batches."""
    assert run(monkeypatch, *flags, "--model", models["hf"], "--output", tmp_path / "hf") == 0
    other = ["--prefill-chunk", 100, "--batch-size", 2, "--output", tmp_path / "ckpt"]
    assert run(monkeypatch, *flags, "--model", models["ckpt"], *other) == 0
    hf, ckpt = ({record["name"]: record for record in records_of(tmp_path / name)} for name in ("hf", "ckpt"))
    assert hf == ckpt
    summary = summary_of(tmp_path / "hf")
    assert summary["finished"] and summary["results"] == summary_of(tmp_path / "ckpt")["results"]
    assert summary["results"]["examples"] == len(hf) == {"needle": 12, "kv": 8, "ruler": 4, "lines": 3}[flags[0]]
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(record["prompt_tokens"] <= record["length"] for record in hf.values())
    assert len({record["output"] for record in hf.values()}) > 1
    assert summary["positions"] == POSITIONS and summary["tokenizer"] == summary_of(tmp_path / "ckpt")["tokenizer"]
    assert is_picture(tmp_path / "hf" / "picture.png")


def test_perplexity_of_both_formats(monkeypatch, models, texts, tmp_path, capsys):
    """Perplexities agree within rounding over documents of the longest length, and LongPPL key tokens agree."""
    flags = ["perplexity", "--dataset", texts, "--lengths", 300, 150, 600, "--stride", 70]
    flags += ["--short-context", 128, "--short-block", 50, "--alpha", 0.05, "--beta", -9]
    found = {}
    for name, chunk in (("hf", 4096), ("ckpt", 64)):
        options = ["--model", models[name], "--output", tmp_path / name, "--prefill-chunk", chunk]
        assert run(monkeypatch, *flags, *options) == 0
        found[name] = summary_of(tmp_path / name)["results"]
        assert [record["tokens"] for record in records_of(tmp_path / name)] == [600, 600]
        assert is_picture(tmp_path / name / "picture.png")
    assert list(found["hf"]) == ["150", "300", "600"]
    for length, row in found["hf"].items():
        other = found["ckpt"][length]
        assert row["tokens"] == other["tokens"] == 2 * 599
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
        assert abs(row["key_tokens"] - other["key_tokens"]) <= 2 and row["key_tokens"] > 20
    assert len({row["key_tokens"] for row in found["hf"].values()}) == 1
    assert "perplexity by context length" in capsys.readouterr().out
    # --key-token-model with the same model finds about the same key tokens: spans lose some detail.
    options = ["--key-token-model", models["hf"], "--model", models["hf"], "--output", tmp_path / "other"]
    assert run(monkeypatch, *flags, *options) == 0
    told = summary_of(tmp_path / "other")["results"]["600"]
    assert told["perplexity"] == found["hf"]["600"]["perplexity"]
    assert 0.9 < told["key_tokens"] / found["hf"]["600"]["key_tokens"] < 1.5


def test_a_stopped_run_resumes(monkeypatch, models, texts, tmp_path):
    """With lines missing and one truncated, intact results are not recomputed and the final results are equal."""
    flags = [*NEEDLE, "--model", models["hf"], "--output", tmp_path]
    assert run(monkeypatch, *flags) == 0
    summary, lines = summary_of(tmp_path), (tmp_path / RESULTS).read_bytes().splitlines(keepends=True)
    first = json.loads(lines[0])
    del first["crc32"]
    marked = format_line(first | {"output": "KEPT " + first["output"]}).encode()
    (tmp_path / RESULTS).write_bytes(marked + b"".join(lines[1:7]) + lines[7][:40])
    # Batch size and chunk may change when resuming.
    assert run(monkeypatch, *flags, "--batch-size", 1, "--prefill-chunk", 64) == 0
    assert summary_of(tmp_path) == summary
    again = (tmp_path / RESULTS).read_bytes().splitlines(keepends=True)
    assert again[:7] == [marked, *lines[1:7]] and sorted(again[7:]) == sorted(lines[7:])
    # A finished run does not load the model.
    monkeypatch.setattr(language_model, "load", None)
    assert run(monkeypatch, *flags) == 0 and summary_of(tmp_path) == summary

    monkeypatch.undo()
    flags = ["perplexity", "--dataset", texts, "--lengths", 200, "--model", models["hf"], "--output", tmp_path / "ppl"]
    flags += ["--stride", 100]
    assert run(monkeypatch, *flags) == 0
    summary, lines = summary_of(tmp_path / "ppl"), (tmp_path / "ppl" / RESULTS).read_text().splitlines()
    (tmp_path / "ppl" / RESULTS).write_text(lines[0] + "\n")
    assert run(monkeypatch, *flags) == 0
    assert summary_of(tmp_path / "ppl") == summary
    assert (tmp_path / "ppl" / RESULTS).read_text().splitlines() == lines


def test_results_of_other_settings_are_rejected(monkeypatch, models, tmp_path, capsys):
    """An error names the changed setting and keeps the results; --overwrite starts again."""
    flags = [*KV, "--output", tmp_path / "out", "--model"]
    assert run(monkeypatch, *flags, models["hf"]) == 0
    save_llama(tmp_path / "trained", "llama-gqa-odd-vocabulary", seed_change=1)
    shutil.copytree(models["hf"], tmp_path / "moved")
    before = (tmp_path / "out" / RESULTS).read_bytes()
    capsys.readouterr()
    for extra, reason in {
        (models["hf"], "--seed", 1): "seed 0, not 1",
        (models["hf"], "--samples", 3): "samples 2, not 3",
        (models["hf"], "--chat"): "chat false, not true",
        (models["hf"], "--dtype", "bf16"): "another model, or another --engine, --dtype or --kv-cache-dtype",
        (models["hf"], "--kv-cache-dtype", "fp8"): "another model, or another --engine, --dtype or --kv-cache-dtype",
        (tmp_path / "trained",): "another model, or another --engine, --dtype or --kv-cache-dtype",
        (models["ckpt"],): "another model, or another --engine, --dtype or --kv-cache-dtype",
    }.items():
        assert run(monkeypatch, *flags, *extra) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and reason in message and "--output" in message, message
    assert (tmp_path / "out" / RESULTS).read_bytes() == before
    assert run(monkeypatch, *flags, tmp_path / "moved") == 0  # the same model in another folder
    assert (tmp_path / "out" / RESULTS).read_bytes() == before
    assert run(monkeypatch, *flags, models["hf"], "--seed", 1, "--kv-cache-dtype", "fp8", "--overwrite") == 0
    summary = summary_of(tmp_path / "out")
    assert summary["settings"]["seed"] == 1 and summary["model"]["kv_cache_dtype"] == "fp8"
    assert (tmp_path / "out" / RESULTS).read_bytes() != before


def bad_inputs(models: dict[str, Path], texts: Path, folder: Path):
    """Return pairs of flags and a part of the expected error."""
    hf, output = ["--model", models["hf"]], ["--output", folder / "out"]
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"texts": "a"}\n')
    cut = shutil.copytree(models["hf"], folder / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    mute = shutil.copytree(models["hf"], folder / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    plain = save_llama(folder / "plain", bos=False)
    (plain / "chat_template.jinja").unlink()
    damaged = shutil.copytree(models["ckpt"], folder / "damaged")
    (damaged / "release" / ".metadata").write_text("")
    tokenless = shutil.copytree(models["ckpt"], folder / "tokenless", ignore=shutil.ignore_patterns("tokenizer*"))
    perplexity = ["perplexity", *hf, *output, "--dataset"]
    return [
        (["needle"], "the following arguments are required: --model"),
        (["needles", *hf], "invalid choice: 'needles'"),
        ([*NEEDLE, *output, "--model", folder / "nowhere"], f"--model {folder / 'nowhere'}: no such folder"),
        ([*NEEDLE, *output, "--model", folder / "empty"], "neither a Hugging Face folder (it has no config.json)"),
        ([*NEEDLE, *output, "--model", cut], f"{cut / 'model.safetensors'}: not a readable file of tensors"),
        ([*NEEDLE, *output, "--model", mute], f"--model {mute}: no tokenizer there"),
        ([*NEEDLE, *output, "--model", damaged], f"--model {damaged}/release/.metadata: damaged or changed since"),
        ([*NEEDLE, *output, "--model", tokenless], f"--model {tokenless}: has no tokenizer. Give --tokenizer"),
        ([*NEEDLE, *output, "--model", models["ckpt"], "--ckpt-step", 7], "has no iter_0000007"),
        ([*NEEDLE, *output, *hf, "--ckpt-step", 7], "--ckpt-step 7: only with a Megatron checkpoint"),
        ([*NEEDLE, *output, *hf, "--tokenizer", folder / "file"], f"--tokenizer {folder / 'file'}: no tokenizer there"),
        ([*NEEDLE, *output, *hf, "--engine", "vllm"], "--engine vllm: vLLM is not installed here"),
        ([*NEEDLE, *output, *hf, "--enforce-eager"], "--enforce-eager: only with --engine vllm"),
        ([*NEEDLE, *output, *hf, "--max-model-len", 9], "--max-model-len 9: only with --engine vllm"),
        (["harness", *output, *hf, "--tasks", "own", "--tensor-parallel-size", 2], "only with --engine vllm"),
        (
            ["harness", *output, *hf, "--tasks", "own", "--kv-cache-dtype", "fp8"],
            "fp8: lm_eval with transformers keeps",
        ),
        ([*NEEDLE, *output, *hf, "--kv-cache-dtype", "fp4"], "--kv-cache-dtype: invalid choice: 'fp4'"),
        (["harness", *output, *hf, "--tasks", "own", "--metadata", "[1]"], "--metadata: '[1]': must be a JSON object"),
        ([*NEEDLE, *output, "--chat", "--model", plain], "--chat: the model's tokenizer has no chat template"),
        (["harness", *output, "--tasks", "own", "--chat", "--model", plain], "--chat: the model's tokenizer has no"),
        ([*NEEDLE, *hf, "--output", folder / "file"], f"--output {folder / 'file'}: exists and is not a folder"),
        ([*NEEDLE, *output, *hf, "--min-length", 30], "--min-length: context length 30: too short for needle"),
        ([*NEEDLE, *output, *hf, "--min-length", 1000], "--min-length 1000: must be at most --max-length"),
        ([*NEEDLE, *output, *hf, "--haystack", folder / "empty"], "there is no text in .txt files"),
        ([*NEEDLE, *output, *hf, "--temperature", "-1"], "--temperature: '-1': must be a number of at least 0"),
        ([*NEEDLE, *output, *hf, "--top-p", "0"], "--top-p: '0': must be above 0 and at most 1"),
        ([*NEEDLE, *output, *hf, "--batch-size", "0"], "--batch-size: '0': must be a whole number above 0"),
        ([*RULER, *output, *hf, "--tasks", "qa_1"], "--squad is missing: --tasks qa_1 needs SQuAD's dev-v2.0.json"),
        (["kv", *hf, *output, "--keys", 5, "--gold", 5], "--gold 5: must be from 0 to 4"),
        (["lines", *hf, *output, "--data", folder / "no.jsonl"], "no.jsonl: cannot be read"),
        (["longbench", *hf, *output, "--data", folder / "empty"], "there is no NAME.jsonl of LongBench's data sets"),
        ([*perplexity, folder / "no.jsonl"], "no.jsonl: no such file"),
        ([*perplexity, folder / "bad.jsonl"], "bad.jsonl:2: no key 'text'"),
        ([*perplexity, texts, "--lengths", 2**20], "--min-tokens 1048576: none of the 3 documents"),
        ([*perplexity, texts, "--lengths", 100, 200, "--stride", 101], "--stride 101: must be at most the shortest"),
        ([*perplexity, texts, "--lengths", 200, "--stride", 9, "--longppl"], "must be above --short-context"),
        ([*perplexity, texts, "--lengths", 200, "--stride", 9, "--key-token-model", cut], "only with --longppl"),
    ]


def test_bad_inputs_print_one_line(monkeypatch, models, texts, tmp_path, capsys):
    for flags, words in bad_inputs(models, texts, tmp_path):
        capsys.readouterr()
        assert run(monkeypatch, *flags) == 2, flags
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1 and message.startswith("evaluate.py: error: "), message


def test_lengths_beyond_the_model_print_a_warning(monkeypatch, models, tmp_path, capsys):
    flags = ["lines", "--lengths", 2200, "--samples", 1, "--output", tmp_path, "--model", models["ckpt"]]
    assert run(monkeypatch, *flags) == 0
    assert f"2200 tokens are more than the {POSITIONS} positions" in capsys.readouterr().err


def test_chat_prompts_go_through_the_template(monkeypatch, models, tmp_path):
    asked = []
    original = language_model.load

    def load(source, **options):
        model = original(source, **options)
        generate = model.generate
        model.generate = lambda prompts, *args, **kw: asked.extend(prompts) or generate(prompts, *args, **kw)
        return model

    monkeypatch.setattr(language_model, "load", load)
    assert run(monkeypatch, *KV, "--chat", "--model", models["hf"], "--output", tmp_path) == 0
    tokenizer = language_model.find_model(str(models["hf"])).tokenizer
    for ids in asked:
        assert ids.count(tokenizer.bos) == 1 and ids[0] == tokenizer.bos
        assert re.fullmatch(r"\s*<user>.*<assistant>", tokenizer.decode(ids), re.DOTALL)
    assert len(asked) == 8


def test_the_tool_starts_as_a_process(models, tmp_path):
    """The tool runs as a process in another folder, without the Megatron setup of the tests."""
    flags = ["lines", "--lengths", 500, 600, "--samples", 1, "--model", models["ckpt"]]
    command = [sys.executable, ROOT / "tools" / "evaluate.py", *flags]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "lines: 0.0 % over 2 examples" in result.stdout and result.stderr == ""
    assert summary_of(tmp_path / "runs" / "evaluation" / "ckpt" / "lines")["results"]["examples"] == 2


def test_a_tokenizer_without_bos_has_none(tmp_path):
    from megatron_cream.evaluation.models.tokenizer import open_tokenizer

    for bos in (True, False):
        save_tokenizer(tmp_path / str(bos), bos=bos)
        tokenizer = open_tokenizer(tmp_path / str(bos), flag="")
        assert tokenizer.bos == (0 if bos else None) and tokenizer.stop_ids == {1}
        assert tokenizer.encode_prompt("a b")[bos:] == tokenizer.encode("a b")
    first, second = (open_tokenizer(tmp_path / name, flag="").fingerprint() for name in ("True", "False"))
    assert first != second and first == open_tokenizer(tmp_path / "True", flag="").fingerprint()


def test_a_trained_checkpoint_brings_its_tokenizer(tmp_path):
    """A SentencePiece model in the checkpoint, or at its path in training, gives the token ids and BOS of training."""
    model = task_tokenizers.tokenizer("sentencepiece")._model
    (tmp_path / "tokenizer.model").write_bytes(model.serialized_model_proto())
    for files in ({"hf_folder": tmp_path}, {"hf_folder": None}):
        trained = SimpleNamespace(path=tmp_path, args=Namespace(tokenizer_model=tmp_path / "tokenizer.model"), **files)
        tokenizer = language_model._open_own_tokenizer(trained, "--model")
        text = "def f(x):\n    return x  # naïve"
        assert tokenizer.encode_prompt(text) == [model.bos_id(), *model.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.stop_ids == {model.eos_id()}
        with pytest.raises(UsageError, match="no chat template"):
            tokenizer.encode_chat(text)
        with pytest.raises(UsageError, match="needs a tokenizer.json"):
            tokenizer.token_spans(text)


def test_a_missing_harness_is_reported(monkeypatch, models, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(monkeypatch, "harness", "--tasks", "arc_easy", "--model", models["hf"], "--output", tmp_path) == 2
    words = capsys.readouterr().err
    assert words.startswith("evaluate.py: error: harness: ") and words.count("\n") == 1
    assert words.endswith(": pip install lm_eval accelerate\n")


SIZED = """
import datasets
from transformers import AutoTokenizer

def load(max_seq_lengths, tokenizer, **others):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    texts = [tokenizer.decode(list(range(9, length - 20))) for length in max_seq_lengths]
    rows = [{"text": text, "length": length} for text, length in zip(texts, max_seq_lengths)]
    return {"test": datasets.Dataset.from_list(rows)}

def score(doc, results):
    return {str(length): 1.0 if length == doc["length"] else -1.0 for length in (300, 600)}
"""


def test_harness_on_a_custom_task(monkeypatch, models, tmp_path, capsys):
    """Both formats of a model have equal scores; an unknown task gives a one-line error.

    A task with data by length, such as RULER's, gets --metadata and the model's tokenizer.
    """
    save_own_task(tmp_path)
    (tmp_path / "sized.py").write_text(SIZED)
    (tmp_path / "sized.yaml").write_text(
        "task: sized\ndataset_path: ''\ncustom_dataset: !function sized.load\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: x\n"
        "generation_kwargs: {max_gen_toks: 4, until: []}\nprocess_results: !function sized.score\n"
        "metric_list:\n  - {metric: '300', aggregation: mean}\n  - {metric: '600', aggregation: mean}\n"
    )
    flags = ["harness", "--tasks", "own", "--include-path", tmp_path, "--output"]
    sized = ["--tasks", "own,sized", "--metadata", '{"max_seq_lengths": [300, 600]}', "--max-length", 700]
    for name, more in {"hf": sized, "ckpt": []}.items():
        assert run(monkeypatch, *flags, tmp_path / name, "--model", models[name], *more) == 0
    hf, ckpt = (summary_of(tmp_path / name)["results"]["own"]["acc,none"] for name in ("hf", "ckpt"))
    assert hf == ckpt and 0 <= hf <= 1
    records = records_of(tmp_path / "hf")  # one per question, for `compare`
    assert [record["name"] for record in records[:10]] == [f"own/{i}" for i in range(10)]
    assert sum(record["score"] for record in records[:10]) / 10 == pytest.approx(hf)
    assert [(record["metric"], record["length"], record["score"]) for record in records[10:]] == [
        ("300", 300, 1.0),
        ("600", 600, 1.0),
    ]
    capsys.readouterr()
    other = ["--tasks", "nothing_such", "--model", models["ckpt"]]  # the list of tasks is read once per model
    assert run(monkeypatch, *flags, tmp_path / "x", *other) == 2
    assert "--tasks nothing_such: lm_eval has no such task" in capsys.readouterr().err
