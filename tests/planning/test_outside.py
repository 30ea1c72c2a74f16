"""Memory that torch's allocator does not hold, against what GPUs had."""

from dataclasses import replace

import pytest

from megatron_cream.planning import layouts, memory, outside
from megatron_cream.planning.flags import run_from_flags
from megatron_cream.planning.hardware import GIB, GPUS
from megatron_cream.planning.measured import build_run, load_runs
from tests.planning.test_command import plan

TP = "--sequence-parallel --tp-comm-overlap --attention-backend flash --num-layers 32 --use-distributed-optimizer"
TWO_BY_TWO = f"--config llama_7b_width {TP} --tensor-model-parallel-size 2 --micro-batch-size 4 --global-batch-size 32"
OF_TE = "--tp-comm-overlap-cfg benchmarks/user_buffers_of_te.yaml"


@pytest.mark.parametrize(
    "flags, buffers",
    [
        # Gathered: inputs of qkv and fc1, gradients of proj's and fc2's outputs, and both again for the gradients of
        # weights. Reduced in rings: 2 - 1 / TP of outputs of proj and fc2, and of gradients of qkv's and fc1's inputs.
        ("--tensor-model-parallel-size 2 --micro-batch-size 4", 6 + 4 * 1.5),
        ("--tensor-model-parallel-size 4 --micro-batch-size 4", 6 + 4 * 1.75),
        (f"--tensor-model-parallel-size 2 --micro-batch-size 4 {OF_TE}", 12),
        ("--tensor-model-parallel-size 2 --micro-batch-size 4 --fp8-format hybrid --fp8-recipe delayed", 8 / 2 + 4),
    ],
)
def test_user_buffers(flags, buffers):
    run = run_from_flags(f"--config llama_7b_width {TP} --global-batch-size 32 {flags}".split(), 4)
    one = 2 * 4096 * 4 * 4096
    assert outside.user_buffer_bytes(run.model, run.layout, run.engine) == buffers * one
    without = replace(run.layout, overlap_tensor=False)
    assert outside.user_buffer_bytes(run.model, without, run.engine) == 0


def test_a_run_that_ran_out_of_memory():
    """It had 5.71 GiB beside torch's allocator on each of four H100s, and no room for 71.2 GiB in it."""
    run = run_from_flags(TWO_BY_TWO.split(), 4)
    needed = memory.predict(run.model, run.layout, run.engine)
    beside = needed.device - needed.allocated * (1 + memory.FRAGMENTATION)
    assert beside / GIB == pytest.approx(5.71, abs=0.2)
    assert needed.device > layouts.usable(GPUS["H100"].memory) - outside.ERROR


def test_the_plan_says_that_it_is_close():
    lines = plan("--gpus", "4", "--gpu", "H100", *TWO_BY_TWO.split()).stdout
    assert "within the plan's error of 1 GiB: it may run out of memory" in lines
    roomy = plan("--gpus", "4", "--gpu", "H200", *TWO_BY_TWO.split()).stdout
    assert "GiB are left" in roomy and "the plan's error" not in roomy


@pytest.mark.parametrize("row", [row for row in load_runs() if row["gpu"] == "H100"], ids=lambda row: row["what"])
def test_runs_that_had_enough_memory(row):
    run = build_run(row)
    needed = memory.predict(run.model, run.layout, run.engine, row.get("stage"))
    assert needed.device < layouts.usable(GPUS["H100"].memory) + outside.ERROR
