"""Tests of the command line: recipes, precedence, and a one-line error for every setting that cannot run."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from megatron.core.transformer.enums import AttnBackend

from megatron_cream.common.errors import UsageError
from megatron_cream.config import describe, fill, parse
from megatron_cream.config.checks import flags as flag_checks
from megatron_cream.config.parser import build_parser
from megatron_cream.config.recipe import RECIPES as FOLDER
from megatron_cream.config.recipe import locate, read_recipe
from megatron_cream.config.samplers import read_shares
from megatron_cream.model import user_buffers
from megatron_cream.model.attention import AttentionBackend
from tests import forked_commands
from tests.launch import ROOT, torchrun, write_documents

GOOD = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 128,
    "target_length": 512,
    "micro_batch_size": 1,
    "train_iters": 2,
    "rope_scaling_type": "linear",
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 100,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_documents(tmp_path_factory.mktemp("data") / "documents"))


def read(monkeypatch, tmp_path, recipe: dict, *flags, world_size: int = 1):
    """Return the filled-in and checked namespace, without Megatron's own validation."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return parse.read(["--config", str(path), *map(str, flags)])


def test_command_line_wins_over_recipe_over_defaults(monkeypatch, tmp_path, data):
    args = read(monkeypatch, tmp_path, GOOD | {"data_path": data, "lr": 1e-3, "swiglu": True}, "--lr", "5e-4")
    assert args.lr == 5e-4  # command line
    assert args.seq_length == 128 and args.data_path == [data]  # recipe
    assert args.normalization == "RMSNorm" and args.dist_ckpt_optim_fully_reshardable  # project
    assert args.adam_beta2 == 0.999  # Megatron


def test_command_line_undoes_a_recipes_recompute(monkeypatch, tmp_path, data):
    recipe = GOOD | {"data_path": data, "recompute_granularity": "full"}
    recipe |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    assert read(monkeypatch, tmp_path, recipe).recompute_method == "uniform"
    args = read(monkeypatch, tmp_path, recipe, "--recompute-granularity", "none")
    assert (args.recompute_granularity, args.recompute_method, args.recompute_num_layers) == (None, None, None)


def test_recipe_values_are_parsed_as_the_command_line_would(tmp_path):
    path = tmp_path / "r.yaml"
    # PyYAML reads 1e-5 as text. Keys may have dashes or underscores, and name the flag or its variable.
    path.write_text("lr: 1e-5\nnum-layers: 3\nadd_bias_linear: false\nno_bias_swiglu_fusion: true\neval_lengths: 64\n")
    values = read_recipe(path, build_parser())
    assert values == {
        "lr": 1e-5,
        "num_layers": 3,
        "add_bias_linear": False,
        "bias_swiglu_fusion": False,
        "eval_lengths": [64],
    }


def test_recipes_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert locate("llama2_7b_32k") == FOLDER / "llama2_7b_32k.yaml" and locate("a/b.yaml") == Path("a/b.yaml")
    (tmp_path / "llama2_7b_32k").write_text("")
    assert locate("llama2_7b_32k") == Path("llama2_7b_32k")  # the user's file has precedence
    with pytest.raises(UsageError, match="--config llama3: no such file or recipe; .*: .*llama2_7b_256k"):
        locate("llama3")


@pytest.mark.parametrize(
    "flags, ranks, cuda, expected",
    [
        ("--use-distributed-optimizer", 2, True, (True, True)),
        ("--use-distributed-optimizer", 1, True, (False, False)),  # no peer rank
        ("--use-distributed-optimizer", 2, False, (False, False)),
        ("", 2, True, (False, False)),
        ("--use-distributed-optimizer --no-overlap-param-gather", 2, True, (True, False)),
        ("--use-distributed-optimizer --no-overlap-grad-reduce", 2, True, (False, False)),
        ("--use-distributed-optimizer --overlap-grad-reduce", 2, False, (True, False)),
        ("--use-distributed-optimizer --skip-train", 2, True, (False, False)),
    ],
)
def test_overlap_is_on_where_shards_are_on_several_gpus(flags, ranks, cuda, expected):
    assert fill.choose_overlaps(build_parser(recipe=False).parse_args(flags.split()), ranks, cuda) == expected


