"""The window of a Hugging Face folder, as its readers derive it."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

from megatron_cream.patches import platform

platform.setup()

from megatron_cream.checkpoint import window
from megatron_cream.checkpoint.convert import export_hf, import_hf
from megatron_cream.checkpoint.families import shape_from_config
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.model.rotary import build_rope_scaling
from tests import forked_commands
from tests.evaluation_models import save_llama

BEFORE, AFTER = 512, 4096
TYPES = ["none", "linear", "ntk", "yarn", "llama3"]


def linear(positions, factor, **more):
    return {"max_position_embeddings": positions, "rope_scaling": {"type": "linear", "factor": factor}, **more}


def yarn(positions, original):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    return {"max_position_embeddings": positions, "rope_scaling": scaling}


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"max_position_embeddings": 4096}, 4096),
        (linear(4096, 4.0), 16384),  # lmsys/vicuna-7b-v1.5-16k
        (linear(2048, 8), 16384),  # lmsys/longchat-7b-16k
        (linear(32768, 8.0), 32768),  # togethercomputer/LLaMA-2-7B-32K
        (linear(16384, 4.0), 16384),  # deepseek-ai/deepseek-coder-6.7b-base
        (linear(32768, 8.0, seq_length=4096), 32768),  # ours
        (linear(512, 8.0, seq_length=512), 4096),
        (linear(4096, 4.0, max_sequence_length=16384), 16384),
        (yarn(32768, 32768), 131072),  # Qwen2.5, with the scaling from its model card
        (yarn(40960, 32768), 131072),  # Qwen3
        (yarn(131072, 32768), 131072),
    ],
)
def test_window_of_a_config(config, expected):
    shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=64)
    found = shape_from_config({"model_type": "llama"} | shape | config, Path("config.json"))
    assert found.window == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a model whose files have the window in every place where a reader looks."""
    folder = tmp_path_factory.mktemp("window")
    save_llama(folder / "hf")
    for name, keys in {
        "config.json": {key: BEFORE for key in ("max_position_embeddings", *window.OTHER_KEYS)},
        "generation_config.json": {"eos_token_id": 1, "max_length": BEFORE, "max_new_tokens": 7},
        "tokenizer_config.json": {"model_max_length": BEFORE},
        "tokenizer.json": {"truncation": dict(direction="Right", max_length=BEFORE, strategy="LongestFirst", stride=0)},
    }.items():
        file = folder / "hf" / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | keys))
    import_hf(HfFolder(folder / "hf"), folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture(scope="module", params=TYPES)
def stretched(request, checkpoint):
    """The model, exported with each kind of scaling for eight times the window."""
    source = MegatronCheckpoint(checkpoint)
    scaling = build_rope_scaling(request.param, 8.0, BEFORE)
    source.shape = replace(source.shape, rope_scaling=scaling, max_position_embeddings=AFTER)
    export_hf(source, checkpoint.parent / request.param)
    return checkpoint.parent / request.param


def test_transformers(stretched):
    assert AutoConfig.from_pretrained(stretched).max_position_embeddings == AFTER
    tokenizer = AutoTokenizer.from_pretrained(stretched)
    assert tokenizer.model_max_length == AFTER
    text = "def f(x): return x\n" * 2000
    assert len(tokenizer(text, truncation=True).input_ids) == AFTER < len(tokenizer(text).input_ids)
    truncation = json.loads((stretched / "tokenizer.json").read_text())["truncation"]
    assert truncation is None or truncation["max_length"] == AFTER


def test_lm_evaluation_harness(stretched):
    from lm_eval.models.huggingface import HFLM

    model = HFLM.__new__(HFLM)  # without the model's weights
    model._max_length, model.tokenizer = None, AutoTokenizer.from_pretrained(stretched)
    model._model = SimpleNamespace(config=AutoConfig.from_pretrained(stretched))
    assert model.max_length == AFTER


def vllm_window(config: dict) -> int:
    """The rule of vLLM 0.32.

    transformers_utils/model_arch_config_convertor.py, derive_max_model_len_and_key, and config/model.py,
    _get_and_verify_max_len: the smallest of these keys, model_max_length before all, times the factor.
    """
    keys = (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "model_max_length",
        "max_target_positions",
        "max_sequence_length",
        "max_seq_length",
        "seq_len",
    )
    length = config.get("model_max_length") or min(config[key] for key in keys if config.get(key) is not None)
    scaling = config["rope_scaling"] or {}
    multiplied = scaling.get("rope_type") not in (None, "su", "longrope", "llama3", "yarn", "deepseek_yarn")
    return int(length * scaling["factor"]) if multiplied else length


def sglang_window(config: dict) -> int:
    """The rule of SGLang, python/sglang/srt/hf_transformers_utils.py, get_context_length."""
    scaling = config["rope_scaling"] or {}
    whole = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    keys = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
    length = next(config[key] for key in keys if config.get(key) is not None)
    return int(length * (1 if whole else scaling.get("factor", 1)))


def test_servers(stretched):
    config = json.loads((stretched / "config.json").read_text())
    assert vllm_window(config) == sglang_window(config) == AFTER
    factor = (config["rope_scaling"] or {}).get("factor", 1.0)
    assert type(factor) is float  # vLLM takes an integer for a list of factors


def test_an_import_has_the_same_window(stretched, tmp_path):
    import_hf(HfFolder(stretched), tmp_path / "again")
    again = MegatronCheckpoint(tmp_path / "again")
    assert again.shape.max_position_embeddings == AFTER and not again.is_stretched
    export_hf(again, tmp_path / "out")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (stretched, tmp_path / "out"))
        assert after == before


def test_an_unchanged_model_keeps_its_limits(checkpoint, tmp_path):
    export_hf(MegatronCheckpoint(checkpoint), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[key] for key in window.OTHER_KEYS] == [BEFORE] * len(window.OTHER_KEYS)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == BEFORE


GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("def f(x): return x\\n" * 120, return_tensors="pt", truncation=True).input_ids
print(ids.shape[1], model.generate(ids, do_sample=False).shape[1])
"""


def test_generation_in_a_process_of_its_own(checkpoint, stretched):
    if stretched.name != "linear":
        return
    command = [*forked_commands.python(), "-c", GENERATE, stretched]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    prompt, whole = map(int, ended.stdout.splitlines()[-1].split())  # in CI, transformers' warnings come before
    assert BEFORE < prompt < whole <= prompt + 7
