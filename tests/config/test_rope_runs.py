"""Tests of a model with extended RoPE: train, export, load with transformers, resume, and extend again."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_cream.checkpoint import pretrained
from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.families import read_config
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.start import FoundCheckpoint, read_saved_rope
from megatron_cream.common.errors import UsageError
from megatron_cream.config import parse
from megatron_cream.config.checks import checkpoint as checkpoint_checks
from megatron_cream.model.rope_choice import ModelRope
from megatron_cream.model.rotary import build_rope_scaling
from tests.checkpoint.test_adapters import write_adapter
from tests.checkpoint.test_convert import run_tool
from tests.hf_models import LLAMA3, save_model
from tests.launch import torchrun, write_documents

FLAGS = "--seq-length 128 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-4 --fp32 --num-workers 0"
FLAGS += " --split 90,10,0 --eval-iters 0 --tokenizer-type NullTokenizer --log-interval 1"
WIDER = [*FLAGS.split(), "--target-length", "1024"]
SHAPE = "--num-layers 3 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 8 --group-query-attention"
SHAPE = [*SHAPE.split(), "--num-query-groups", "2", "--vocab-size", "515", "--norm-epsilon", "1e-5"]
SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_theta"} | {"factor": 16.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a model to 1024 positions with a larger theta. Returns (folder, output).

    hf: the source, with Llama 3 scaling from 64 to 512 positions. run, out: the checkpoint and the export.
    """
    folder = tmp_path_factory.mktemp("rope")
    documents = write_documents(folder / "documents")
    save_model(folder / "hf", "llama-3")
    ends = ["--load-hf", folder / "hf", "--save", folder / "run", "--save-hf", folder / "out"]
    result = torchrun(1, *WIDER, "--data-path", documents, *ends, "--rotary-base", "1e6")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "rope" not in result.stderr
    return folder, result.stdout


def read(folder, *flags):
    return parse.read([*WIDER, "--data-path", str(folder / "documents"), *map(str, flags)])


def test_the_first_lines_say_what_the_run_does(run):
    folder, said = run
    lines = said[said.index("model   ") :].splitlines()
    parts = [
        ("model", "llama", "parameters", f"weights of {folder / 'hf'}"),
        ("window", "1,024 tokens from a window of 64; samples of 128 tokens with positions by cream"),
        ("rope", "theta changes from the model's 500000 to 1e+06 (--rotary-base)"),
        (
            "rope",
            "the model's llama3 scaling changes from factor 8 (512 positions) to factor 16 (1024 positions), window 64",
        ),
        ("layout", "1 rank: TP 1, PP 1, CP 1, DP 1; micro-batch 1, global batch 2; float32"),
        ("data", f"{folder / 'documents'}: 60 documents,", "split 90,10,0"),
        ("train", "2 steps of 256 tokens, 512 in all"),
        ("output", f"{folder / 'run'} (a checkpoint every 2 steps,", str(folder / "out")),
    ]
    for line, (name, *words) in zip(lines, parts, strict=False):
        assert line.startswith(f"{name:<8}") and all(word in line for word in words), line


