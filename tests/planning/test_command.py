"""tools/plan.py: the table, the suggested layouts and invalid flags."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
from transformers import LlamaConfig

from megatron_cream.checkpoint import start
from megatron_cream.commands import plan as command
from megatron_cream.common.errors import UsageError
from megatron_cream.config.recipe import RECIPES as FOLDER
from megatron_cream.planning import layouts
from megatron_cream.planning.flags import run_from_flags
from megatron_cream.planning.hardware import GIB
from megatron_cream.planning.memory import predict
from megatron_cream.planning.run import Layout, Model
from tests import forked_commands
from tests.launch import ROOT

RECIPE = str(FOLDER / "llama2_7b_32k.yaml")


def test_the_papers_setting_fits_two_gpus_without_offload():
    """Llama-2-7B with global batch 32 fits two A100-80G, and the suggested flags give the planned layout."""
    result = plan("--config", RECIPE, "--gpus", "2", "--gpu-memory", "80", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["own"]["fits"] and found["own"]["layout"]["global_batch"] == 32
    assert found["layouts"][0]["layout"]["recompute"] == "none"
    for each in found["layouts"]:
        assert each["memory"]["device"] <= found["usable"] < 80 * GIB
        layout = Layout(**each["layout"] | {"recompute_modules": tuple(each["layout"]["recompute_modules"])})
        given = ["--seq-length", "4096", "--global-batch-size", "32", "--tokenizer-type", "Llama2Tokenizer"]
        shape = [
            "--num-layers",
            "32",
            "--hidden-size",
            "4096",
            "--ffn-hidden-size",
            "11008",
            "--num-attention-heads",
            "32",
        ]
        again = run_from_flags([*given, *shape, *layouts.flags(layout)], 2)
        assert again.layout == layout and predict(again.model, layout, again.engine).device == each["memory"]["device"]


def test_the_table_is_complete(monkeypatch, capsys, tmp_path):
    careful = tmp_path / "recipe.yaml"
    recompute = "recompute_granularity: full\nrecompute_method: uniform\nrecompute_num_layers: 1\n"
    careful.write_text(Path(RECIPE).read_text() + recompute)
    assert tool(monkeypatch, "--config", str(careful), "--gpus", "2") == 0
    text = capsys.readouterr().out
    for part in ("6.74 B parameters", "optimizer", "activations", "fits:", "--micro-batch-size 1", ": null"):
        assert part in text


def test_another_number_of_gpus_than_the_recipe_needs(monkeypatch, capsys):
    assert tool(monkeypatch, "--config", RECIPE, "--gpus", "1", "--gpu-memory", "140") == 0
    text = capsys.readouterr().out
    assert "--gpus 1: must be a multiple of --tensor-model-parallel-size 2" in text and "fastest first" in text
    flags = shlex.split(re.search(r"^Next: torchrun --nproc_per_node=1 \S*pretrain_cream.py (.+)$", text, re.M)[1])
    assert flags[flags.index("--load-hf") :] == "--load-hf HF_MODEL --data-path DATA --save extended".split()
    assert run_from_flags(flags[: flags.index("--load-hf")], 1).find_misfit() is None


def next_words(text: str) -> list[str]:
    """Return the words of the command that the plan advises."""
    return shlex.split(re.search(r"^Next: (.+)$", text, re.M)[1])


EXAMPLES = re.findall(r"^python tools/plan.py (.+)$", command.__doc__, re.M)
PAGE = (ROOT / "docs" / "planner.md").read_text().replace("\\\n", " ")
EXAMPLES += re.findall(r"^python tools/plan.py (.+)$", PAGE, re.M)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_help_and_docs(monkeypatch, capsys, tmp_path, example):
    """Each lists a layout."""
    monkeypatch.chdir(tmp_path)
    shape = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
    config.save_pretrained("Llama-2-13b-hf")
    sizes = dict(load_hf="Llama-2-13b-hf", seq_length=4096, target_length=8192, global_batch_size=8, train_iters=9)
    Path("extend.yaml").write_text(json.dumps(sizes))
    assert tool(monkeypatch, *shlex.split(example)) == 0
    text = capsys.readouterr().out
    if "--json" in example:
        assert json.loads(text)["layouts"]
    elif "--check" not in example:
        assert "layouts that fit, fastest first" in text and next_words(text)
    assert " at 2.5 a GPU-hour" in text or "--price 2.5" not in example


@pytest.mark.parametrize("name, gpus", [("llama2_7b_256k", 64), ("llama2_7b_32k", 64), ("llama2_7b_32k", 32)])
def test_a_batch_that_the_layout_of_the_flags_cannot_divide(monkeypatch, capsys, name, gpus):
    assert tool(monkeypatch, "--config", name, "--gpus", str(gpus)) == 0
    text = capsys.readouterr().out
    misfit = f"--global-batch-size 32: must be a multiple of --micro-batch-size 2 x {gpus // 2} data-parallel ranks"
    assert (f"The layout of these flags cannot run: {misfit} = {gpus}" in text) == (gpus == 64)
    assert re.search(r"^layout 1: 1,000 steps: .* GPU-hours$", text, re.M) or gpus == 32
    flags = next_words(text)[next_words(text).index("--config") : -6]
    run = run_from_flags(flags, gpus)
    assert run.find_misfit() is None and layouts.find_conflict(run.model, run.layout) is None


@pytest.mark.parametrize("gpus", [3, 12, 24])
def test_gpus_over_which_no_layout_divides_the_batch(monkeypatch, capsys, gpus):
    """The line names a batch that fits."""
    flags = ["--config", "llama2_7b_32k", "--gpus", str(gpus), "--gpu", "H200"]
    assert tool(monkeypatch, *flags) == 1
    said = capsys.readouterr()
    assert "The layout of these flags cannot run" in said.out
    batch = re.search(r"over them; with (--global-batch-size \d+) one fits; \d+ GPUs are enough", said.err)[1]
    assert tool(monkeypatch, *flags, *batch.split()) == 0


@pytest.mark.parametrize(
    "recipe, flags, placeholders",
    [
        ({}, [], ["--load-hf", "HF_MODEL", "--data-path", "DATA", "--save", "extended"]),
        ({}, ["--save-hf=out"], ["--load-hf", "HF_MODEL", "--data-path", "DATA"]),
        ({"load_hf": "hf"}, ["--data-path", "a"], ["--save", "extended"]),
        ({"load": "run", "save": "run"}, [], ["--data-path", "DATA"]),
        ({"load_hf": "hf", "train_data_path": ["a"], "save_hf": "out"}, [], []),
        ({"embedded_data": True, "vocab_size": 256}, [], ["--save", "extended"]),
    ],
)
def test_no_placeholder_for_what_is_given(monkeypatch, capsys, tmp_path, recipe, flags, placeholders):
    monkeypatch.chdir(tmp_path)
    shape = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    config = LlamaConfig(**shape, intermediate_size=96, vocab_size=256, architectures=["LlamaForCausalLM"])
    config.save_pretrained("hf")
    own = {} if "load_hf" in recipe else dict(num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=256)
    sizes = dict(seq_length=64, micro_batch_size=1, global_batch_size=4, train_iters=2)
    Path("recipe.yaml").write_text(json.dumps(sizes | own | recipe))
    monkeypatch.setattr(start, "find_model", keep_missing(start.find_model))
    assert tool(monkeypatch, "--config", "recipe.yaml", "--gpus", "1", *flags) == 0
    words = next_words(capsys.readouterr().out)
    assert words[words.index("--config") :][2 : 2 + len(flags)] == flags
    given = {"HF_MODEL", "DATA", "extended"} & set(words)
    assert given == set(placeholders[1::2]) and (not placeholders or words[-len(placeholders) :] == placeholders)


def keep_missing(find_model):
    """Return `find_model` for a machine without the checkpoint of --load."""
    return lambda flags: (None, None) if flags.load else find_model(flags)


@pytest.mark.parametrize(
    "gpus, host, tensor, hosts",
    [(8, 8, 1, 1), (9, 8, 1, 3), (12, 8, 2, 2), (12, 8, 4, 3), (11, 8, 1, 11), (64, 8, 4, 8)],
)
def test_ranks_of_each_host(gpus, host, tensor, hosts):
    """All GPUs are used, and no tensor-parallel group is on two hosts."""
    words = command.torchrun_flags(Namespace(gpus=gpus, gpus_per_host=host), tensor)
    given = dict(word.removeprefix("--").split("=") for word in words)
    assert int(given.get("nnodes", 1)) == hosts and int(given["nproc_per_node"]) * hosts == gpus
    assert int(given["nproc_per_node"]) % tensor == 0


STAGES = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "4"]
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()


@pytest.mark.parametrize("flags", [STAGES, FULL], ids=["virtual stages", "full recompute"])
def test_the_next_command_leaves_out_what_its_layout_has_not(monkeypatch, capsys, flags):
    """It has the listed layout. In a recipe these settings must be edited, and there is no such command."""
    monkeypatch.setattr(layouts, "find_fitting", only_plain(layouts.find_fitting))
    assert tool(monkeypatch, "--config", "llama2_7b_32k", *flags, "--gpus", "8", "--gpu", "H200") == 0
    text = capsys.readouterr().out
    words = next_words(text)
    assert flags[-2] not in words and re.search(r"^1: .*leave out, or set in the recipe, \w+: null", text, re.M)
    layout = run_from_flags(words[words.index("--config") : -6], 8).layout
    assert layout.recompute == "none" and layout.virtual_pipeline == 1


def only_plain(find_fitting):
    """Return `find_fitting` that keeps only layouts without recompute."""
    return lambda *given: [plan for plan in find_fitting(*given) if plan.layout.recompute == "none"]


def test_no_next_command_of_a_recipe_to_edit(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    stages = "pipeline_model_parallel_size: 2\nnum_layers_per_virtual_pipeline_stage: 4\n"
    recipe.write_text(Path(RECIPE).read_text() + stages)
    assert tool(monkeypatch, "--config", str(recipe), "--gpus", "8", "--gpu", "H200") == 0
    text = capsys.readouterr().out
    assert "num_layers_per_virtual_pipeline_stage: null" in text and "Next:" not in text


@pytest.mark.parametrize("flags, said", [([], True), (["--tp-comm-overlap"], False), (["--host-link", "pcie"], False)])
def test_gain_of_user_buffers(monkeypatch, capsys, flags, said):
    assert tool(monkeypatch, "--config", RECIPE, "--gpus", "2", "--gpu", "H200", *flags) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if "with --tp-comm-overlap:" in line]
    assert bool(lines) is said
    if said:
        (rate,) = re.findall(r" ([\d,]+) tokens/s/GPU, MFU", lines[0])
        (row,) = re.findall(rf"│ +{lines[0].split()[0]} │ +2 │.*│ +([\d,]+) │ +[\d.]+% │", text)
        assert int(rate.replace(",", "")) > 1.02 * int(row.replace(",", ""))


def test_user_buffers_that_do_not_fit(monkeypatch, capsys):
    """On 80 GB the recipe has no room for them with its micro-batch of 2."""
    assert tool(monkeypatch, "--config", RECIPE, "--gpus", "2", "--gpu", "H100") == 0
    text = capsys.readouterr().out
    own = ["--config", RECIPE, "--micro-batch-size", "2", "--tp-comm-overlap"]
    assert re.search(r"^fits: .* it may run out of memory$", text, re.M) and "with --tp-comm-overlap" not in text
    assert tool(monkeypatch, *own, "--gpus", "2", "--gpu", "H100") == 0
    text = capsys.readouterr().out
    assert "does not fit" in text and "0.8 user buffers" in text


def test_layouts_that_may_run_out_of_memory(monkeypatch, capsys):
    """Table, JSON and the next command agree: on four 80 GB GPUs the fastest layout has 0.7 GiB left."""
    flags = ["--config", RECIPE, "--gpus", "4", "--gpu", "H100"]
    assert tool(monkeypatch, *flags) == 0
    text = capsys.readouterr().out
    left = re.findall(r"^│ +\d │.*│ +([\d.]+)(\*?) │ +[\d.]+ │ +[\d,]+ │ +[\d.]+% │$", text, re.M)
    marked = [bool(mark) for _, mark in left]
    assert marked[0] and not all(marked) and marked == [float(gib) < 1 for gib, _ in left]
    assert re.search(r"^\* within the plan's error of 1 GiB: it may run out of memory$", text, re.M)
    assert re.search(r"^\d with --tp-comm-overlap: .*; it may run out of memory$", text, re.M)
    number = marked.index(False) + 1
    assert f"Layout 1 may run out of memory; the next command is of layout {number}." in text
    (added,) = re.findall(rf"^{number}: (.+)$", text, re.M)
    assert re.search(rf"^Next: torchrun .* {re.escape(added)} --load-hf", text, re.M)
    assert tool(monkeypatch, *flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["is_close"] for each in found["layouts"]][: len(marked)] == marked and not found["own"]["is_close"]
    assert tool(monkeypatch, *flags[:-1], "H200") == 0
    roomy = capsys.readouterr().out
    assert "* within" not in roomy and "may run out" not in roomy and "Layout 1" not in roomy


def test_the_next_command_is_of_a_layout_with_room():
    """If none has room, it is the fastest's."""
    plans = [Mock(memory=Mock(device=size * GIB)) for size in (79.0, 78.9)]
    assert command.find_roomy(plans, 79.2 * GIB) is plans[0]
    assert command.find_roomy(plans, 79.91 * GIB) is plans[1]


