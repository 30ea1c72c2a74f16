"""The base model of adapters is recognised, and a PEFT folder that does not fit it is rejected in one line."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from megatron_cream.checkpoint import base_weights, peft_folder
from megatron_cream.checkpoint.adapter_checkpoint import AdapterCheckpoint
from megatron_cream.checkpoint.adapters import adapter_rows, adapter_shape, list_layers
from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.families import read_config
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.mapping import list_parameters, megatron_shape
from megatron_cream.checkpoint.peft_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, PeftFolder, write_readme
from megatron_cream.commands import convert
from megatron_cream.common.errors import UsageError
from tests.hf_models import save_model

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
HEAD, FIRST_A = "lm_head.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "hf"
    save_model(folder)
    return folder


def test_the_base_model_is_found_again(model, tmp_path):
    saved = base_weights.describe(model, flag="--load-hf")
    moved = shutil.copytree(model, tmp_path / "moved")
    found = base_weights.find_again(saved, str(moved), where="--load run", flag="--load-hf")
    assert found["folder"] == str(moved) and found["files"] == saved["files"]
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match="adapters for another model than .*moved: model.safetensors differs"):
        base_weights.find_again(saved, str(moved), where="--load run", flag="--load-hf")
    saved |= {"folder": str(tmp_path / "gone"), "name": str(tmp_path / "gone")}
    with pytest.raises(UsageError, match="gone, which cannot be read. Give it with --load-hf"):
        base_weights.find_again(saved, None, where="--load run", flag="--load-hf")


def test_a_checkpoint_is_a_base_model_too(model, tmp_path):
    import_hf(HfFolder(model), tmp_path / "ckpt")
    record = base_weights.describe(tmp_path / "ckpt", flag="--pretrained-checkpoint")
    assert record["step"] == "release" and ".metadata" in record["files"]
    ours, theirs = base_weights.open_base(record, flag=""), base_weights.open_folder(model)
    for row, layer in list_parameters(ours.shape):
        size = megatron_shape(row, ours.shape, ours.shape.vocab_size)
        assert torch.equal(ours.read(row, layer, torch.empty(size)), theirs.read(row, layer, torch.empty(size)))
        assert ours.dtype(row, layer) == theirs.dtype(row, layer)


@pytest.mark.parametrize("step, option", [("release", ""), (20, " --ckpt-step 20")])
def test_readme_exports_a_megatron_base(step, option):
    text = write_readme("adapter", {"name": "run 1", "step": step}, rank=8, positions=1024)
    assert f"convert_hf.py export --checkpoint 'run 1'{option} --hf-path BASE" in text
    assert 'AutoModelForCausalLM.from_pretrained("BASE"' in text and "base_model:" not in text
    plain = write_readme("adapter", {"name": "meta-llama/Llama-2-7b-hf", "step": None}, rank=8, positions=1024)
    assert "base_model: meta-llama/Llama-2-7b-hf\n" in plain and "convert_hf.py" not in plain


def test_export_does_not_replace_the_base_model(model, tmp_path, monkeypatch):
    """--overwrite replaces an earlier conversion, which may be the model under the adapters."""
    source = AdapterCheckpoint.__new__(AdapterCheckpoint)
    source.path, source.base = tmp_path / "run", {"folder": str(model)}
    monkeypatch.setattr(convert, "open_checkpoint", lambda *_, **__: source)
    flags = ["export", "--checkpoint", tmp_path / "run", "--overwrite", "--hf-path", model]
    with pytest.raises(UsageError, match="must not overlap the source folder"):
        convert.run_export(convert.parser().parse_args([str(flag) for flag in flags]))


def write_adapter(folder, shape, changes=None, tensors=None):
    """Write an adapter of zeros, with changes to its configuration and tensors; None removes a tensor."""
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG | (changes or {})))
    found = {
        row.names(layer)[0]: torch.zeros(adapter_shape(row, shape, 2))
        for row, layer in list_layers(adapter_rows(CONFIG["target_modules"]), shape.num_layers)
    } | (tensors or {})
    save_file({PREFIX + name: tensor for name, tensor in found.items() if tensor is not None}, folder / ADAPTER_WEIGHTS)


BAD = {
    "use_dora True": ({"use_dora": True}, {}),
    "rank_pattern {'q_proj': 8}": ({"rank_pattern": {"q_proj": 8}}, {}),
    "init_lora_weights pissa_niter_4: this initialisation changes": ({"init_lora_weights": "pissa_niter_4"}, {}),
    "init_lora_weights olora: ": ({"init_lora_weights": "olora"}, {}),
    "init_lora_weights corda: ": ({"init_lora_weights": "corda"}, {}),
    "init_lora_weights loftq: ": ({"init_lora_weights": "loftq"}, {}),
    "init_lora_weights lora_ga: ": ({"init_lora_weights": "lora_ga"}, {}),
    "use_qalora True: not supported; only plain LoRA is": ({"use_qalora": True}, {}),
    "alora_invocation_tokens [1, 2]: not supported": ({"alora_invocation_tokens": [1, 2]}, {}),
    "kasa_config {'beta': 0.1}: not supported": ({"kasa_config": {"beta": 0.1}}, {}),
    "peft_type IA3": ({"peft_type": "IA3"}, {}),
    "must have numbers for r and lora_alpha": ({"r": "2"}, {}),
    "target_modules all-linear: must be a list of q_proj": ({"target_modules": "all-linear"}, {}),
    f"tensor {FIRST_A} is missing": ({}, {FIRST_A: None}),
    f"{FIRST_A} has shape [3, 64]; the model needs [2, 64]": ({}, {FIRST_A: torch.zeros(3, 64)}),
    f"has {HEAD}, which does not train with --lora-train norms": ({}, {HEAD: torch.zeros(515, 64)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_adapters(model, tmp_path, message):
    shape = read_config(model)[1]
    write_adapter(tmp_path / "adapter", shape, *BAD[message])
    with pytest.raises(UsageError) as error:
        PeftFolder(tmp_path / "adapter").check(shape, ["norms"])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", *peft_folder._KEEP_BASE])
def test_initialisations_that_are_taken_leave_the_base_model_as_it_is(name):
    """PEFT initialises anew on the unchanged base model when it loads an adapter."""
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
    before = layer[0].weight.clone()
    options = {} if name is None else {"init_lora_weights": name}
    get_peft_model(layer, LoraConfig(r=2, target_modules=["0"], **options), low_cpu_mem_usage=False)
    kept = torch.equal(layer[0].base_layer.weight, before)
    assert kept == (name in peft_folder._KEEP_BASE)


def test_an_adapter_is_not_cast(tmp_path):
    words = f"export --adapter --checkpoint {tmp_path} --hf-path {tmp_path / 'out'} --dtype bf16".split()
    with pytest.raises(UsageError, match="^--dtype bf16: an adapter keeps the dtype of its training; leave it out$"):
        convert.run_export(convert.parser().parse_args(words))


def test_damaged_adapters(model, tmp_path):
    shape = read_config(model)[1]
    write_adapter(tmp_path / "adapter", shape)
    PeftFolder(tmp_path / "adapter").check(shape, [])
    weights = tmp_path / "adapter" / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError, match="adapter_model.safetensors cannot be read"):
        PeftFolder(tmp_path / "adapter")
    weights.unlink()
    with pytest.raises(UsageError, match="has no adapter_model.safetensors"):
        PeftFolder(tmp_path / "adapter")
