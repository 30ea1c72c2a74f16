"""The planner's communication against the traffic of real ranks over gloo in one pretrain_cream.py step."""

import json
import os
import subprocess
from collections import Counter

import pytest

from megatron_cream.planning import communication, outside
from megatron_cream.planning.flags import run_from_flags
from tests.forked_commands import FRESH_TORCHRUN
from tests.launch import ROOT, TINY, write_documents

FLAGS = [*TINY, *"--num-layers 4 --train-iters 2 --split 80,10,10 --console progress --fp32".split()]
TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"
DISTRIBUTED = "--use-distributed-optimizer"
LAYOUTS = {
    "TP": TP,
    "TP, one group": f"{TP} --num-query-groups 1",
    "TP and SP": f"{TP} --sequence-parallel",
    "TP and SP, full recompute": f"{TP} --sequence-parallel {FULL} uniform",
    "TP and SP, one layer recomputed": f"{TP} --sequence-parallel {FULL} block",
    "TP and SP, mlp recomputed": f"{TP} --sequence-parallel --recompute-granularity selective --recompute-modules mlp",
    "PP": PP,
    "PP, tied": f"{PP} --config {{folder}}/tied.yaml",
    "PP, interleaved": f"{PP} --num-layers-per-virtual-pipeline-stage 1",
    "CP": "--context-parallel-size 2 --use-distributed-optimizer",
    "CP, full recompute": f"--context-parallel-size 2 {FULL} uniform",
    "CP, one layer recomputed": f"--context-parallel-size 2 {FULL} block",
    "DP": "",
    "DP, distributed optimizer": DISTRIBUTED,
    "DP, overlapped": f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather",
}


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """Return {layout: flags} and {(layout, rank): {"bytes": {operation: bytes}, "groups": names}} of one torchrun."""
    folder = tmp_path_factory.mktemp("traffic")
    data = write_documents(folder / "documents")
    (folder / "tied.yaml").write_text("untie_embeddings_and_output_weights: false\n")
    flags = {
        name: [*map(str, FLAGS), "--data-path", str(data), *extra.format(folder=folder).split()]
        for name, extra in LAYOUTS.items()
    }
    (folder / "layouts.json").write_text(json.dumps(flags))
    script = [ROOT / "tests" / "traffic.py", folder, folder / "layouts.json"]
    command = [*FRESH_TORCHRUN, "--nproc_per_node=2", *map(str, script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, cwd=folder)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return flags, {
        (name, rank): json.loads((folder / f"{name}.{rank}.json").read_text()) for name in LAYOUTS for rank in (0, 1)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_of_a_step(heard, name):
    """The bytes of every operation are exact, except for bucket padding in the distributed optimizer."""
    flags, found = heard
    run = run_from_flags([*flags[name], "--transformer-impl", "local"], 2)
    for rank in (0, 1):
        stage = rank if run.layout.pipeline == 2 else 0
        expected = Counter()
        for (_, operation), nbytes in communication.count_bytes(run.model, run.layout, run.engine, stage).items():
            expected[operation] += nbytes
        padded = 0.01 if name.startswith(("DP", "CP")) else 0.0
        assert found[name, rank]["bytes"] == pytest.approx(expected, rel=padded)


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_that_send(heard, name):
    """Each needs an NCCL communicator, whose buffers the planner counts."""
    flags, found = heard
    run = run_from_flags([*flags[name], "--transformer-impl", "local"], 2)
    groups = found[name, 0]["groups"]
    assert len(groups) == outside.count_communicators(run.model, run.layout), groups
