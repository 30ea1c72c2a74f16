"""--deterministic: runs with the same flags are bit-identical."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_cream.model import attention
from megatron_cream.model.attention import choose_backend, find_flash_attention, has_transformer_engine
from tests.faults.kill import compare
from tests.launch import train, write_documents

# Enough blocks of keys for atomic additions to vary in order; heads of 64, which every kernel supports.
WIDE = "--hidden-size 512 --ffn-hidden-size 1376 --kv-channels 64 --num-attention-heads 8".split()
WIDE += "--seq-length 2048 --target-length 8192".split()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "sdpa", "te", "fp32"])
def test_two_runs_on_gpus_have_the_same_bits(tmp_path, backend):
    if backend == "te" and not has_transformer_engine():
        pytest.skip("gpu: Transformer Engine is not installed")
    if backend == "flash" and find_flash_attention() is None:
        pytest.skip("gpu: flash-attn is not installed")
    if backend == "flash" and not attention.is_flash_attention_deterministic():
        pytest.skip("gpu: flash-attn-4 has no deterministic backward on this GPU")
    documents = write_documents(tmp_path / "documents", documents=40, shortest=2100, longest=6000)
    flags = ["--data-path", documents, "--split", "90,10,0", *WIDE, "--deterministic", "--use-distributed-optimizer"]
    flags += ["--train-iters", 8, "--save-interval", 8]
    flags += [] if backend == "fp32" else ["--attention-backend", backend]
    ranks = min(2, torch.cuda.device_count())

    def run(i: int) -> dict[int, float]:
        return train(ranks, tmp_path / f"tb{i}", *flags, "--save", tmp_path / f"run{i}", fp32=backend == "fp32")

    with ThreadPoolExecutor(2) as both:
        losses = list(both.map(run, range(2)))
    assert losses[0] == losses[1] and len(losses[0]) == 8
    compare(tmp_path / "run0", tmp_path / "run1", 8)


@pytest.mark.parametrize(
    "capability, package, name", [((8, 0), True, "sdpa"), ((9, 0), True, "flash"), ((8, 0), False, "flash")]
)
def test_deterministic_attention_is_chosen(monkeypatch, capability, package, name):
    """flash-attn 4 has a deterministic backward on Hopper and B200, flash-attn 2 everywhere."""
    monkeypatch.setattr(attention, "has_transformer_engine", lambda: False)
    monkeypatch.setattr(attention, "find_flash_attention", lambda: print)
    monkeypatch.setattr(attention, "_has_flash_attention_4", lambda: package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_backend("auto", has_cuda=True, half=True).name == "flash"
    assert choose_backend("auto", has_cuda=True, half=True, deterministic=True).name == name
    if name == "sdpa":
        with pytest.raises(ValueError, match="--deterministic"):
            choose_backend("flash", has_cuda=True, half=True, deterministic=True)
