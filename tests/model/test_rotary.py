"""Rotary embedding: transformers' frequencies bit for bit, its rotation, and more accurate angles."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_cream.model.rotary import ROPE_SCALING_TYPES, RotaryEmbedding, apply_rotary, build_rope_scaling

LIMIT = 262_144  # 64 x 4096: the longest window of the paper
COS_SIN_BOUND = 1e-7  # half a float32 ulp below 2 is 6e-8; 1e-6 is promised

EXTRAS = {
    "linear": [{}],
    "ntk": [{}],
    "yarn": [
        {},
        {"attention_factor": None},
        {"attention_factor": 1.25},
        {"attention_factor": None, "mscale": 0.707, "mscale_all_dim": 0.5},
        {"attention_factor": None, "mscale": 0.707},
        {"beta_fast": 48, "beta_slow": 0.5, "truncate": False},
    ],
    "llama3": [{}, {"low_freq_factor": 2.0, "high_freq_factor": 6.5}],
}
SCALINGS = [None] + [
    build_rope_scaling(rope_type, factor, 4096, **extra)
    for rope_type, extras in EXTRAS.items()
    for factor in (1.0, 8.0, 64.0)
    for extra in extras
]
ONE_OF_EACH = [build_rope_scaling(rope_type, 8.0, 4096) for rope_type in ROPE_SCALING_TYPES]


def name(scaling: dict | None) -> str:
    return "-".join(str(value) for value in (scaling or {"rope_type": "none"}).values())


def build(scaling: dict | None, head_dim=128, rope_theta=10000.0, limit=LIMIT) -> RotaryEmbedding:
    return RotaryEmbedding(
        head_dim=head_dim, rope_theta=rope_theta, max_position_embeddings=limit, rope_scaling=scaling
    )


def transformers_rope(config: LlamaConfig) -> tuple[torch.Tensor, float]:
    rope = LlamaRotaryEmbedding(config)
    return rope.inv_freq, rope.attention_scaling


def transformers_reference(scaling: dict | None, head_dim: int, rope_theta: float) -> tuple[torch.Tensor, float]:
    """Return inv_freq and attention factor of transformers, from `scaling` directly, without our hf_config."""
    scaling = dict(scaling) if scaling else None
    if scaling and scaling["rope_type"] == "ntk":  # transformers has no static ntk, but its base defines it
        rope_theta, scaling = rope_theta * scaling["factor"] ** (head_dim / (head_dim - 2)), None
    return transformers_rope(
        LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            max_position_embeddings=LIMIT,
            rope_theta=rope_theta,
            rope_scaling=scaling,
        )
    )


def some_positions(batch: int = 3, length: int = 500) -> torch.Tensor:
    """Draw sorted positions with gaps for each sample, including both ends of the range."""
    rng = np.random.default_rng(7)
    rows = [np.sort(rng.choice(LIMIT, length, replace=False)) for _ in range(batch)]
    positions = torch.from_numpy(np.stack(rows)).long()
    positions[:, 0], positions[:, -1] = 0, LIMIT - 1
    return positions


# ------------------------------------------------------------- frequencies


@pytest.mark.parametrize("scaling", SCALINGS, ids=name)
def test_frequencies_are_transformers_bit_for_bit(scaling):
    for head_dim in (64, 128):
        for rope_theta in (10000.0, 500000.0):
            rope = build(scaling, head_dim, rope_theta)
            inv_freq, attention_factor = transformers_reference(scaling, head_dim, rope_theta)
            assert rope.inv_freq.dtype == torch.float32 and rope.inv_freq.shape == (head_dim // 2,)
            assert torch.equal(rope.inv_freq, inv_freq), (head_dim, rope_theta)
            assert rope.attention_factor == attention_factor


@settings(max_examples=150, deadline=None)
@given(
    rope_type=st.sampled_from(ROPE_SCALING_TYPES),
    factor=st.floats(1, 100),
    window=st.integers(2, 100_000),
    head_dim=st.sampled_from([4, 16, 80, 96, 128, 256]),
    rope_theta=st.floats(10, 1e7),
)
def test_frequencies_of_any_settings(rope_type, factor, window, head_dim, rope_theta):
    """Includes tiny windows, where yarn's ramp is outside the head or shrinks to a step."""
    scaling = build_rope_scaling(rope_type, factor, window)
    rope = build(scaling, head_dim, rope_theta)
    inv_freq, attention_factor = transformers_reference(scaling, head_dim, rope_theta)
    assert torch.equal(rope.inv_freq, inv_freq) and rope.attention_factor == attention_factor


@pytest.mark.parametrize("window", [5, 16, 200])  # ramp: a step at 0; clipped at 0; inside
def test_yarn_frequencies_of_toy_windows(window):
    scaling = build_rope_scaling("yarn", 8.0, window)
    inv_freq, _ = transformers_reference(scaling, 16, 10000.0)
    assert torch.equal(build(scaling, 16).inv_freq, inv_freq) and inv_freq.isfinite().all()


