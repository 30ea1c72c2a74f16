"""Runs with adapters: every layout gives equal losses, checkpoints have only what trains, and runs resume."""

import json
import shutil
from argparse import Namespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_cream.checkpoint import base_weights
from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
from megatron_cream.checkpoint.best import BestCheckpoint
from megatron_cream.checkpoint.convert import export_hf
from megatron_cream.checkpoint.peft_folder import export_adapter
from megatron_cream.checkpoint.pretrained import save_hf
from megatron_cream.common.errors import UsageError
from tests.hf_models import logits_of, relative, save_model, some_tokens
from tests.launch import relative_error, train, write_documents

BASE = (
    "--seq-length 96 --target-length 768 --rope-scaling-type linear --micro-batch-size 2 --global-batch-size 4 "
    "--lr 1e-2 --tokenizer-type NullTokenizer --seed 7 --num-workers 0 --eval-iters 0 --log-interval 1 --split 90,10,0 "
    "--lora-rank 4 --lora-alpha 6 --lora-rslora --lora-plus-ratio 4 --train-iters 4"
).split()
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train on two data-parallel ranks; return the folder, the flags and the losses."""
    folder = tmp_path_factory.mktemp("lora")
    save_model(folder / "hf", "llama-gqa-odd-vocabulary", num_hidden_layers=2, tie_word_embeddings=True)
    flags = ["--data-path", write_documents(folder / "documents"), "--load-hf", folder / "hf"]
    save = ["--save", folder / "run", "--save-interval", 2]
    return folder, flags, train(2, folder / "whole", *flags, *save, *SHARDED, base=BASE)


def test_checkpoint_has_only_what_trains(run):
    folder, _, losses = run
    assert losses[4] < losses[1]
    keys = FileSystemReader(folder / "run" / "iter_0000004").read_metadata().state_dict_metadata
    model = {key for key in keys if not key.startswith(("optimizer.", "rng_state", "common_state", "rerun"))}
    layers = {key for key in model if key.startswith("decoder.layers.")}
    assert {key for key in layers if ".lora." not in key} == {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    }
    assert len([key for key in layers if ".lora." in key]) == 14
    assert model - layers == {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}


def test_resume_is_bit_identical(run):
    folder, _, losses = run
    load = ["--load", folder / "run", "--ckpt-step", 2]  # the base model is found again
    data = ["--data-path", folder / "documents"]
    assert train(2, folder / "same", *data, *load, *SHARDED, base=BASE) == {3: losses[3], 4: losses[4]}


def test_resume_at_another_layout(run):
    folder, flags, losses = run
    load = ["--load", folder / "run", "--ckpt-step", 2]
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer".split()
    found = train(2, folder / "tp2", *flags, *load, *layout, base=BASE)
    assert found.keys() == {3, 4} and relative_error(found, {step: losses[step] for step in found}) < 1e-5


def test_frozen_weights_in_nf4(run, tmp_path):
    """Losses are near those of unpacked weights, checkpoints have the same tensors, and a resumed run is bit-identical."""
    pytest.importorskip("torchao")
    folder, flags, losses = run
    layout = "--lora-base-dtype nf4 --tensor-model-parallel-size 2 --sequence-parallel".split()
    save = ["--save", tmp_path / "run", "--save-interval", 2]
    found = train(2, tmp_path / "whole", *flags, *save, *layout, base=BASE)
    assert found.keys() == losses.keys() and 1e-5 < relative_error(found, losses) < 0.02
    load = ["--data-path", folder / "documents", "--load", tmp_path / "run", "--ckpt-step", 2]
    assert train(2, tmp_path / "same", *load, *layout, base=BASE) == {3: found[3], 4: found[4]}
    keys = [
        FileSystemReader(each / "run" / "iter_0000004").read_metadata().state_dict_metadata
        for each in (folder, tmp_path)
    ]
    assert {key for key in keys[0] if key.startswith("decoder.")} == {
        key for key in keys[1] if key.startswith("decoder.")
    }


LAYOUTS = {
    "pp2": "--pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "cp2": "--context-parallel-size 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_with_the_same_adapters(run, name):
    folder, flags, losses = run
    found = train(2, folder / name, *flags, *LAYOUTS[name].split(), base=BASE)
    assert found.keys() == losses.keys() and relative_error(found, losses) < 1e-5


def test_export_for_peft_and_merged(run):
    """PEFT's model with the adapter, PEFT's merge, and our merge have equal logits."""
    folder = run[0]
    source = open_checkpoint(folder / "run")
    export_adapter(source, folder / "adapter")
    export_hf(source, folder / "merged")
    config = AutoConfig.from_pretrained(folder / "adapter")  # with the run's RoPE: the folder's README.md says so
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", config=config)
    tokens, ids = some_tokens(model)
    before = logits_of(model, tokens, ids)
    adapted = PeftModel.from_pretrained(model, folder / "adapter").eval()
    expected = logits_of(adapted, tokens, ids)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(folder / "merged"), tokens, ids)
    assert relative(before, expected) > 1e-3
    assert relative(merged, expected) < 1e-5
    assert relative(merged, logits_of(adapted.merge_and_unload(), tokens, ids)) < 1e-5


def test_the_base_model_moves_after_the_last_step(run, tmp_path):
    """Export of a finished run, and the best checkpoint of a resumed one, read the base model where it is now."""
    folder, save = run[0], tmp_path / "save"
    shutil.copytree(folder / "run", save / "best")
    moved = (folder / "hf").rename(tmp_path / "moved")
    try:
        base = base_weights.describe(moved, flag="--load-hf")
        args = dict(save=str(folder / "run"), save_hf=tmp_path / "adapter", adapter=True, target_length=768, rank=0)
        save_hf(Namespace(**args, lora_base=base))
        with pytest.raises(UsageError, match="without a long-evaluation score"):  # so it was opened
            BestCheckpoint(save, {}, clean=True, base=base_weights.folder_of(base))
    finally:
        moved.rename(folder / "hf")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_adapter_there_and_back_is_bit_equal(run):
    """A step that is too small to change a weight, on two tensor-parallel ranks."""
    folder, flags, _ = run
    export_adapter(open_checkpoint(folder / "run"), folder / "there")
    step = "--lora-train norms,embeddings --lr 1e-30 --train-iters 1 --tensor-model-parallel-size 2".split()
    start = ["--load-adapter", folder / "there", "--save-hf", folder / "back", "--adapter"]
    base = [
        flag for flag in BASE if flag not in ("--lora-rslora", *"--lora-alpha 6 --rope-scaling-type linear".split())
    ]
    train(2, folder / "tiny", *flags, *start, *step, base=base)
    there, back = (load_file(folder / name / "adapter_model.safetensors") for name in ("there", "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)
    assert json.loads((folder / "back" / "config.json").read_text())["rope_scaling"]["factor"] == 1.5
