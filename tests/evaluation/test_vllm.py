"""vLLM, if installed, on an exported folder: its answers against transformers'."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_cream.checkpoint.convert import export_hf, import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.commands import evaluate as command
from megatron_cream.model.rotary import build_rope_scaling
from tests.evaluation_models import records_of, save_own_task, save_tokenizer
from tests.hf_models import save_model
from tests.launch import ROOT

pytest.importorskip("vllm", reason="needs vllm")
from vllm.engine.arg_utils import EngineArgs

# vLLM's attention supports heads of 64 on every platform.
WIDE = dict(hidden_size=256, num_attention_heads=4, head_dim=64, num_key_value_heads=2, vocab_size=2048)
SCALINGS = {"llama-mha": ("linear", 8.0), "qwen3": ("yarn", 8.0)}


@pytest.fixture(scope="module", params=SCALINGS)
def folder(request, tmp_path_factory):
    """Return a folder with ckpt, a checkpoint with scaled positions, and out, its export."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder / "hf", request.param, **WIDE)
    save_tokenizer(folder / "hf")
    import_hf(HfFolder(folder / "hf"), folder / "plain")
    checkpoint = MegatronCheckpoint(folder / "plain")
    scaling = build_rope_scaling(*SCALINGS[request.param], 512)
    checkpoint.shape = replace(checkpoint.shape, rope_scaling=scaling, max_position_embeddings=2048)
    export_hf(checkpoint, folder / "out")
    import_hf(HfFolder(folder / "out"), folder / "ckpt")
    return folder


@pytest.fixture(autouse=True)
def engine_in_this_process(monkeypatch):
    """Let vLLM start its engine here: the processes of its own would import everything two times again."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")  # prepare_start sets it: restored after the test
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def evaluate_in_fresh_processes(*flags) -> None:
    """Run tools/evaluate.py as a user does: vLLM's engine and its worker have processes of their own."""
    # conftest.py disables torch's compiler, but vLLM needs it.
    own = ("TORCHDYNAMO_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_LONG_MAX_MODEL_LEN")
    environment = {name: value for name, value in os.environ.items() if name not in own} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "evaluate.py", *flags]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]


def evaluate_here(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    return command.main()


GRID = "--samples 2 --length-steps 2 --depth-steps 2 --min-length 300 --max-length".split()
FP32 = ["--dtype", "fp32"]


def answers(folder) -> dict[str, str]:
    return {
        line["name"]: line["output"] for line in map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    }


# Compilation takes two minutes in each engine.
VLLM = ["--engine", "vllm", "--enforce-eager", "--max-num-batched-tokens", 512]


def test_answers_are_transformers(folder, tmp_path, request, monkeypatch):
    """A folder and, of one of them, the checkpoint, which is exported for vLLM."""
    task = ["needle", *GRID, 2048, *FP32]
    for name, flags in {"vllm": VLLM, "transformers": []}.items():
        assert evaluate_here(monkeypatch, *task, "--model", folder / "out", *flags, "--output", tmp_path / name) == 0
    found = [answers(tmp_path / name) for name in ("vllm", "transformers")]
    if "llama-mha" in request.node.name:
        evaluate_in_fresh_processes(*task, "--model", folder / "ckpt", *VLLM, "--output", tmp_path / "checkpoint")
        found.append(answers(tmp_path / "checkpoint"))
    assert all(other == found[0] for other in found) and len(found[0]) >= 4 and len(set(found[0].values())) > 1


@pytest.mark.parametrize("folder", ["llama-mha"], indirect=True)
def test_bad_lengths_end_before_the_engine_starts(folder, tmp_path, monkeypatch, capsys):
    """vLLM rejects a prompt that is longer than the window; transformers would run it."""
    for most, flags, words in [
        (3000, (), "3000 tokens of a prompt and its answer are more than the 2048 positions"),
        (1200, ("--max-model-len", 1000), "1200 tokens of a prompt and its answer are more than the 1000 positions"),
        (1200, ("--max-model-len", 2049), "--max-model-len 2049: the model's max_position_embeddings is 2048"),
    ]:
        assert evaluate_here(monkeypatch, "needle", *GRID, most, "--model", folder / "out", *VLLM, *flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("evaluate.py: error:") == 1, error


@pytest.mark.parametrize("folder", ["llama-mha"], indirect=True)
def test_harness_scores_are_transformers(folder, tmp_path, monkeypatch):
    flags = ["harness", "--tasks", "own", "--include-path", save_own_task(tmp_path), "--model", folder / "out"]
    engine = ["--engine", "vllm", "--enforce-eager", "--max-length", 500]
    assert evaluate_here(monkeypatch, *flags, *engine, *FP32, "--output", tmp_path / "vllm") == 0
    assert evaluate_here(monkeypatch, *flags, *FP32, "--output", tmp_path / "transformers") == 0
    found = [records_of(tmp_path / name) for name in ("vllm", "transformers")]
    assert found[0] == found[1] and len({record["score"] for record in found[0]}) == 2


def test_the_window_is_the_trained_one(folder, monkeypatch):
    """vLLM's rule, which multiplies by the factor of linear scaling, gives the trained window."""
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN")
    engine = EngineArgs(model=str(folder / "out"), skip_tokenizer_init=True)
    assert engine.create_model_config().max_model_len == 2048
