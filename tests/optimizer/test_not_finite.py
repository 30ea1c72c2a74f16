"""Models with NaN weights: a one-line error names the model and the tensor for every engine and task."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.evaluation.models import generation
from tests.evaluation.test_evaluate import KV, LINES, alone, run  # noqa: F401
from tests.evaluation_models import save_llama

PERPLEXITY = "perplexity --lengths 300 --stride 70 --documents 1".split()
LONGPPL = [*PERPLEXITY, *"--longppl --short-context 128 --short-block 50".split()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with "hf" and "ckpt", a model with a NaN in its last norm, and "good", without it."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "good")
    save_llama(folder / "hf")
    weights = load_file(folder / "hf" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "hf" / "model.safetensors", {"format": "pt"})
    import_hf(HfFolder(folder / "hf"), folder / "ckpt")
    (folder / "texts.jsonl").write_text(json.dumps({"text": "some words of a long text, " * 200}) + "\n")
    return folder


@pytest.mark.parametrize("flags", [KV, LINES, PERPLEXITY, LONGPPL], ids=["greedy", "sampled", "perplexity", "longppl"])
@pytest.mark.parametrize(("name", "tensor"), [("hf", "model.norm.weight"), ("ckpt", "final_layernorm.weight")])
def test_one_line_names_model_and_tensor(monkeypatch, capsys, models, tmp_path, flags, name, tensor):
    data = ["--dataset", models / "texts.jsonl"] if flags[0] == "perplexity" else []
    flag = "--model"
    if "--longppl" in flags:
        data, flag = [*data, "--model", models / "good"], "--key-token-model"
    assert run(monkeypatch, *flags, *data, flag, models / name, "--output", tmp_path / "out") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"evaluate.py: error: {flag} {models / name}: ") and f"{tensor} holds NaN" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
def test_harness(monkeypatch, capsys, models, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"q": "1", "gold": 1}\n')
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'data.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{q}} is'\ndoc_to_target: gold\n"
        "doc_to_choice: ['even', 'odd']\nmetric_list:\n  - metric: acc\n"
    )
    flags = ["harness", "--tasks", "own", "--include-path", tmp_path, "--output", tmp_path / "out"]
    assert run(monkeypatch, *flags, "--model", models / "hf") == 2
    assert "model.norm.weight holds NaN" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [[0.0, float("nan")], [float("inf"), 0.0], [float("-inf")] * 2])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_non_finite_logits_choose_no_token(row, temperature):
    class Batch:
        def prefill(self, prompts):
            return torch.tensor([[1.0, float("-inf")], row][: len(prompts)])  # -inf: vocabulary padding

    options = dict(stop_ids=(), temperature=temperature, top_p=0.9)
    assert generation.generate(Batch(), [[1]], 1, seeds=[0], **options) == [[0]]
    with pytest.raises(generation.NonFiniteLogits):
        generation.generate(Batch(), [[1], [2]], 1, seeds=[0, 0], **options)