def test_nothing_fits(monkeypatch, capsys):
    assert tool(monkeypatch, "--config", RECIPE, "--gpus", "1", "--gpu-memory", "40GiB") == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "4 GPUs are enough" in error


def tool(monkeypatch, *arguments: str) -> int:
    """Run tools/plan.py in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    return command.main()


def plan(*arguments: str) -> subprocess.CompletedProcess:
    words = [*forked_commands.python(), str(ROOT / "tools" / "plan.py"), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "missing.yaml", "--gpus", "2"], "--config missing.yaml"),
        (["--config", RECIPE], "--gpus"),
        (["--config", RECIPE, "--gpus", "0"], "'0': must be a whole number"),
        (["--config", RECIPE, "--gpus", "2", "--gpu-memory", "much"], "'much': must be a number of GiB"),
        (["--config", RECIPE, "--gpus", "2", "--no-such-flag"], "--no-such-flag"),
        (["--config", RECIPE, "--gpus", "2", "--optimizer", "sgd"], "--optimizer sgd"),
        (["--config", RECIPE, "--gpus", "2", "--main-grads-dtype", "bf16"], "--use-precision-aware-optimizer"),
        (["--config", RECIPE, "--gpus", "2", "--attention-backend", "local"], "--attention-backend local"),
        (["--config", RECIPE, "--gpus", "4", "--micro-batch-size", "3"], "--global-batch-size 32"),
        (["--config", RECIPE, "--gpus", "3", "--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3"),
        (
            ["--config", RECIPE, "--gpus", "4", "--pipeline-model-parallel-size", "2"]
            + [
                "--num-layers-per-virtual-pipeline-stage",
                "1",
                "--microbatch-group-size-per-virtual-pipeline-stage",
                "1",
            ],
            "--microbatch-group-size-per-virtual-pipeline-stage 1: must be from --pipeline-model-parallel-size 2 to the 16",
        ),
        (["--config", RECIPE, "--gpus", "2", "--use-torch-fsdp2"], "--use-torch-fsdp2"),
        (["--load-hf", "nowhere/at/all", "--gpus", "2", "--seq-length", "4096"], "--load-hf"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_bad_input_prints_one_line(monkeypatch, capsys, arguments, message):
    assert tool(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_shape_of_a_hugging_face_folder(tmp_path):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        tie_word_embeddings=True,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    run = run_from_flags(["--load-hf", str(tmp_path), "--seq-length", "64"], 1)
    assert run.model == Model(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        padded_vocab_size=384,
        tied=True,
    )


def test_narrow_optimizer_state_is_counted():
    """Two bytes extend the bf16 weight to float32, and each moment has two bytes."""
    flags = ["--config", RECIPE, "--use-precision-aware-optimizer", "--main-grads-dtype", "bf16"]
    run = run_from_flags([*flags, "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"], 2)
    assert (run.engine.gradient, run.engine.optimizer) == (2, 2 + 2 + 2)


def test_gradients_reduced_in_bf16_are_counted():
    assert run_from_flags(["--config", RECIPE, "--grad-reduce-in-bf16"], 2).engine.gradient == 2


def test_an_unknown_vocabulary_is_asked_for(tmp_path):
    shape = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "64"]
    with pytest.raises(UsageError, match="--vocab-size is missing"):
        run_from_flags(shape, 1)
    with contextlib.chdir(tmp_path):
        assert run_from_flags([*shape, "--vocab-size", "100"], 1).model.padded_vocab_size == 128
    assert not list(Path(tmp_path).iterdir())