def test_a_recipe_turns_overlap_off_and_the_command_line_on(monkeypatch, tmp_path, data):
    recipe = GOOD | {"data_path": data, "use_distributed_optimizer": True, "overlap_param_gather": False}
    args = read(monkeypatch, tmp_path, recipe)
    assert fill.choose_overlaps(args, 2, True) == (True, False)
    assert "overlap_param_gather: false" in describe.describe(args)
    assert "overlap_grad_reduce" not in describe.describe(args)
    args = read(monkeypatch, tmp_path, recipe, "--overlap-param-gather")
    assert fill.choose_overlaps(args, 2, True) == (True, True)


def test_printed_config_is_a_recipe_for_the_same_run(monkeypatch, tmp_path, data):
    recipe = GOOD | {"data_path": data, "tensor_model_parallel_size": 2, "eval_lengths": [128, 512], "lr": 1e-4}
    first = read(monkeypatch, tmp_path, recipe, world_size=2)
    text = describe.describe(first)
    assert "attention: sdpa" in text and "2 ranks, TP 2" in text
    # Settings of this machine are left out.
    assert not {"distributed_backend", "use_cpu_initialization", "gradient_accumulation_fusion"} & set(
        yaml.safe_load(text)
    )
    again = read(monkeypatch, tmp_path, yaml.safe_load(text), world_size=2)
    different = {k for k in vars(first) if getattr(first, k) != getattr(again, k, None)} - {"config"}
    assert not different