@pytest.mark.slow
def test_transformers_gives_the_logits_of_the_checkpoint(run, tmp_path):
    """Logits are compared at up to 992 positions, where the old scaling or theta would show."""
    folder, _ = run
    config = json.loads((folder / "out" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (1024, 1e6)
    assert config["rope_scaling"] == SCALING
    (tmp_path / "text").write_text("The window of a language model. " * 31)
    text = ["--text-file", tmp_path / "text"]
    result = run_tool("verify", "--checkpoint", folder / "run", "--hf-path", folder / "out", *text)
    assert result.returncode == 0 and "logits: 992 tokens" in result.stdout, result.stdout + result.stderr
    for key, value in {"rope_theta": 5e5, "rope_scaling": SCALING | {"factor": 8.0}}.items():
        (folder / "out" / "config.json").write_text(json.dumps(config | {key: value}))
        result = run_tool("verify", "--checkpoint", folder / "run", "--hf-path", folder / "out", *text)
        assert result.returncode != 0, result.stdout
    (folder / "out" / "config.json").write_text(json.dumps(config))


def test_resuming_and_extending_again_keep_the_trained_rope(run):
    folder, _ = run
    resumed = read(folder, "--load", folder / "run")
    assert (resumed.rotary_base, resumed.rope_scaling_config, resumed.rope_lines) == (1e6, SCALING, [])
    for source in (["--pretrained-checkpoint", folder / "run"], ["--load-hf", folder / "out"]):
        again = read(folder, *source, "--target-length", 2048, "--position-sampler", "pose")
        assert (again.rotary_base, again.rope_scaling_config) == (1e6, SCALING | {"factor": 32.0})
        assert "from factor 16 (1024 positions) to factor 32 (2048 positions)" in again.rope_lines[0]


def test_an_adapter_brings_its_rope_to_a_trained_base(run, tmp_path):
    """Also where the base has no config.json, and not without one of its own."""
    folder, _ = run
    shutil.copytree(folder / "run", tmp_path / "bare", ignore=lambda path, names: {"hf"} & set(names))
    write_adapter(tmp_path / "adapter", read_config(folder / "out")[1])
    found = []
    for base in (folder / "run", tmp_path / "bare"):
        flags = ["--pretrained-checkpoint", base, "--load-adapter", tmp_path / "adapter"]
        flags += [] if base.name == "run" else SHAPE
        found.append(read(folder, *flags).rotary_base)
        config = json.loads((folder / "out" / "config.json").read_text())
        (tmp_path / "adapter" / "config.json").write_text(json.dumps(config | {"rope_theta": 3e6}))
        found.append(read(folder, *flags).rotary_base)
        (tmp_path / "adapter" / "config.json").unlink()
    assert found == [1e6, 3e6, 1e6, 3e6]


def test_resuming_with_a_longer_target_advises_what_works(run, tmp_path):
    """The factor that the flags give is not widened; neither line leads back to the other."""
    folder, _ = run
    data = ["--data-path", folder / "documents", "--train-iters", 3, "--override-opt-param-scheduler"]
    start = ["--load-hf", folder / "hf", "--save", tmp_path / "new"]

    def resume(*flags):
        return torchrun(1, *WIDER, *data, "--load", folder / "run", *flags)

    longer = ["--target-length", 2048, "--position-sampler", "pose"]
    said = resume(*start, *longer).stderr.splitlines()[0]
    assert "To resume, give --target-length 1024 --rotary-base 1000000. For a longer extension" in said
    new = f"give --pretrained-checkpoint {folder / 'run'} in place of --load and --load-hf, and another --save folder"
    assert said.endswith(new)
    ended = resume(*start, "--target-length", 1024, "--rotary-base", 1000000)
    assert ended.returncode == 0, ended.stderr[-3000:]
    ended = torchrun(
        1, *WIDER, *data, *longer, "--pretrained-checkpoint", folder / "run", "--save", tmp_path / "extended"
    )
    assert ended.returncode == 0 and "warning" not in ended.stderr, ended.stderr[-3000:]
    assert "to factor 32 (2048 positions)" in ended.stdout
    short = ["--load-hf", folder / "hf", "--rotary-base", "1e6", "--rope-scaling-factor", 16]
    said = resume(*short, *longer).stderr
    assert (
        "serves 1024 positions, fewer than the target of 2048. A resumed run keeps its rotary embedding: give" in said
    )
    assert "Leave out --rope-scaling-factor" not in said
    said = resume(*short, "--target-length", 1024).stderr
    assert "warning" not in said


@pytest.mark.parametrize("target", [1024, 768])
def test_the_advised_factor_and_theta_are_the_saved_ones(target):
    """A rounded factor or theta would lead to the same error again."""
    saved = Namespace(
        rope_scaling_config=build_rope_scaling("yarn", 4 / 3, 768), rotary_base=123456.789, target_length=1024
    )
    given = Namespace(rope_scaling_type="ntk", rope_scaling_factor=None, original_max_position_embeddings=None)
    given = Namespace(**vars(given), rope_scaling_config=None, rotary_base=1e4, target_length=target, lora_rank=0)
    found = FoundCheckpoint("--load", Path("run/iter_0000002"), saved, None)
    with pytest.raises(UsageError) as error:
        checkpoint_checks.check_model(given, Namespace(checkpoint=found, resumed=found))
    said = re.search(r"--rope-scaling-type yarn --rope-scaling-factor (\S+) --rotary-base (\S+)$", str(error.value))
    assert (float(said[1]), float(said[2])) == (4 / 3, 123456.789)
    assert ("--target-length 1024" in str(error.value)) == (target == 768)


def test_an_import_is_read_like_its_source_folder(run):
    folder, _ = run
    result = run_tool("import", "--hf-path", folder / "hf", "--output", folder / "ckpt")
    assert result.returncode == 0, result.stderr
    for flags in ([], ["--rope-scaling-type", "yarn"], ["--rotary-base", "2e6"]):
        found = [
            read(folder, *source, *flags)
            for source in (
                ["--load-hf", folder / "hf"],
                ["--pretrained-checkpoint", folder / "ckpt"],
                ["--load", folder / "ckpt"],
            )
        ]
        ropes = [(args.rotary_base, args.rope_scaling_config, args.rope_lines) for args in found]
        assert ropes[0][2] and ropes == [ropes[0]] * 3


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder `run` of a start from `first` that ended before its first save, and `second` with another RoPE."""
    folder = tmp_path_factory.mktemp("left")
    write_documents(folder / "documents")
    for name, theta in (("first", 1e6), ("second", 2e6)):
        save_model(folder / "hf" / name, rope_parameters={"rope_type": "default", "rope_theta": theta})
        (folder / "hf" / name / f"NOTICE.{name}").write_text(name)
        import_hf(HfFolder(folder / "hf" / name), folder / name)
    first = read(folder, "--pretrained-checkpoint", folder / "first", "--save", folder / "run")
    first.rank = 0
    pretrained.copy_model_files(first)
    (folder / "run" / "hf" / "mine.safetensors").write_text("of the user")
    return folder


def test_files_of_a_start_that_never_saved_decide_nothing(left):
    """Its `hf/` gave the RoPE to a run from another model in the same folder, and to its export."""
    copies = left / "run" / "hf"
    assert (copies / "NOTICE.first").is_file()
    flags = ["--load", left / "run", "--save", left / "run"]
    scratch = ["--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 2, "--vocab-size", 100]
    assert read(left, *flags, *scratch).model_folder is None
    flags += ["--pretrained-checkpoint", left / "second"]
    result = torchrun(1, *WIDER, "--data-path", left / "documents", *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads((copies / "config.json").read_text())["rope_parameters"]["rope_theta"] == 2e6
    assert (copies / "NOTICE.second").is_file() and not (copies / "NOTICE.first").exists()
    assert (copies / "mine.safetensors").is_file()
    resumed = read(left, *flags)
    assert resumed.rotary_base == 2e6 and resumed.model_folder == copies


def test_a_converted_model_without_its_config_keeps_its_rope(left, tmp_path):
    """Only the flags in the checkpoint say it then; the theta of a run without a model was taken."""
    bare = shutil.copytree(left / "first", tmp_path / "bare", ignore=lambda path, names: {"hf"} & set(names))
    flags = [*SHAPE, "--num-attention-heads", 4, "--num-query-groups", 4, "--pretrained-checkpoint", bare]
    whole = read(left, "--pretrained-checkpoint", left / "first", "--rope-scaling-type", "linear")
    args = read(left, *flags, "--rope-scaling-type", "linear")
    assert args.rotary_base == 1e6 and args.rope_scaling_config == {"rope_type": "linear", "factor": 2.0}
    assert (args.rope_scaling_config, args.rope_lines) == (whole.rope_scaling_config, whole.rope_lines)


def megatron_checkpoint(folder, **flags):
    """Return a checkpoint as Megatron-LM saves it, whose flags do not have this project's."""
    saved = Namespace(rotary_base=500000, max_position_embeddings=8192, rotary_percent=1.0, rotary_interleaved=False)
    return FoundCheckpoint("--pretrained-checkpoint", folder / "iter_0000002", Namespace(**(vars(saved) | flags)), None)


def test_a_checkpoint_of_megatron_brings_its_theta(tmp_path):
    rope = read_saved_rope(megatron_checkpoint(tmp_path))
    assert rope == ModelRope(theta=500000.0, scaling=None, positions=8192)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert read_saved_rope(megatron_checkpoint(tmp_path)) is None


@pytest.mark.parametrize(
    "saved, words",
    [
        ({}, None),
        ({"rotary_percent": 0.5}, "saved with --rotary-percent 0.5: only models with 1.0"),
        ({"rotary_interleaved": True}, "saved with --rotary-interleaved: only models without it"),
        (
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
            "saved with --use-rope-scaling. Give --rope-scaling-type llama3 --rope-scaling-factor 32 "
            "--original-max-position-embeddings 8192",
        ),
    ],
)
def test_other_rotary_embeddings_of_megatron_are_refused(tmp_path, saved, words):
    found = megatron_checkpoint(tmp_path, **saved)
    given = Namespace(rope_scaling_type=None, rope_scaling_config=None)
    if words is None:
        checkpoint_checks.check_model(given, Namespace(checkpoint=found, resumed=None))
        return
    with pytest.raises(UsageError) as error:
        checkpoint_checks.check_model(given, Namespace(checkpoint=found, resumed=None))
    assert words in str(error.value) and "\n" not in str(error.value)
    if "use_rope_scaling" in saved:  # what the line advises is accepted, and may be resumed from
        scaling = build_rope_scaling("llama3", 32.0, 8192)
        given = Namespace(rope_scaling_type="llama3", rope_scaling_config=scaling)
        checkpoint_checks._check_megatron_rope(given, found, False)
        checkpoint_checks._check_megatron_rope(given, found, True)
        with pytest.raises(UsageError, match="--use-rope-scaling"):
            checkpoint_checks._check_megatron_rope(
                Namespace(**vars(given) | {"rope_scaling_config": None}), found, True
            )
