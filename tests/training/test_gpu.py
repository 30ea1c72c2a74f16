"""Tests that need a CUDA device. Run: pytest -m gpu"""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_cream.common import devices
from megatron_cream.model.attention import find_flash_attention, has_transformer_engine
from megatron_cream.planning.hardware import GPUS
from tests.graph_runs import run_and_resume
from tests.launch import ROOT, train, write_documents

pytestmark = pytest.mark.gpu

# Every kernel supports heads of 64.
WIDE = "--hidden-size 256 --ffn-hidden-size 688 --kv-channels 64 --seq-length 256 --target-length 1024".split()


@pytest.mark.parametrize("queries, groups", [(8, 8), (8, 2)])
def test_attention_kernels_against_float64(queries, groups):
    """Each core attention in bf16 agrees with plain attention in float64."""
    from types import SimpleNamespace

    from megatron_cream.model.attention import FlashCoreAttention, SdpaCoreAttention

    torch.manual_seed(0)
    s, b, d = 512, 2, 64
    q, k, v = (torch.randn(s, b, n, d, device="cuda", dtype=torch.bfloat16) for n in (queries, groups, groups))
    repeat = queries // groups
    q64, k64, v64 = (
        x.double().permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2))
    )
    scores = q64 @ k64.mT / d**0.5
    scores.masked_fill_(torch.ones(s, s, device="cuda", dtype=torch.bool).triu(1), float("-inf"))
    expected = (scores.softmax(-1) @ v64).permute(2, 0, 1, 3).flatten(2)
    shell = SimpleNamespace(softmax_scale=None)
    for module in (SdpaCoreAttention, FlashCoreAttention):
        if module is FlashCoreAttention and find_flash_attention() is None:
            continue
        out = module.attend(shell, q, k, v).flatten(2).double()
        assert torch.linalg.norm(out - expected) / torch.linalg.norm(expected) < 1e-2, module.__name__


@pytest.mark.parametrize("begin", [0, 128])
def test_packed_attention_kernels_against_float64(begin):
    """Output and gradients; a part of the queries, with the keys up to its end, is what a context-parallel rank has."""
    from types import SimpleNamespace

    from megatron_cream.model.attention import FlashCoreAttention, SdpaCoreAttention
    from megatron_cream.model.packed_attention import Documents

    torch.manual_seed(0)
    s, b, d, end = 512, 2, 64, 400
    documents = Documents(ends=((1, 130, 300, 301, s), (250, s)))
    exact = [torch.randn(s, b, n, d, device="cuda", dtype=torch.float64)[: end if n < 8 else s] for n in (8, 2, 2)]
    exact[0] = exact[0][begin:end].contiguous()
    exact = [x.requires_grad_() for x in exact]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    upstream = torch.randn_like(exact[0])
    shell = SimpleNamespace(softmax_scale=None)
    shell.attend = lambda *xs: SdpaCoreAttention.attend(shell, *xs)
    expected = SdpaCoreAttention.attend_packed(shell, documents, *exact)
    expected.backward(upstream)
    for module in (SdpaCoreAttention, FlashCoreAttention):
        if module is FlashCoreAttention and find_flash_attention() is None:
            continue
        for x in half:
            x.grad = None
        out = module.attend_packed(shell, documents, *half)
        out.backward(upstream.bfloat16())
        for ours, right in [(out, expected), *((x.grad, y.grad) for x, y in zip(half, exact, strict=True))]:
            assert torch.linalg.norm(ours.double() - right) / torch.linalg.norm(right) < 2e-2, module.__name__


