"""Tests of the flags that save memory, on a CUDA device. Run: pytest -m gpu"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_cream.model.attention import find_flash_attention, has_transformer_engine
from tests.hf_models import save_model
from tests.launch import ROOT, torchrun, train, write_documents
from tests.training.test_out_of_memory import lines_of

pytestmark = pytest.mark.gpu

BASE = (
    "--seq-length 96 --target-length 384 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --rope-scaling-type linear "
    "--tokenizer-type NullTokenizer --num-workers 0 --eval-iters 0 --train-iters 4 --split 90,10,0"
).split()
ON_HOST = (
    "--attention-backend te --fine-grained-activation-offloading --offload-modules core_attn qkv_linear "
    "--min-offloaded-tensor-size 1024"
)
# Megatron requires the variable to offload with Transformer Engine 2.10; tests pass no NVTE_ variables on.
OFFLOADING_JOB = """
import os
os.environ["NVTE_CPU_OFFLOAD_V1"] = "1"
if __name__ == "__main__":
    import sys
    import pretrain_cream as job
    sys.exit(job.main())
"""
CAPPED_JOB = """
import sys
import torch
import pretrain_cream as job
if __name__ == "__main__":
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total, 0)
    sys.exit(job.main())
"""
ADAPTERS = "--lora-rank 8 --lora-plus-ratio 4"
FP8 = "--fp8-format hybrid --fp8-amax-history-len 16 --fp8-amax-compute-algo max"
# name: (what trains, other flags, bound of the losses' relative error beside sdpa in float32)
RUNS = {
    "adapters, te": (ADAPTERS, "--attention-backend te", 2e-2),
    "adapters, flash": (ADAPTERS, "--attention-backend flash", 2e-2),
    "adapters, norms and MLP recomputed, te": (
        ADAPTERS,
        "--attention-backend te --recompute-granularity selective --recompute-modules layernorm mlp",
        2e-2,
    ),
    "adapters, FP8, te": (ADAPTERS, f"--attention-backend te {FP8} --fp8-recipe delayed", 5e-2),
    "adapters, FP8 tensorwise, te": (ADAPTERS, f"--attention-backend te {FP8} --fp8-recipe tensorwise", 5e-2),
    "adapters on FP8 weights, te": (
        ADAPTERS,
        f"--attention-backend te {FP8} --fp8-recipe tensorwise --fp8-param-gather --use-distributed-optimizer",
        5e-2,
    ),
    "adapters, attention on the host, te": (ADAPTERS, ON_HOST, 2e-2),
    "all weights, attention on the host, te": ("", ON_HOST, 2e-2),
    "adapters on NF4": (ADAPTERS, "--lora-base-dtype nf4 --attention-backend auto", 1e-1),
}


def lacks(name: str) -> str | None:
    """Return what this machine lacks for a run, or None."""
    if name.endswith("flash") and find_flash_attention() is None:
        return "flash-attn"
    return "Transformer Engine" if name.endswith("te") and not has_transformer_engine() else None


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Start all runs at once from one model, and return {name: future of the losses}."""
    folder = tmp_path_factory.mktemp("gpu")
    save_model(folder / "hf", "llama-gqa-odd-vocabulary", hidden_size=256, intermediate_size=688, head_dim=64)
    flags = [*BASE, "--data-path", write_documents(folder / "documents"), "--load-hf", folder / "hf"]
    runs = {trains: (trains, "--fp32 --attention-backend sdpa") for trains in ("", ADAPTERS)}
    runs |= {name: run[:2] for name, run in RUNS.items() if lacks(name) is None}
    job = folder / "offloading_job.py"
    job.write_text(OFFLOADING_JOB)
    with ThreadPoolExecutor(max(os.cpu_count() // 2, 1)) as pool:
        yield {
            name: pool.submit(
                train,
                1,
                folder / f"tb{i}",
                *flags,
                *trains.split(),
                *extra.split(),
                base=(),
                fp32=False,
                script=job if extra == ON_HOST else ROOT / "pretrain_cream.py",
            )
            for i, (name, (trains, extra)) in enumerate(runs.items())
        }


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_without_it(losses, name):
    """Losses agree with those of the same weights in this project's layers in float32."""
    if lack := lacks(name):
        pytest.skip(f"gpu: needs {lack}")
    trains, _, bound = RUNS[name]
    reference, mine = losses[trains].result(), losses[name].result()
    print(name, mine, reference)
    assert mine.keys() == reference.keys() and reference[4] < reference[1]
    assert max(abs(mine[step] - reference[step]) / reference[step] for step in reference) < bound


def test_a_full_gpu_ends_in_one_line_whose_advice_works(tmp_path):
    """With 3 GiB of the GPU, the micro-batch is lowered as advised until the run trains."""
    job = tmp_path / "capped_job.py"
    job.write_text(CAPPED_JOB)
    flags = [*BASE, *"--num-layers 2 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 2".split()]
    flags += [*"--vocab-size 131071 --global-batch-size 64 --attention-backend sdpa --cuda-graph-impl none".split()]
    flags += ["--data-path", write_documents(tmp_path / "documents")]
    tried, micro_batch = [], 64
    while (ended := torchrun(1, *flags, "--micro-batch-size", micro_batch, script=job)).returncode:
        (said,) = lines_of(ended, 1)
        found = re.search(
            r"out of memory in step \d on GPU 0: of 3\.0 GiB torch has (\S+) in tensors and (\S+) in unused pieces; (\S+) "
            r"are outside torch \(CUDA, NCCL, user buffers\).*\. Use --micro-batch-size (\d+) instead of (\d+); ",
            said,
        )
        assert found, said
        tensors, unused, outside = map(float, found.groups()[:3])
        assert 0 < tensors <= 3 and tensors + unused <= 3.1 and 0 < outside < 8
        assert int(found[5]) == micro_batch == 2 * int(found[4])
        tried.append(micro_batch)
        micro_batch //= 2
    assert tried and "step 4/4 | loss" in ended.stdout


def test_recompute_as_advised_trains_on_a_full_gpu(tmp_path):
    """The activations of six wide MLPs do not fit into 3 GiB; those of one do."""
    job = tmp_path / "capped_job.py"
    job.write_text(CAPPED_JOB)
    flags = [*BASE, *"--num-layers 6 --hidden-size 64 --ffn-hidden-size 12288 --num-attention-heads 2".split()]
    flags += [*"--seq-length 8192 --target-length 32768 --micro-batch-size 1 --global-batch-size 1".split()]
    flags += [*"--vocab-size 100 --attention-backend sdpa --cuda-graph-impl none".split()]
    flags += ["--data-path", write_documents(tmp_path / "documents", documents=20, shortest=9000, longest=9100)]
    (said,) = lines_of(torchrun(1, *flags, script=job), 1)
    advice = "--recompute-granularity selective --recompute-modules mlp"
    assert "out of memory in step 1 on GPU 0" in said and f". Add {advice}; " in said
    ended = torchrun(1, *flags, *advice.split(), script=job)
    assert ended.returncode == 0 and "step 4/4 | loss" in ended.stdout, ended.stderr[-3000:]
