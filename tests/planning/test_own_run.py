"""The expected time and memory in a run's summary: the planner's, on GPUs that it knows."""

import json
import re
import shlex
from argparse import Namespace

import pytest
import torch

from megatron_cream.common import devices
from megatron_cream.config.expected import Expected
from megatron_cream.planning.own_run import predict_own_run
from megatron_cream.training.summary import describe_memory, describe_steps
from tests.planning.test_command import tool

GIB = 2**30
FLAGS = ["--config", "llama2_7b_32k"]
ARGS = Namespace(
    attention={"name": "flash", "transformer_engine": True}, world_size=2, load=None, pretrained_checkpoint=None,
    finetune=False, skip_train=False, cuda_graph_impl="none", train_iters=1000, global_batch_size=32, seq_length=4096,
)  # fmt: skip


def on_gpu(monkeypatch, name: str) -> None:
    monkeypatch.setattr(devices, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Namespace(total_memory=round(79.2 * GIB)))


@pytest.mark.parametrize("name, kind", [("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100")])
def test_the_summary_has_the_time_of_the_planner(monkeypatch, capsys, name, kind):
    assert tool(monkeypatch, *FLAGS, "--gpus", "2", "--gpu", kind, "--json") == 0
    own = json.loads(capsys.readouterr().out)["own"]
    seconds, needed = own["time"]["step"], own["memory"]["device"]
    on_gpu(monkeypatch, name)
    found = predict_own_run(FLAGS, ARGS)
    assert (found.step, found.gpu, found.memory) == (pytest.approx(seconds), kind, needed)
    steps, _, expected = describe_steps(ARGS, None, found).partition("; ")
    assert steps == "1,000 steps of 131,072 tokens, 131M in all"
    assert expected == f"about {seconds / 3.6:.1f} h by plan on 2 x {kind}"


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "Tesla T4"]
)
def test_other_gpus_have_no_expected_time(monkeypatch, name):
    on_gpu(monkeypatch, name)
    assert predict_own_run(FLAGS, ARGS) is None


def test_no_expected_time_without_a_gpu_or_a_model_of_the_flags(monkeypatch):
    assert predict_own_run(FLAGS, ARGS) is None
    on_gpu(monkeypatch, "NVIDIA H200")
    assert predict_own_run([*FLAGS, "--use-torch-fsdp2"], ARGS) is None
    assert predict_own_run(FLAGS, Namespace(**vars(ARGS) | {"attention": {"name": "local"}})) is None
    assert describe_steps(ARGS, None, None).endswith("; each step's line has the time left (ETA)")


@pytest.mark.parametrize(
    "done, seconds, shown",
    [
        (None, 0.01, "131M in all; about 10 s by plan"),
        (None, 5, "131M in all; about 83 min by plan"),
        (40, 7.5, "131M in all, 960 left; about 2.0 h by plan"),
    ],
)
def test_the_expected_time_is_that_of_the_steps_left(done, seconds, shown):
    assert shown in describe_steps(ARGS, done, Expected("H100", seconds, 70 * GIB, 80 * GIB, is_close=False))


@pytest.mark.parametrize("micro_batch, roomy", [("1", True), ("2", False), ("4", False)])
def test_the_memory_of_the_planner(monkeypatch, micro_batch, roomy):
    """The recipe's micro-batch of 2 takes all of 80 GB but 0.2 GiB; the line then says what to ask, and it helps."""
    on_gpu(monkeypatch, "NVIDIA H100 80GB HBM3")
    flags = [*FLAGS, "--micro-batch-size", micro_batch]
    found = predict_own_run(flags, ARGS)
    assert found.is_close is not roomy
    line = describe_memory(ARGS, found)
    words = f"{found.memory / GIB:.1f} of the 79.2 GiB of each H100 by plan"
    assert line.startswith(words) and (line == words) is roomy
    if not roomy:
        advised = shlex.split(re.search(r": it may run out of memory; (.+) with the flags of this run lists", line)[1])
        assert advised[:1] == ["python"] and advised[1].endswith("tools/plan.py")
        assert tool(monkeypatch, *advised[2:], *flags, "--json") == 0