def test_sdpa_makes_no_matrix_of_scores():
    """Peak memory of attention over 16K tokens stays far below one s x s matrix."""
    from types import SimpleNamespace

    from megatron_cream.model.attention import SdpaCoreAttention

    s = 16384
    q, k, v = (torch.randn(s, 1, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    SdpaCoreAttention.attend(SimpleNamespace(softmax_scale=None), q, k, v).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * s * s * 2 / 10


def test_more_keys_than_queries_make_no_matrix_of_scores():
    """The shapes are those of context parallelism: the last half of a rank's queries, and the keys of all ranks."""
    from types import SimpleNamespace

    from megatron_cream.model.attention import FlashCoreAttention, SdpaCoreAttention

    # With two heads, keys and values repeated for all query heads, as in sdpa, stay far smaller than a mask.
    s, keys, d = 4096, 32768, 128
    q, k, v = (torch.randn(n, 1, h, d, device="cuda", dtype=torch.bfloat16) for n, h in ((s, 2), (keys, 1), (keys, 1)))
    outs = []
    for module in (SdpaCoreAttention, FlashCoreAttention):
        if module is FlashCoreAttention and find_flash_attention() is None:
            continue
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = module.attend(SimpleNamespace(softmax_scale=None), *leaves)
        out.sum().backward()
        assert torch.cuda.max_memory_allocated() - before < s * keys, module.__name__  # a mask has a byte per pair
        outs.append([x.float() for x in (out.detach(), *(leaf.grad for leaf in leaves))])
    # In float64: the last query sees all keys, the first all but those after it.
    for row in (0, s - 1):
        seen = keys - s + row + 1
        scores = torch.einsum("nd,td->nt", q[row, 0].double(), k[:seen, 0, 0].double()) / d**0.5
        expected = scores.softmax(-1) @ v[:seen, 0, 0].double()
        for out, *_ in outs:
            assert torch.linalg.norm(out[row, 0] - expected) / torch.linalg.norm(expected) < 1e-2
    for mine, other in zip(*outs, strict=True) if len(outs) == 2 else ():
        assert torch.linalg.norm(mine - other) / torch.linalg.norm(other) < 1e-2


@pytest.mark.parametrize("groups", [16, 4])
def test_attention_is_measured(groups):
    """Every installed attention runs at realistic sizes, and the fastest is chosen."""
    from megatron_cream.model import attention_speed
    from megatron_cream.model.attention import choose_backend, list_alternatives

    candidates = list_alternatives(choose_backend("auto", has_cuda=True, half=True), half=True)
    if len(candidates) < 2:
        pytest.skip("gpu: neither Transformer Engine nor flash-attn is installed")
    shape = attention_speed.Shape(4096, 2, 16, groups, 128, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    times = attention_speed.measure(candidates, shape)
    print(times)
    assert list(times) == [each.name for each in candidates] and all(times.values()), times
    # Both passes do 3.5 times the work of the forward pass, and no GPU reaches 2,500 TFLOP/s.
    assert all(time > 3.5 * shape.flops / 2.5e15 * 1000 for time in times.values()), times
    assert torch.cuda.memory_allocated() - before < 2**20
    chosen = attention_speed.choose_by_times(candidates, times, shape)
    assert times[chosen.name] <= (1 + attention_speed.MARGIN) * min(times.values())


# name: (ranks, precision, flags). Losses agree with sdpa on one GPU in float32: within 2e-3 in float32 (Transformer
# Engine may use TF32), within 2e-2 in bf16.
CP = "--use-distributed-optimizer --context-parallel-size 2 --attention-backend"
# Evaluations, during training and at its end, have other shapes than the graphs.
GRAPHS = "--cuda-graph-impl local --te-rng-tracker --eval-interval 2 --eval-iters 1 --eval-lengths 64 512"
RUNS = {
    "unfused": (1, "fp32", "--attention-backend unfused"),  # loads the checkpoint in other layers
    "megatron's step": (1, "fp32", "--attention-backend sdpa"),
    "bf16 flash": (1, "bf16", "--attention-backend flash --cuda-graph-impl none"),
    "bf16 te": (1, "bf16", "--attention-backend te"),
    "bf16 sdpa": (1, "bf16", "--attention-backend sdpa"),
    "flash in cuda graphs te": (1, "bf16", f"--attention-backend flash {GRAPHS}"),
    "te in cuda graphs te": (1, "bf16", f"--attention-backend te {GRAPHS}"),
    "dp2 flash in cuda graphs te": (2, "bf16", f"--attention-backend flash --use-distributed-optimizer {GRAPHS}"),
    "cp2 sdpa": (2, "bf16", f"{CP} sdpa"),
    "cp2 flash": (2, "bf16", f"{CP} flash"),
    "cp2 te": (2, "bf16", f"{CP} te --cp-comm-type p2p"),
    "tp2 flash in cuda graphs te": (
        2,
        "bf16",
        f"--attention-backend flash --tensor-model-parallel-size 2 --sequence-parallel {GRAPHS}",
    ),
    "optimizer on the host": (
        1,
        "bf16",
        "--optimizer-cpu-offload --use-precision-aware-optimizer --use-distributed-optimizer --attention-backend sdpa",
    ),
    "dp2 overlapped": (2, "bf16", "--use-distributed-optimizer --attention-backend sdpa"),
    "dp2 not": (2, "bf16", "--use-distributed-optimizer --attention-backend sdpa --no-overlap-grad-reduce"),
}
PLAIN_STEP = """
if __name__ == "__main__":
    import sys
    import pretrain_cream as job
    from megatron_cream.config import values
    values.can_use_one_pass_optimizer = lambda args: False
    sys.exit(job.main())
"""


def lacks(name: str) -> str | None:
    """Return what this machine lacks for a run, or None."""
    if torch.cuda.device_count() < RUNS[name][0]:
        return "two GPUs"
    if ("flash" in name) and find_flash_attention() is None:
        return "flash-attn"
    return "Transformer Engine" if name.split()[-1] in ("te", "unfused") and not has_transformer_engine() else None


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Start all runs at once from one checkpoint, and return {name: future of the losses}."""
    folder = tmp_path_factory.mktemp("gpu")
    data = ["--data-path", write_documents(folder / "documents"), "--split", "90,10,0", *WIDE]
    train(1, folder / "tb0", *data, "--train-iters", 1, "--save", folder / "start", "--save-interval", 1)
    flags = [*data, "--train-iters", 5, "--pretrained-checkpoint", folder / "start"]
    job = folder / "plain_step.py"
    job.write_text(PLAIN_STEP)
    runs = {"reference": (1, "fp32", "--attention-backend sdpa")}
    runs |= {name: run for name, run in RUNS.items() if lacks(name) is None}
    with ThreadPoolExecutor(max(os.cpu_count() // 2, 1)) as pool:  # most of a run's time is its imports
        yield {
            name: pool.submit(
                train,
                ranks,
                folder / name,
                *flags,
                *extra.split(),
                fp32=precision == "fp32",
                script=job if name == "megatron's step" else ROOT / "pretrain_cream.py",
            )
            for name, (ranks, precision, extra) in runs.items()
        }


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_sdpa_on_one_gpu_does_in_float32(losses, name):
    """Losses agree for other attentions and layers, Megatron's own optimizer step, and two GPUs."""
    if lack := lacks(name):
        pytest.skip(f"gpu: needs {lack}")
    reference, mine = losses["reference"].result(), losses[name].result()
    print(name, mine, reference)
    bound = 2e-3 if RUNS[name][1] == "fp32" else 2e-2
    assert mine.keys() == reference.keys()
    assert max(abs(mine[s] - reference[s]) / reference[s] for s in reference) < bound


@pytest.mark.parametrize("ranks, flags", [(1, ""), (2, "--attention-backend flash --use-distributed-optimizer")])
def test_a_run_that_chooses_graphs_by_itself_resumes_as_one_without(tmp_path, ranks, flags):
    """From checkpoints with and without graphs; losses are those of a run with --cuda-graph-impl none."""
    if torch.cuda.device_count() < ranks:
        pytest.skip("gpu: needs two GPUs")
    if find_flash_attention() is None or not has_transformer_engine() or devices.gpu_kind() not in GPUS:
        pytest.skip(f"gpu: needs flash-attn, Transformer Engine and one of {', '.join(GPUS)}")
    runs = run_and_resume(tmp_path, ranks, *flags.split())
    reference = runs["none"].losses
    for name, ran in runs.items():
        print(name, ran.losses)
        chosen = not name.startswith("none")
        assert ran.graphs == (("local", True) if chosen else ("none", False)), name
        assert ("\ngraphs  CUDA graphs, because" in ran.output) is chosen, name
        assert list(ran.losses) == ([3, 4] if "from" in name else [1, 2, 3, 4]), name
        assert max(abs(loss - reference[s]) / reference[s] for s, loss in ran.losses.items()) < 1e-2, name


def test_hugging_face_weights_open_in_every_layer_stack(tmp_path):
    """An imported checkpoint and --load-hf give equal losses in this project's and Transformer Engine's layers."""
    from megatron_cream.checkpoint.convert import import_hf
    from megatron_cream.checkpoint.hf_folder import HfFolder
    from tests.hf_models import save_model

    save_model(tmp_path / "hf", "qwen2", hidden_size=256, intermediate_size=688, head_dim=64)
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    flags = ["--data-path", write_documents(tmp_path / "documents"), "--split", "90,10,0", "--train-iters", 3]
    flags += "--seq-length 96 --target-length 384 --micro-batch-size 2 --global-batch-size 4 --lr 1e-4".split()
    flags += "--tokenizer-type NullTokenizer --rope-scaling-type linear --num-workers 0 --eval-iters 1".split()
    checkpoint, weights = ["--pretrained-checkpoint", tmp_path / "ckpt"], ["--load-hf", tmp_path / "hf"]
    backend = "unfused" if has_transformer_engine() else "sdpa"
    runs = [("sdpa", weights), (backend, checkpoint)]
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(train, 1, tmp_path / f"tb{i}", *flags, *source, "--attention-backend", name, base=())
            for i, (name, source) in enumerate(runs)
        ]
        reference, losses = (run.result() for run in started)
    assert max(abs(losses[s] - reference[s]) / reference[s] for s in reference) < 2e-3


@pytest.mark.parametrize("family", ["llama-3", "qwen3"])
def test_a_conversion_is_verified_on_a_gpu(tmp_path, family):
    from megatron_cream.checkpoint.convert import import_hf
    from megatron_cream.checkpoint.hf_folder import HfFolder
    from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
    from megatron_cream.checkpoint.verify import verify
    from tests.hf_models import save_model

    save_model(tmp_path / "hf", family)
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    assert verify(MegatronCheckpoint(tmp_path / "ckpt"), HfFolder(tmp_path / "hf"), text="one two three")
