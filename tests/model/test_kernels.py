"""The Triton kernels against plain torch in float64: compiled on a GPU, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_cream.model.rotary import RotaryEmbedding, apply_rotary

triton = pytest.importorskip("triton")
CUDA = torch.cuda.is_available() and "nvidia" in torch.cuda.get_device_name().lower()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(CUDA, reason="gpu: the tests below run here")
def test_in_the_interpreter():
    """Run in a separate process, because TRITON_INTERPRET must be set before Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", __file__, "-k", "not in_the_interpreter"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


DEVICE = "cuda" if CUDA else "cpu"


def relative(ours, expected):
    return (torch.linalg.norm(ours.double() - expected) / torch.linalg.norm(expected)).item()


def kernel_test(function):
    """Mark a test that runs on a GPU or in the interpreter."""
    return function if INTERPRETED else pytest.mark.gpu(function)


@kernel_test
@pytest.mark.parametrize("groups, per_group, d", [(4, 1, 128), (2, 4, 64), (3, 2, 24)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_split_and_rotate(groups, per_group, d, dtype, bound):
    from megatron_cream.model.kernels.rotary import split_and_rotate

    torch.manual_seed(0)
    s, b = (3 if INTERPRETED else 9), 2
    mixed = torch.randn(s, b, groups, (per_group + 2) * d).to(dtype).to(DEVICE).requires_grad_()
    rope = RotaryEmbedding(head_dim=d, max_position_embeddings=262144)
    cos, sin = rope.cos_sin(torch.randint(0, 262144, (b, s), device=DEVICE))
    parts = split_and_rotate(mixed, cos, sin, per_group)

    plain = mixed.detach().double().requires_grad_()
    query, key, value = plain.split([per_group * d, d, d], dim=3)
    expected = [apply_rotary(x.reshape(s, b, -1, d), cos.double(), sin.double()) for x in (query, key)] + [value]
    for ours, theirs in zip(parts, expected, strict=True):
        assert ours.is_contiguous() and relative(ours, theirs) < bound

    # Gradients have the layout that attention returns: batch first.
    grads = [torch.randn(b, s, *part.shape[2:]).to(dtype).to(DEVICE).transpose(0, 1) for part in parts]
    torch.autograd.backward(parts, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    assert relative(mixed.grad, plain.grad) < bound


@kernel_test
@pytest.mark.parametrize("b, groups, per_group, d, keys", [(2, 2, 4, 64, 700), (3, 1, 1, 24, 90), (1, 2, 20, 80, 2500)])
@pytest.mark.parametrize("half, bound", [(False, 1e-6), (True, 1e-2)])
def test_attention_of_one_query(b, groups, per_group, d, keys, half, bound):
    """With gaps, and with keys that are all hidden at either end, as padding and room for tokens are."""
    from megatron_cream.model.kernels.decoding import attend_one_query

    torch.manual_seed(0)
    dtype = (torch.bfloat16 if CUDA else torch.float16) if half else torch.float32  # the interpreter has no bf16 dot
    shapes = ((1, b, groups * per_group, d), (keys, b, groups, d), (keys, b, groups, d))
    query, key, value = (torch.randn(shape).to(dtype).to(DEVICE) for shape in shapes)
    seen = torch.rand(b, keys) < 0.9
    seen[0, : keys // 2] = seen[-1, -keys // 3 :] = False
    seen = seen.to(DEVICE)
    exact = [x.double().permute(1, 2, 0, 3) for x in (query, key, value)]
    exact[1:] = [x.repeat_interleave(per_group, 1) for x in exact[1:]]
    for scale in (None, 0.5):
        ours = attend_one_query(query, key, value, seen, scale)
        expected = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=seen[:, None, None], scale=scale)
        assert ours.dtype == dtype and relative(ours, expected.permute(2, 0, 1, 3)) < bound


@kernel_test
@pytest.mark.parametrize("width, real", [(5000, 5000), (4224, 4100), (100, 7)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_cross_entropy(width, real, dtype, bound):
    from megatron_cream.model.kernels.cross_entropy import cross_entropy

    torch.manual_seed(0)
    logits = (8 * torch.randn(5, 2, width)).to(dtype).to(DEVICE).requires_grad_()
    labels = torch.randint(0, real, (5, 2), device=DEVICE)
    plain = logits.detach().double()[..., :real].requires_grad_()
    losses = cross_entropy(logits * 1, labels, real)
    expected = torch.nn.functional.cross_entropy(plain.flatten(0, 1), labels.flatten(), reduction="none").view(5, 2)
    assert losses.dtype == torch.float32 and relative(losses, expected) < 1e-6
    weight = torch.rand(5, 2, device=DEVICE)
    (losses * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative(logits.grad[..., :real], plain.grad) < bound
    assert not logits.grad[..., real:].any()


@kernel_test
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_swiglu(dtype, bound):
    from megatron_cream.model.kernels.swiglu import SwiGlu

    torch.manual_seed(0)
    x = torch.randn(3, 2, 2 * 1100).to(dtype).to(DEVICE).requires_grad_()
    plain = x.detach().double().requires_grad_()
    out, (gate, up) = SwiGlu()(x), plain.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    assert relative(out, expected) < bound
    grad = torch.randn(out.shape).to(dtype).to(DEVICE)
    out.backward(grad)
    expected.backward(grad.double())
    assert relative(x.grad, plain.grad) < bound


@kernel_test
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3 if CUDA else 1e-2)])
@pytest.mark.parametrize("size", [(96, 64), (64, 4096)])  # 96 blocks share scales of scales by 32s, 4096 by 256s
def test_unpack_nf4(size, dtype, bound):
    """The kernel agrees with torchao's operations; Triton's interpreter truncates to bf16."""
    pytest.importorskip("torchao")
    from megatron_cream.model.kernels import nf4
    from megatron_cream.model.nf4 import Nf4Weight

    torch.manual_seed(0)
    weight = torch.randn(size).to(dtype).to(DEVICE)
    packed = Nf4Weight(weight).packed
    assert relative(nf4.unpack(packed), packed.get_original_weight().double()) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="gpu: cuBLAS writes float32 from bf16 only there")
def test_weight_gradient():
    from megatron_cream.model.kernels.weight_gradient import wgrad_gemm_accum_fp32

    torch.manual_seed(0)
    inputs, grad = (torch.randn(512, n, device="cuda", dtype=torch.bfloat16) for n in (256, 128))
    main_grad = torch.randn(128, 256, device="cuda")
    expected = main_grad.double() + grad.double().T @ inputs.double()
    wgrad_gemm_accum_fp32(inputs, grad, main_grad)
    assert relative(main_grad, expected) < 1e-5


@kernel_test
@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw(decoupled):
    """Five steps on scaled gradients equal torch's optimizers in float64; copies are the rounded weights."""
    from megatron_cream.optimizer.adamw import FusedAdamW

    torch.manual_seed(0)
    start = [torch.randn(n) for n in (1, 1000, 5000)]
    options = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours = [x.clone().to(DEVICE).requires_grad_() for x in start]
    theirs = [x.double().requires_grad_() for x in start]
    optimizer = FusedAdamW([dict(params=ours)], **options, adam_w_mode=decoupled)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **options)
    optimizer.copies = {x: torch.zeros(x.numel(), dtype=torch.bfloat16, device=DEVICE) for x in ours[1:]}
    for step in range(5):
        optimizer.gradient_scale = torch.tensor(0.37, device=DEVICE) if step else None
        for x, y in zip(ours, theirs, strict=True):
            grad = torch.randn(x.shape)
            x.grad, y.grad = (
                grad.to(DEVICE),
                grad.double() * (optimizer.gradient_scale or torch.ones(())).cpu().double(),
            )
        optimizer.step()
        reference.step()
    for x, y in zip(ours, theirs, strict=True):
        assert relative(x.detach().cpu(), y.detach()) < 1e-6
        assert relative(optimizer.state[x]["exp_avg_sq"].cpu(), reference.state[y]["exp_avg_sq"]) < 1e-6
    assert optimizer.copies_written and optimizer.param_groups[0]["step"] == 5
    for x, copy in optimizer.copies.items():
        # The interpreter truncates; a GPU rounds to nearest.
        rounded = x.detach().to(torch.bfloat16)
        assert torch.equal(copy, rounded) if not INTERPRETED else relative(copy, x.detach().double()) < 2**-7
