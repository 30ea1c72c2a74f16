"""tools/plan.py: the table, the suggested layouts and invalid flags."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from transformers import LlamaConfig

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