INTERLEAVED = {"num_layers": 4, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
# (settings beyond GOOD, ranks, words that the error message must contain: flag, value, what would be right)
BAD = [
    ({"most_recent_k": 2}, 1, ["--most-recent-k 2: only with --save"]),
    ({"save_hook": "true"}, 1, ["--save-hook true: only with --save"]),
    ({"async_save": True}, 1, ["--async-save: only with --save"]),
    ({"target_length": 500}, 1, ["--target-length 500", "multiple of --seq-length 128", "512"]),
    ({"seq_length": 10}, 1, ["--target-length 512", "multiple of --seq-length 10"]),
    ({"num_layers": None}, 1, ["--num-layers is missing"]),
    ({"train_iters": None}, 1, ["--train-iters is missing"]),
    ({"hidden_size": 0}, 1, ["--hidden-size 0", "1 or more"]),
    ({"num_attention_heads": 5}, 1, ["--num-attention-heads 5", "--hidden-size 64"]),
    ({"tensor_model_parallel_size": 3}, 3, ["--tensor-model-parallel-size 3", "--num-attention-heads 4"]),
    ({"tensor_model_parallel_size": 2}, 1, ["1 ranks", "--tensor-model-parallel-size 2"]),
    ({"pipeline_model_parallel_size": 2, "num_layers": 3}, 2, ["--pipeline-model-parallel-size 2", "--num-layers 3"]),
    ({"context_parallel_size": 3}, 3, ["--seq-length 128", "--context-parallel-size 3"]),
    ({"global_batch_size": 3, "micro_batch_size": 2}, 1, ["--global-batch-size 3", "--micro-batch-size 2", "= 2"]),
    ({"global_batch_size": 4}, 3, ["--global-batch-size 4", "3 data-parallel ranks"]),
    ({"group_query_attention": True, "num_query_groups": 3}, 1, ["--num-query-groups 3", "--num-attention-heads 4"]),
    ({"num_query_groups": 2}, 1, ["--num-query-groups 2", "--group-query-attention"]),
    ({"position_sampler": "pose", "cream_sigma": 2.0}, 1, ["--cream-sigma 2.0", "cream", "pose"]),
    ({"position_sampler": "pi", "cream_variant": "released"}, 1, ["--cream-variant released", "pi"]),
    ({"position_sampler": "randpos", "mask_segment_starts": True}, 1, ["--mask-segment-starts", "randpos"]),
    ({"position_sampler": "full"}, 1, ["--position-sampler full", "--seq-length 128", "--target-length 512"]),
    ({"position_sampler": "alibi"}, 1, ["position_sampler", "alibi", "cream, pose, randpos, pi, full"]),
    ({"cream_sigma": -1.0}, 1, ["sigma", "-1.0"]),
    ({"cream_variant": "draft"}, 1, ["variant", "draft", "paper"]),
    ({"rope_scaling_type": "none", "rope_scaling_factor": 8.0}, 1, ["--rope-scaling-factor 8.0"]),
    ({"rope_scaling_factor": 0.5}, 1, ["--rope-scaling-type linear", "0.5"]),
    ({"use_rope_scaling": True}, 1, ["--use-rope-scaling", "--rope-scaling-type llama3"]),
    ({"rotary_percent": 0.5}, 1, ["--rotary-percent 0.5"]),
    ({"reset_position_ids": True}, 1, ["--reset-position-ids"]),
    ({"attention_backend": "te"}, 1, ["--attention-backend te", "auto"]),
    ({"attention_backend": "magic"}, 1, ["attention_backend", "magic", "sdpa"]),
    ({"context_parallel_size": 2, "attention_backend": "local"}, 2, ["--context-parallel-size 2", "local"]),
    (
        {"pipeline_model_parallel_layout": "Ettx|L"},
        1,
        ["--pipeline-model-parallel-layout Ettx|L: ", "layer character: x"],
    ),
    ({"rerun_mode": "report_stats"}, 1, ["--rerun-mode report_stats", "use validate_results"]),
    ({"full_validation": True}, 1, ["--full-validation", "--multiple-validation-sets"]),
    (
        {**INTERLEAVED, "full_validation": True, "multiple_validation_sets": True},
        2,
        ["--multiple-validation-sets", "not with virtual pipeline stages"],
    ),
    ({**INTERLEAVED, "iterations_to_skip": [2]}, 2, ["--iterations-to-skip", "not with virtual pipeline stages"]),
    (
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E(t|)*3L", "iterations_to_skip": [2]},
        2,
        ["--iterations-to-skip", "not with virtual pipeline stages"],
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]},
        1,
        ["--recompute-modules layernorm", "only with Transformer Engine"],
    ),
    ({"tp_comm_overlap": True}, 1, ["--tp-comm-overlap", "--sequence-parallel"]),
    (
        {"tp_comm_overlap": True, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        2,
        ["--tp-comm-overlap", "Transformer Engine's layers"],
    ),
    ({"inprocess_restart": True}, 1, ["--inprocess-restart", "torchrun --max-restarts"]),
    ({"async_save": True, "async_strategy": "nvrx"}, 1, ["--async-strategy nvrx", "use mcore"]),
    ({"cuda_graph_impl": "transformer_engine"}, 1, ["--cuda-graph-impl transformer_engine", "use local"]),
    ({"enable_cuda_graph": True}, 1, ["--enable-cuda-graph: ", "use --cuda-graph-impl local"]),
    ({"data_path": None}, 1, ["--data-path is missing"]),
    ({"data_path": "no/such/prefix"}, 1, ["--data-path no/such/prefix", "no/such/prefix.bin"]),
    ({"seq_length": 1024, "target_length": 1024}, 1, ["--data-path", "none of its 60 documents has 1024 tokens"]),
    ({"tokenizer_type": "SentencePieceTokenizer"}, 1, ["--tokenizer-model is missing"]),
    ({"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "no.model"}, 1, ["--tokenizer-model no.model"]),
    ({"load": "no/such/folder"}, 1, ["--load no/such/folder"]),
    ({"eval_lengths": [1]}, 1, ["--eval-lengths 1"]),
    ({"learning_rate": 1e-3}, 1, ["unknown key 'learning_rate'"]),
    ({"train_iters": "many"}, 1, ["train_iters: 'many'", "a whole number"]),
    ({"train_iters": True}, 1, ["train_iters: True", "a whole number"]),
    ({"sequence_parallel": "yes please"}, 1, ["sequence_parallel", "true or false"]),
    ({"lr_decay_style": "zigzag"}, 1, ["lr_decay_style", "zigzag", "cosine"]),
]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_cuda_graphs_with_expandable_segments(name, monkeypatch):
    args = build_parser(recipe=False).parse_args(["--cuda-graph-impl", "local"])
    flag_checks.check_graphs_with_segments(args)
    monkeypatch.setenv(name, "garbage_collection_threshold:0.8,expandable_segments:True")
    with pytest.raises(UsageError, match=f"--cuda-graph-impl local with {name}=.*remove one of them"):
        flag_checks.check_graphs_with_segments(args)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    flag_checks.check_graphs_with_segments(args)


@pytest.mark.parametrize("kernel, value", [("auto", "0"), ("unfused", "1"), ("local", "1")])
def test_another_kernel_in_the_environment(kernel, value, monkeypatch):
    for name in ("FUSED", "UNFUSED"):
        monkeypatch.delenv(f"NVTE_{name}_ATTN", raising=False)
    args = Namespace(attention_backend=AttnBackend[kernel])
    monkeypatch.setenv("NVTE_FLASH_ATTN", str(1 - int(value)))
    flag_checks.check_kernel_in_environment(args)
    monkeypatch.setenv("NVTE_FLASH_ATTN", value)
    with pytest.raises(
        UsageError, match=f"NVTE_FLASH_ATTN={value} in the environment: .* needs {1 - int(value)}.*Unset"
    ):
        flag_checks.check_kernel_in_environment(args)


@pytest.mark.parametrize("changed, ranks, words", BAD, ids=lambda value: str(value)[:40])
def test_bad_input_prints_one_line(changed, ranks, words, monkeypatch, tmp_path, data):
    recipe = {k: v for k, v in (GOOD | {"data_path": data} | changed).items() if v is not None}
    with pytest.raises(UsageError) as caught:
        read(monkeypatch, tmp_path, recipe, world_size=ranks)
    message = str(caught.value)
    assert "\n" not in message
    missing = [word for word in words if word not in message]
    assert not missing, message


@pytest.mark.parametrize(
    "also",
    [
        {"eval_lengths": [128, 256]},
        {"long_eval_interval": 1, "long_eval_tasks": "perplexity"},
        {"tp_comm_overlap_cfg": "no"},
    ],
)
def test_user_buffers_need_samples_of_one_length(also, monkeypatch, tmp_path, data):
    layers = AttentionBackend(name="flash", te_kernel="flash", transformer_engine=True, reason="a test")
    monkeypatch.setattr(fill, "choose_backend", lambda *_, **__: layers)
    recipe = GOOD | {"tp_comm_overlap": True, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    recipe |= {"data_path": data, "save": str(tmp_path / "save"), "save_interval": 1}
    assert read(monkeypatch, tmp_path, recipe, world_size=2).tp_comm_overlap
    name = next(iter(also))
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        read(monkeypatch, tmp_path, recipe | also, world_size=2)


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "No such file"),
        ("[1, 2]", "must map matrix products"),
        ("proj_fprop: ring_exchange", "must map matrix products"),
        ("proj: {method: pipeline}", "proj: no such matrix product"),
        ("proj_fprop: {method: [}", "not a YAML file"),
        ("proj_fprop: !!python/object/apply:os.getcwd []", "not a YAML file"),
    ],
)
def test_the_user_buffer_configuration_is_checked_early(text, words, tmp_path):
    file = tmp_path / "buffers.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        user_buffers.check_config(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags, rings",
    [
        ("--tensor-model-parallel-size 2 --tp-comm-overlap", True),
        ("--tensor-model-parallel-size 2", False),
        ("--tensor-model-parallel-size 4 --tp-comm-overlap", True),
        ("--tensor-model-parallel-size 8 --tp-comm-overlap", False),
        ("--tensor-model-parallel-size 2 --tp-comm-overlap --fp8-format hybrid", False),
        ("--tensor-model-parallel-size 2 --tp-comm-overlap --tp-comm-overlap-cfg own.yaml", False),
    ],
)
def test_user_buffers_send_in_rings_where_that_was_measured(flags, rings):
    args = build_parser(recipe=False).parse_args(flags.split())
    given = args.tp_comm_overlap_cfg
    fill.set_user_buffers(args)
    assert args.tp_comm_overlap_cfg == (str(user_buffers.RING_CONFIG) if rings else given)
    assert args.tp_comm_overlap_rs_dgrad is rings
    user_buffers.check_config(str(user_buffers.RING_CONFIG))


