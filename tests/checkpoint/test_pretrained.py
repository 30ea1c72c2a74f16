"""What a run takes from its original model, and which models it rejects."""

import json
import shutil

import pytest

from megatron_cream.checkpoint import carried, pretrained
from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.common.errors import UsageError
from megatron_cream.config import parse, values
from tests.hf_models import LLAMA3, save_model
from tests.launch import torchrun, write_documents

FLAGS = "--seq-length 128 --micro-batch-size 1 --train-iters 2 --tokenizer-type NullTokenizer".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    write_documents(folder / "documents")
    save_model(folder / "llama3", "llama-3")
    save_model(folder / "qwen2", "qwen2")
    import_hf(HfFolder(folder / "qwen2"), folder / "ckpt")
    return folder


def read(folder, *flags):
    return parse.read([*FLAGS, "--data-path", str(folder / "documents"), *map(str, flags)])


@pytest.mark.parametrize(
    "flag, path", [("--load-hf", "qwen2"), ("--pretrained-checkpoint", "ckpt"), ("--load", "ckpt")]
)
def test_shape_comes_from_the_model(folder, flag, path):
    args = read(folder, flag, folder / path)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (3, 64, 176)
    assert (args.num_attention_heads, args.num_query_groups, args.group_query_attention) == (4, 2, True)
    assert args.add_qkv_bias and not args.qk_layernorm and not args.untie_embeddings_and_output_weights
    assert (args.vocab_size, args.padded_vocab_size) == (515, 640)
    assert args.rope_scaling_config is None and args.rope_lines == []


def test_rope_comes_from_the_model_unless_set(folder):
    args = read(folder, "--load-hf", folder / "llama3")
    assert args.rotary_base == 500000.0
    assert args.rope_scaling_config == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    args = read(folder, "--load-hf", folder / "llama3", "--rope-scaling-type", "linear", "--target-length", 512)
    assert args.rope_scaling_config == {"rope_type": "linear", "factor": 8.0}  # the model's window is 64
    assert "llama3 scaling by 8 (window 64, 512 positions) is replaced by linear" in args.rope_lines[0]
    args = read(folder, "--load-hf", folder / "llama3", "--rope-scaling-type", "none", "--rotary-base", "1e6")
    assert args.rope_scaling_config is None and args.rotary_base == 1e6


def test_tokenizer_comes_from_the_model_unless_set(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "check_files", lambda *args, **options: None)  # the files are stand-ins
    save_model(tmp_path / "hf", "llama-mha")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"a sentencepiece model")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    flags = [*FLAGS[:-2], "--data-path", str(folder / "documents"), "--load-hf", str(tmp_path / "hf")]
    args = parse.read(flags)
    assert (args.tokenizer_type, args.tokenizer_model) == ("HuggingFaceTokenizer", str(tmp_path / "hf"))
    args = parse.read([*flags, "--tokenizer-type", "Llama2Tokenizer"])
    assert (args.tokenizer_type, args.tokenizer_model) == ("Llama2Tokenizer", str(tmp_path / "hf" / "tokenizer.model"))
    args = parse.read([*flags, *FLAGS[-2:]])
    assert (args.tokenizer_type, args.tokenizer_model) == ("NullTokenizer", None)


BAD = {
    "--load-hf {0}/qwen2 --num-layers 4": "--num-layers 4: the model in {0}/qwen2 has 3",
    "--load-hf {0}/qwen2 --vocab-size 100": "--vocab-size 100: the model in {0}/qwen2 has 515",
    "--load {0}/ckpt --hidden-size 32": "--hidden-size 32: the model in {0}/ckpt/hf has 64",
    "--load-hf {0}/none": "--load-hf {0}/none: no such folder",
    "--load-hf {0}/ckpt": "{0}/ckpt: has no config.json",
    "--load-hf {0}/qwen2 --pretrained-checkpoint {0}/ckpt": "with --pretrained-checkpoint: give one of the two",
    "--load-hf {0}/qwen2 --save-hf {0}/llama3": "--save-hf {0}/llama3: is not empty",
    "--load-hf {0}/qwen2 --save-hf {0}/documents.bin": "--save-hf {0}/documents.bin: exists and is not a folder",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_models_print_one_line(folder, flags):
    with pytest.raises(UsageError) as error:
        read(folder, *flags.format(folder).split())
    assert BAD[flags].format(folder) in str(error.value) and "\n" not in str(error.value)


def test_bad_weights_are_found_before_anything_starts(folder, tmp_path):
    save_model(tmp_path / "hf", "qwen2")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    flags = [*FLAGS, "--data-path", folder / "documents", "--load-hf", tmp_path / "hf", "--save", tmp_path / "run"]
    result = torchrun(2, *flags)
    assert result.returncode != 0 and "Traceback" not in result.stderr.split("elastic")[0]
    assert "model.safetensors: not a readable file of tensors" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_exists_goes_before_hugging_face_weights(folder, tmp_path):
    assert values.initial_weights(read(folder, "--load-hf", folder / "qwen2", "--load", folder / "ckpt")) is None
    new = ["--load-hf", folder / "qwen2", "--load", tmp_path / "run", "--save", tmp_path / "run"]
    args = read(folder, *new)
    assert values.initial_weights(args) is not None
    assert args.save_interval == 2  # the run's length: Megatron has no default


def test_files_copied_with_a_run(folder, tmp_path):
    args = read(folder, "--load", folder / "ckpt", "--save", tmp_path / "run")
    args.rank = 0
    pretrained.copy_model_files(args)
    config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert (tmp_path / "run" / "hf" / "generation_config.json").is_file()
    shutil.copytree(folder / "ckpt" / "release", tmp_path / "run" / "release")
    shutil.copyfile(folder / "ckpt" / TRACKER, tmp_path / "run" / TRACKER)
    again = read(folder, "--load", tmp_path / "run", "--save", tmp_path / "run")
    again.rank = 0
    pretrained.copy_model_files(again)
    assert again.num_layers == 3
