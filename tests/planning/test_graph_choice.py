"""The choice of CUDA graphs by the planner, for runs whose flags do not decide."""

import os
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from megatron_cream.common import devices
from megatron_cream.config import fill
from megatron_cream.config.parser import build_parser, default_values
from megatron_cream.config.recipe import read_recipe, recipe_path
from megatron_cream.planning import graph_choice, memory
from megatron_cream.planning.hardware import GPUS
from megatron_cream.planning.own_run import find_own_run, predict_own_run
from tests.processes import ROOT

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
SMALL = ["--config", "llama_1b", "--micro-batch-size", "1"]
SEVEN_B = ["--config", "llama_7b_width", "--num-layers", "32", "--micro-batch-size", "1"]
TP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Pretend an H100; CUDA itself must not be asked, since torch's allocator would read its settings then."""

    def fail(*_):
        pytest.fail("torch was asked for the GPU's name, which initializes CUDA")

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "has_cuda", lambda: True)
    monkeypatch.setattr(devices, "read_gpu_name", lambda: H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)


def checked(argv: list[str], ranks: int = 1, **values) -> Namespace:
    """Return the flags as `choose_graphs` gets them on a machine with Transformer Engine and flash-attn."""
    parser = build_parser(recipe=False)
    path = recipe_path(argv)
    args = parser.parse_args(argv, Namespace(**read_recipe(path, parser) if path else {}))
    found = {"bf16": True, "world_size": ranks, "cuda_graph_impl": "none"}
    found["attention"] = {"name": "flash", "transformer_engine": True}
    return Namespace(**vars(args) | found | values)


def choose(argv: list[str], ranks: int = 1, **values) -> str | None:
    return graph_choice.choose_graphs(argv, checked(argv, ranks, **values))


def test_a_small_model_at_micro_batch_1_gets_graphs():
    assert choose(SMALL) == (
        "CUDA graphs, because the GPU would wait for the CPU: 66,403 tokens/s/GPU by plan, 40,006 without; "
        "--cuda-graph-impl none turns them off"
    )


@pytest.mark.parametrize("flags, ranks", [(["--use-distributed-optimizer"], 2), (TP, 2)])
def test_graphs_with_data_or_tensor_parallelism(flags, ranks):
    assert choose([*SMALL, *flags], ranks)


@pytest.mark.parametrize(
    "argv, ranks",
    [
        ([*SMALL, "--micro-batch-size", "4"], 1),
        ([*SEVEN_B, "--use-precision-aware-optimizer", "--use-distributed-optimizer"], 1),
        ([*SEVEN_B, *TP], 2),  # the host takes 3.6 % of this step by plan
        (["--config", "llama2_7b_32k"], 2),
        (["--config", str(ROOT / "benchmarks" / "llama_135m.yaml")], 1),  # 1.6 %; measured: 3.5 % more tokens/s
    ],
)
def test_kernels_that_are_long_enough_need_no_graphs(argv, ranks):
    args = checked(argv, ranks)
    assert graph_choice.can_use_graphs(args) and find_own_run(argv, args, H100)
    assert choose(argv, ranks) is None


# {flag: a value with which the run has no graphs}
EXCLUDED = {
    "lora_rank": 16, "short_share": 0.3, "cpu_offloading_num_layers": 2, "fine_grained_activation_offloading": True,
    "fp16": True, "fp32": True, "fp8": "hybrid", "fp4": "e2m1", "recompute_granularity": "selective",
    "recompute_activations": True, "hidden_dropout": 0.1, "attention_dropout": 0.1, "tp_comm_overlap": True,
    "nccl_ub": True, "optimizer_cpu_offload": True, "optimizer_cuda_graph": True, "cuda_graph_modules": ["attn"],
    "use_megatron_fsdp": True, "use_torch_fsdp2": True, "delay_wgrad_compute": True,
    "defer_embedding_wgrad_compute": True, "use_transformer_engine_op_fuser": True, "symmetric_ar_type": "two_shot",
    "rampup_batch_size": ["2", "2", "64"], "step_batch_size_schedule": "0:8", "log_max_attention_logit": True,
    "batch_invariant_mode": True, "deterministic": True, "deterministic_mode": True, "skip_train": True,
    "profile": True, "record_memory_history": True, "rerun_mode": "validate_results", "bf16": False,
}  # fmt: skip