def test_scaling_types_differ_as_documented():
    """Make sure that the comparison above does not pass because both sides ignore the scaling."""
    base = build(None).inv_freq
    assert torch.equal(build(ONE_OF_EACH[1]).inv_freq, base / 8)
    for scaling in ONE_OF_EACH[2:]:
        scaled = build(scaling).inv_freq
        assert torch.equal(scaled[:1], base[:1])  # the fastest dimension is kept
        torch.testing.assert_close(scaled[-1:], base[-1:] / 8, rtol=1e-6, atol=0)  # the slowest is interpolated
    distinct = {tuple(build(scaling).inv_freq.tolist()) for scaling in ONE_OF_EACH}
    assert len(distinct) == len(ROPE_SCALING_TYPES)
    assert build(ONE_OF_EACH[3]).attention_factor == 0.1 * math.log(8) + 1


@pytest.mark.parametrize("scaling", ONE_OF_EACH, ids=name)
def test_no_default_device_dtype_or_mode_reaches_the_values(scaling):
    positions = some_positions(1, 50)
    expected = build(scaling)
    cos, sin = expected.cos_sin(positions)
    with torch.device("meta"):
        on_meta = build(scaling)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        in_bf16 = build(scaling)
        cos_bf16, sin_bf16 = in_bf16.cos_sin(positions)
    finally:
        torch.set_default_dtype(default)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        in_inference = build(scaling)
        in_inference.cos_sin(positions)
    assert torch.equal(cos_bf16, cos) and torch.equal(sin_bf16, sin)
    # An attribute of a model that is cast must not change or appear in the state dict.
    model = torch.nn.Linear(2, 2)
    model.rotary = build(scaling)
    model.bfloat16().half()
    assert set(model.state_dict()) == {"weight", "bias"}
    for rope in (on_meta, in_bf16, in_inference, model.rotary):
        assert torch.equal(rope.inv_freq, expected.inv_freq) and rope.inv_freq.device.type == "cpu"
        for ours, theirs in zip(rope.cos_sin(positions), (cos, sin)):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
        x = torch.randn(50, 1, 2, 128, requires_grad=True)
        apply_rotary(x, *rope.cos_sin(positions)).sum().backward()  # even if built in inference mode


# ------------------------------------------------------------------ angles


@pytest.mark.parametrize("scaling", SCALINGS, ids=name)
def test_cos_sin_against_float64(scaling):
    positions = some_positions()
    inv_freq, attention_factor = transformers_reference(scaling, 128, 10000.0)
    angles = positions.numpy()[..., None].astype(np.float64) * inv_freq.numpy().astype(np.float64)
    angles = np.concatenate((angles, angles), axis=-1)
    for ours, function in zip(build(scaling).cos_sin(positions), (np.cos, np.sin)):
        assert ours.dtype == torch.float32 and ours.shape == (3, 500, 128)
        assert np.abs(ours.double().numpy() - function(angles) * attention_factor).max() < COS_SIN_BOUND


def test_float32_angles_would_fail_that_bound():
    positions = some_positions()
    inv_freq, _ = transformers_reference(None, 128, 10000.0)
    angles = positions.numpy()[..., None].astype(np.float64) * inv_freq.numpy().astype(np.float64)
    naive = (positions[..., None].float() * inv_freq).cos()
    assert np.abs(naive.double().numpy() - np.cos(angles)).max() > 1e-3


def test_far_positions_and_any_order():
    """Positions beyond 2**24 do not fit float32; rows and their order do not matter."""
    limit = 2**27
    positions = torch.tensor([[limit - 1, 0, 2**24 + 1], [5, 5, 4]])
    rope = build(None, limit=limit)
    cos, sin = rope.cos_sin(positions)
    angles = positions.numpy()[..., None] * rope.inv_freq.numpy().astype(np.float64)
    assert np.abs(cos[..., :64].double().numpy() - np.cos(angles)).max() < COS_SIN_BOUND
    assert np.abs(sin[..., 64:].double().numpy() - np.sin(angles)).max() < COS_SIN_BOUND
    assert torch.equal(cos[1, 0], cos[1, 1])
    assert torch.equal(cos[1], rope.cos_sin(positions[1:].int())[0][0])
    assert rope.cos_sin(positions[:, :0])[0].shape == (2, 0, 128)


# ---------------------------------------------------------------- rotation


def rotation_inputs(dtype: torch.dtype = torch.float32, heads: int = 3, kv_heads: int = 1):
    torch.manual_seed(0)
    positions = some_positions(2, 40)
    query_SBHD = torch.randn(40, 2, heads, 64, dtype=dtype)
    key_SBHD = torch.randn(40, 2, kv_heads, 64, dtype=dtype)
    return query_SBHD, key_SBHD, *build(build_rope_scaling("yarn", 8.0, 4096), 64).cos_sin(positions)


