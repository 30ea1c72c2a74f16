"""Every recipe is read, can be trained, and does what its comments say."""

import math
import re
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from megatron_cream.checkpoint import base_weights, pretrained
from megatron_cream.config import describe, parse
from megatron_cream.config.recipe import RECIPES as FOLDER
from megatron_cream.config.samplers import sampler_options
from megatron_cream.planning import layouts, memory, step_time
from megatron_cream.planning.flags import run_from_flags
from megatron_cream.planning.hardware import GIB, GPUS, Cluster
from megatron_cream.positions import build_sampler
from tests.launch import ROOT, write_documents

RECIPES = sorted(FOLDER.glob("*.yaml"))
PLANNED = [path for path in RECIPES if "_lora_" in path.stem]
TABLE = ROOT / "docs" / "memory.md"


@pytest.fixture(scope="module")
def long_data(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("long") / "documents"
    return str(write_documents(prefix, documents=3, shortest=33000, longest=34000))


def write_config(folder: Path, recipe: dict, window: int) -> str:
    """Write the config.json of the model that a recipe is for, and return the folder."""
    LlamaConfig(
        num_hidden_layers=recipe["num_layers"],
        hidden_size=recipe["hidden_size"],
        intermediate_size=recipe["ffn_hidden_size"],
        num_attention_heads=recipe["num_attention_heads"],
        num_key_value_heads=recipe.get("num_query_groups", recipe["num_attention_heads"]),
        vocab_size=recipe.get("vocab_size", 32000),
        rms_norm_eps=recipe["norm_epsilon"],
        rope_theta=500000.0 if window == 8192 else 10000.0,
        max_position_embeddings=window,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_plans(recipe, monkeypatch, tmp_path, long_data):
    values = yaml.safe_load(recipe.read_text())
    model_parallel = [values.get(f"{kind}_parallel_size", 1) for kind in ("tensor_model", "pipeline_model", "context")]
    monkeypatch.setenv("WORLD_SIZE", str(max(2, math.prod(model_parallel))))
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"")
    own = ["--data-path", long_data, "--tokenizer-model", str(tokenizer)]
    if values.get("embedded_data"):
        own = []
    elif "lora_rank" in values:
        window = 8192 if "llama3" in recipe.stem else 4096
        own = ["--data-path", long_data, "--load-hf", write_config(tmp_path, values, window)]
        monkeypatch.setattr(base_weights, "describe", lambda given, **_: {"name": given, "folder": given})
        monkeypatch.setattr(pretrained, "check_model_folder", lambda *_, **__: None)  # a config without weights
    args = parse.read(["--config", str(recipe), *own])
    sampler = build_sampler(**sampler_options(args), seed=args.seed)
    plan = sampler.plan(epoch=0, sample=0, document_length=args.target_length)
    assert len(plan.position_ids) == args.seq_length and plan.position_ids[-1] < args.target_length
    if "llama2" in recipe.stem:
        rope, scaling = args.rope_scaling_config, "linear" if "paper" in recipe.stem else "yarn"
        assert (rope["rope_type"], rope["factor"]) == (scaling, args.target_length / 4096)
        assert rope.get("original_max_position_embeddings", 4096) == 4096
        assert (args.lr, args.global_batch_size, args.adam_beta2, args.weight_decay) == (2e-5, 32, 0.999, 0.0)


def plan(flags: list[str], gpus: int) -> tuple[memory.Memory, step_time.Speed]:
    """Return the planned memory and speed on H100s."""
    run = run_from_flags(flags, gpus)
    assert run.find_misfit() is None
    gpu = GPUS["H100"]
    cluster = Cluster(gpu=gpu, host=8, inside=gpu.nvlink, between=gpu.network)
    return (
        memory.predict(run.model, run.layout, run.engine),
        step_time.predict(run.model, run.layout, run.engine, cluster),
    )


@pytest.mark.parametrize("recipe", PLANNED, ids=lambda path: path.stem)
def test_a_recipe_for_a_card_fits_it_as_it_says(recipe):
    """plan.py says that it fits; the figures in the recipe and in docs/memory.md are the plan's."""
    gpus = 8 if "8x" in recipe.stem else 1
    card = int(re.search(r"(\d+)gb$", recipe.stem)[1])
    needed, speed = plan(["--config", str(recipe)], gpus)
    assert needed.device < layouts.usable(card * GIB)
    peak, rate = f"{needed.device / GIB:.1f}", f"{round(speed.tokens_per_second, -2):,.0f}"
    text = re.sub(r"\n# ", " ", recipe.read_text())
    assert f"{peak} GiB of " in text and f"about {rate} tokens/s" in text
    row = next(line for line in TABLE.read_text().splitlines() if f"`{recipe.stem}`" in line)
    assert row.split("|")[-3].strip() == peak and row.split("|")[-2].strip() == rate


@pytest.mark.parametrize("row", [line for line in TABLE.read_text().splitlines() if "| `--config" in line])
def test_a_row_of_flags_fits_the_card_as_it_says(row):
    _, _, card, flags, peak, rate, _ = (cell.strip() for cell in row.split("|"))
    needed, speed = plan(flags.strip("`").split(), gpus=1)
    assert needed.device < layouts.usable(int(card.removesuffix(" GB")) * GIB)
    assert (f"{needed.device / GIB:.1f}", f"{round(speed.tokens_per_second, -2):,.0f}") == (peak, rate)


def test_print_config_of_a_two_gpu_recipe_needs_no_launcher(monkeypatch, tmp_path, long_data):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    flags = ["--data-path", long_data, "--tokenizer-model", str(tmp_path / "tokenizer.model"), "--print-config"]
    args = parse.read(["--config", "llama2_7b_32k", *flags])
    assert args.world_size == 2 and "TP 2" in describe.describe(args)