def test_each_excluded_flag_is_a_flag_and_is_tested():
    assert set(graph_choice.OFF_WITH) <= EXCLUDED.keys() <= default_values().keys()
    assert not any(default_values()[name] for name in graph_choice.OFF_WITH)


@pytest.mark.parametrize("name", EXCLUDED)
def test_runs_that_were_not_tested_with_graphs_have_none(name):
    assert choose(SMALL) and choose(SMALL, **{name: EXCLUDED[name]}) is None


@pytest.mark.parametrize(
    "attention", [("te", True), ("sdpa", True), ("flash", False), ("sdpa", False), ("local", False)]
)
def test_other_attentions_and_layers_have_no_graphs(attention):
    assert choose(SMALL, attention=dict(zip(("name", "transformer_engine"), attention, strict=True))) is None


@pytest.mark.parametrize(
    "flags, ranks",
    [
        ("--context-parallel-size 2 --use-distributed-optimizer", 2),
        ("--pipeline-model-parallel-size 2", 2),
        ("--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer", 4),
        ("--tensor-model-parallel-size 2", 2),
    ],
)
def test_other_layouts_have_no_graphs(flags, ranks):
    assert choose([*SMALL, *flags.split()], ranks) is None


def test_data_parallelism_without_the_distributed_optimizer_has_no_graphs():
    assert choose(SMALL, ranks=2, use_distributed_optimizer=True)
    assert choose(SMALL, ranks=2, use_distributed_optimizer=False) is None


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_expandable_segments_are_kept(name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert choose(SMALL)
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    assert choose(SMALL) is None


@pytest.mark.parametrize("name", [None, "Tesla T4", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB"])
def test_gpus_that_the_planner_does_not_know_have_no_graphs(name, monkeypatch):
    monkeypatch.setattr(devices, "read_gpu_name", lambda: name)
    assert choose(SMALL) is None


def test_without_cuda_there_are_no_graphs(monkeypatch):
    monkeypatch.setattr(devices, "has_cuda", lambda: False)
    assert choose(SMALL) is None


def test_flags_that_the_planner_does_not_know_leave_the_run_without_graphs():
    assert choose([*SMALL, "--fp32-residual-connection"]) is None
    assert choose([*SMALL, "--optimizer", "sgd"]) is None


def test_graphs_leave_a_tenth_of_the_memory():
    own = find_own_run(SMALL, checked(SMALL), H100)
    needed = memory.predict(own.model, own.layout, replace(own.engine, graphs=True)).device
    assert needed > memory.predict(own.model, own.layout, own.engine).device
    for memory_of_gpu, chosen in ((needed / 0.89, True), (needed / 0.91, False)):
        gpu = replace(GPUS["H100"], memory=memory_of_gpu)
        assert bool(graph_choice.compare_graphs(replace(own, cluster=replace(own.cluster, gpu=gpu)))) is chosen


def test_the_expected_time_is_that_with_the_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H100)
    without, having = (predict_own_run(SMALL, checked(SMALL, cuda_graph_impl=impl)) for impl in ("none", "local"))
    assert having.step < 0.7 * without.step


@pytest.mark.parametrize(
    "flags, decides, expected",
    [
        ("", True, ("local", True)),
        ("--cuda-graph-impl none", False, ("none", False)),
        ("--cuda-graph-impl local --te-rng-tracker", False, ("local", True)),
        ("--te-rng-tracker", False, ("none", True)),
    ],
)
def test_flags_decide_before_the_planner(flags, decides, expected, monkeypatch):
    """And segments of the allocator are chosen after the graphs."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that both are as before after the test
        monkeypatch.delenv(name)
    args = build_parser(recipe=False).parse_args(flags.split())
    reason = fill.set_graphs(args, [], lambda argv, args: "reason")
    assert (reason, args.cuda_graph_impl, args.te_rng_tracker) == ("reason" if decides else None, *expected)
    fill.use_expandable_segments(args)
    assert ("PYTORCH_CUDA_ALLOC_CONF" in os.environ) == (expected[0] == "none")


def test_a_choice_against_graphs_is_none():
    args = build_parser(recipe=False).parse_args([])
    assert fill.set_graphs(args, [], lambda argv, args: None) is None
    assert (args.cuda_graph_impl, args.te_rng_tracker) == ("none", False)
