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
from megatron_cream.model.rotary import build_rope_scaling
from tests.evaluation_models import save_tokenizer
from tests.hf_models import save_model
from tests.launch import ROOT

pytest.importorskip("vllm", reason="needs vllm")

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


def evaluate(*flags) -> subprocess.CompletedProcess:
    # conftest.py disables torch's compiler, but vLLM needs it.
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "evaluate.py", "needle", *flags, "--dtype", "fp32"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, env=environment)


GRID = "--length-steps 2 --depth-steps 2 --min-length 300 --max-length".split()


def answers(folder) -> dict[str, str]:
    return {
        line["name"]: line["output"] for line in map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    }


def test_answers_are_transformers(folder, tmp_path):
    for name, flags in {"vllm": ["--engine", "vllm"], "transformers": []}.items():
        ended = evaluate("--model", folder / "out", *GRID, 1200, *flags, "--output", tmp_path / name)
        assert ended.returncode == 0, ended.stderr[-3000:]
    found = answers(tmp_path / "vllm")
    assert found == answers(tmp_path / "transformers") and len(found) >= 4 and len(set(found.values())) > 1


@pytest.mark.parametrize("folder", ["llama-mha"], indirect=True)  # an engine needs a minute to start
def test_a_checkpoint_is_exported_for_it(folder, tmp_path):
    for name, model in {"checkpoint": "ckpt", "folder": "out"}.items():
        ended = evaluate("--model", folder / model, *GRID, 600, "--engine", "vllm", "--output", tmp_path / name)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert answers(tmp_path / "checkpoint") == answers(tmp_path / "folder")


@pytest.mark.parametrize("folder", ["llama-mha"], indirect=True)
def test_a_prompt_beyond_the_window(folder, tmp_path):
    """vLLM rejects a prompt that is longer than the window; transformers would run it."""
    ended = evaluate("--model", folder / "out", *GRID, 3000, "--engine", "vllm", "--output", tmp_path / "out")
    last = [line for line in ended.stderr.splitlines() if line.startswith("evaluate.py: error:")]
    assert ended.returncode == 2 and len(last) == 1, ended.stderr[-3000:]
    assert "--engine vllm" in last[0] and "max_position_embeddings 2048" in last[0]


WINDOW = """
import sys
from vllm.engine.arg_utils import EngineArgs
print("window", EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_model_config().max_model_len)
"""


def test_the_window_is_the_trained_one(folder):
    """vLLM's rule, which multiplies by the factor of linear scaling, gives the trained window."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WINDOW, str(folder / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "window 2048" in ended.stdout.splitlines()
