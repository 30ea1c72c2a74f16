"""What only a CUDA device can show. Run: pytest -m gpu"""

import pytest
import torch

from megatron_cream.model.attention import flash_attention_function, has_transformer_engine
from tests.launch import train, write_documents

pytestmark = pytest.mark.gpu

# Heads of 64, which every kernel takes.
WIDE = "--hidden-size 256 --ffn-hidden-size 688 --kv-channels 64".split()


@pytest.mark.parametrize("queries, groups", [(8, 8), (8, 2)])
def test_attention_kernels_against_float64(queries, groups):
    """Each core attention, in bf16, against plain attention in float64."""
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
        if module is FlashCoreAttention and flash_attention_function() is None:
            continue
        out = module.attend(shell, q, k, v).flatten(2).double()
        assert torch.linalg.norm(out - expected) / torch.linalg.norm(expected) < 1e-2, module.__name__


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


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    data = ["--data-path", write_documents(folder / "documents"), "--split", "90,10,0", *WIDE]
    train(1, folder / "tb0", *data, "--train-iters", 1, "--save", folder / "start", "--save-interval", 1)
    flags = [*data, "--train-iters", 5, "--pretrained-checkpoint", folder / "start"]
    return folder, flags, train(1, folder / "tb1", *flags, "--attention-backend", "sdpa")


@pytest.mark.parametrize("backend", ["local", "unfused"])
def test_float32_backends_agree(start, backend):
    """A checkpoint of the local layers opens in Transformer Engine's, and both train alike."""
    if backend == "unfused" and not has_transformer_engine():
        pytest.skip("gpu: Transformer Engine is not installed")
    folder, flags, reference = start
    losses = train(1, folder / backend, *flags, "--attention-backend", backend)
    # TF32 may be on inside Transformer Engine's GEMMs.
    assert max(abs(losses[s] - reference[s]) / reference[s] for s in reference) < 2e-3


@pytest.mark.parametrize("backend", ["flash", "te", "sdpa"])
def test_bf16_backends_agree(start, backend):
    if backend == "te" and not has_transformer_engine():
        pytest.skip("gpu: Transformer Engine is not installed")
    if backend == "flash" and flash_attention_function() is None:
        pytest.skip("gpu: flash-attn is not installed")
    folder, flags, reference = start
    losses = train(1, folder / f"bf16-{backend}", *flags, "--attention-backend", backend, fp32=False)
    print(backend, losses, reference)
    assert max(abs(losses[s] - reference[s]) / reference[s] for s in reference) < 2e-2


def test_hugging_face_weights_open_in_every_layer_stack(tmp_path):
    """An imported checkpoint, and --load-hf, train alike in this project's layers and Transformer Engine's."""
    from megatron_cream.checkpoint.convert import import_hf
    from megatron_cream.checkpoint.hf_folder import HfFolder
    from tests.hf_models import save_model

    save_model(tmp_path / "hf", "qwen2", hidden_size=256, intermediate_size=688, head_dim=64)
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    flags = ["--data-path", write_documents(tmp_path / "documents"), "--split", "90,10,0", "--train-iters", 3]
    flags += "--seq-length 96 --target-length 384 --micro-batch-size 2 --global-batch-size 4 --lr 1e-4".split()
    flags += "--tokenizer-type NullTokenizer --rope-scaling-type linear --num-workers 0 --eval-iters 1".split()
    checkpoint, weights = ["--pretrained-checkpoint", tmp_path / "ckpt"], ["--load-hf", tmp_path / "hf"]
    reference = train(1, tmp_path / "tb0", *flags, *checkpoint, "--attention-backend", "sdpa", base=())
    runs = {"sdpa": weights}
    if has_transformer_engine():
        runs["unfused"] = checkpoint
    for backend, source in runs.items():
        losses = train(1, tmp_path / backend, *flags, *source, "--attention-backend", backend, base=())
        assert max(abs(losses[s] - reference[s]) / reference[s] for s in reference) < 2e-3, backend