def test_apply_rotary_is_transformers_rotation_with_its_gradients():
    query_SBHD, key_SBHD, cos, sin = rotation_inputs()
    ours_in = [x.clone().requires_grad_() for x in (query_SBHD, key_SBHD)]
    theirs_in = [x.clone().requires_grad_() for x in (query_SBHD, key_SBHD)]
    ours = [apply_rotary(x, cos, sin) for x in ours_in]
    theirs_BHSD = apply_rotary_pos_emb(*(x.permute(1, 2, 0, 3) for x in theirs_in), cos, sin)
    theirs = [x.permute(2, 0, 1, 3) for x in theirs_BHSD]
    weights = [torch.randn_like(x) for x in ours]
    for outputs in (ours, theirs):
        sum((w * x).sum() for w, x in zip(weights, outputs)).backward()
    pairs = list(zip(ours, theirs)) + [(a.grad, b.grad) for a, b in zip(ours_in, theirs_in)]
    for a, b in pairs:
        assert (a - b).norm() < 1e-6 * b.norm()


def test_apply_rotary_gradcheck():
    positions = torch.tensor([[0, 9, 1000], [3, 4, 99_999]])
    cos, sin = build(None, 8).cos_sin(positions)
    x = torch.randn(3, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_both_ways(dtype):
    x, _, cos, sin = rotation_inputs(dtype)
    grad = torch.randn_like(x)
    low, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    low_out, exact_out = apply_rotary(low, cos, sin), apply_rotary(exact, cos, sin)
    low_out.backward(grad)
    exact_out.backward(grad.float())
    assert low_out.dtype == dtype and torch.equal(low_out, exact_out.to(dtype))
    assert torch.equal(low.grad, exact.grad.to(dtype))
    # Computing in low precision gives another result, so the comparison above can fail.
    all_low, _ = apply_rotary_pos_emb(x, x, *(t.transpose(0, 1).to(dtype) for t in (cos, sin)), 2)
    assert not torch.equal(low_out, all_low)


def test_autograd_saves_only_cos_and_sin():
    query_SBHD, _, cos, sin = rotation_inputs(torch.bfloat16)
    query_SBHD.requires_grad_()
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        apply_rotary(query_SBHD, cos, sin)
    assert kept == {cos.untyped_storage().data_ptr(), sin.untyped_storage().data_ptr()}


@settings(max_examples=60, deadline=None)
@given(
    near=st.integers(0, 4095),
    distance=st.integers(0, 131_071),
    shift=st.integers(0, LIMIT - 131_071 - 4096),
    seed=st.integers(0, 2**31),
)
def test_scores_depend_on_the_distance_only(near, distance, shift, seed):
    """<rot(q, p + d), rot(k, r + d)> does not depend on d, to 1e-6 |q| |k|."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    rope = build(None, 64)

    def score(offset: int) -> float:
        at = [rope.cos_sin(torch.tensor([[near + moved + offset]])) for moved in (distance, 0)]
        return float((apply_rotary(q, *at[0]) * apply_rotary(k, *at[1])).sum())

    assert abs(score(shift) - score(0)) < 1e-6 * float(q.norm() * k.norm())


# --------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ONE_OF_EACH, ids=name)
def test_gpu_gives_the_cpu_values_without_waiting(scaling):
    rope, positions = build(scaling), some_positions()
    on_gpu = positions.cuda()
    rope.cos_sin(on_gpu)  # the first call copies the frequencies
    x = torch.randn(500, 3, 2, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cos, sin = rope.cos_sin(on_gpu)
        rotated = apply_rotary(x, cos, sin)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, expected in zip((cos, sin), rope.cos_sin(positions)):
        assert (ours.cpu() - expected).abs().max() <= 2 * COS_SIN_BOUND  # one ulp, as float64 functions differ
    torch.testing.assert_close(rotated.cpu(), apply_rotary(x.cpu(), cos.cpu(), sin.cpu()))


@pytest.mark.gpu
def test_gpu_position_out_of_range_is_an_error():
    """Run in a separate process, because the device is unusable after a device-side assertion."""
    code = (
        "import torch; from megatron_cream.model.rotary import RotaryEmbedding; "
        "rope = RotaryEmbedding(head_dim=64, max_position_embeddings=10); "
        "rope.cos_sin(torch.tensor([[9]], device='cuda')); torch.cuda.synchronize(); print('fine'); "
        "rope.cos_sin(torch.tensor([[10]], device='cuda')); torch.cuda.synchronize(); print('missed')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert run.returncode != 0 and "fine" in run.stdout and "missed" not in run.stdout