@pytest.mark.parametrize(
    "flags, given, expected",
    [
        ("", {}, "expandable_segments:True"),
        ("", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ("", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ("--cuda-graph-impl local", {}, None),
    ],
)
def test_expandable_segments_are_on_by_default(flags, given, expected, monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    fill.use_expandable_segments(build_parser(recipe=False).parse_args(flags.split()))
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


@pytest.mark.parametrize(
    "text, word",
    [("- a\n- b\n", "must map"), ("a: [", "not a YAML file"), ("lr: !!python/object/apply:os.getcwd []", "not a YAML")],
)
def test_invalid_recipes(text, word, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=word):
        read_recipe(path, build_parser())


def test_a_broken_index_prints_one_line(monkeypatch, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"12")
    (tmp_path / "x.idx").write_bytes(b"not an index")
    with pytest.raises(UsageError, match="--data-path .*not a .bin/.idx pair"):
        read(monkeypatch, tmp_path, GOOD | {"data_path": str(tmp_path / "x")})


def test_exit_code_2_comes_before_any_process_group(tmp_path, data):
    import subprocess

    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (GOOD | {"target_length": 500}).items()]
    result = subprocess.run(
        [
            *forked_commands.python(),
            ROOT / "pretrain_cream.py",
            *flags,
            "--data-path",
            data,
            "--save",
            tmp_path / "save",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("pretrain_cream.py: error: --target-length 500"), result.stderr
    assert not list(tmp_path.iterdir())


def test_help_lists_our_flags_and_megatrons():
    text = build_parser(recipe=False).format_help()
    assert "--position-sampler" in text and "--tensor-model-parallel-size" in text


def test_an_unknown_flag_prints_one_line(monkeypatch):
    with pytest.raises(UsageError, match="--no-such-flag"):
        parse.read(["--no-such-flag", "1"])


def test_print_config_runs_nothing(data, tmp_path):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in GOOD.items()]
    result = torchrun(1, *flags, "--data-path", data, "--save", tmp_path / "save", "--print-config")
    assert result.returncode == 0 and not (tmp_path / "save").exists()
    printed = yaml.safe_load(result.stdout)
    assert printed["target_length"] == 512
    assert "# attention: sdpa" in result.stdout


@pytest.mark.parametrize("text", ["cream", "cream=", "cream=x", "cream=1,,pi=1", "pi=1,pi=1", ""])
def test_invalid_shares(text):
    with pytest.raises(ValueError, match="NAME=SHARE|twice"):
        read_shares(text)
    assert read_shares("cream=0.6, pose=0.2,pi=.2") == {"cream": 0.6, "pose": 0.2, "pi": 0.2}
