"""The rotary embedding of a run, chosen from the model's settings and the user's flags."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.common.errors import UsageError
from megatron_cream.model.rope_choice import ModelRope, RopeFlags, choose_rope, has_other_rope
from megatron_cream.model.rotary import ROPE_SCALING_TYPES, build_rope_scaling

LLAMA2 = dict(theta=1e4, scaling=None, positions=4096)
MODEL_8K = dict(theta=1e5, scaling=None, positions=8192)
LLAMA31 = dict(theta=5e5, scaling=build_rope_scaling("llama3", 8.0, 8192), positions=131072)
VICUNA = dict(theta=1e4, scaling=build_rope_scaling("linear", 4.0), positions=4096)  # positions before scaling
TOGETHER = dict(theta=1e4, scaling=build_rope_scaling("linear", 8.0), positions=32768)  # positions after scaling
QWEN = dict(theta=1e6, scaling=build_rope_scaling("yarn", 4.0, 32768), positions=32768)
DYNAMIC = dict(theta=1e4, positions=4096)
DYNAMIC |= {"scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096}}
LONGROPE = dict(
    theta=1e4,
    positions=131072,
    scaling={
        "rope_type": "longrope",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 64,
        "long_factor": [1.0, *[4.0] * 62, 64.0],
    },
)
NTK = dict(theta=1e4, scaling=build_rope_scaling("ntk", 8.0), positions=32768, original=4096)


def choose(model: dict | None, head_dim: int = 128, **flags):
    flags = {"window": 4096, "target": 4096} | flags
    model = None if model is None else ModelRope(**model)
    return choose_rope(RopeFlags(**flags), model, head_dim=head_dim, default_theta=1e4)


# Model, flags; expected type, factor and window of the scaling; words in the printed lines (no words: no lines).
TABLE = [
    # Without a model, --seq-length is the window.
    (None, {}, None, []),
    (None, dict(target=32768, type="linear"), ("linear", 8, None), []),
    (None, dict(target=32768, type="yarn"), ("yarn", 8, 4096), []),
    (None, dict(target=32768, type="yarn", original=2048), ("yarn", 16, 2048), []),
    (None, dict(window=32768, target=32768, type="linear", factor=8.0), ("linear", 8, None), []),
    (None, dict(target=32768, type="linear", factor=4.0), ("linear", 4, None), ["warning: --rope-scaling-factor 4"]),
    # With a model, its window counts, not the length of the training samples.
    (LLAMA2, {}, None, []),
    (LLAMA2, dict(target=32768, type="linear"), ("linear", 8, None), ["linear scaling by 8 from a window of 4096"]),
    (LLAMA2, dict(window=2048, target=32768, type="yarn"), ("yarn", 8, 4096), ["by 8 from a window of 4096"]),
    (MODEL_8K, dict(target=65536, type="ntk"), ("ntk", 8, None), ["ntk scaling by 8 from a window of 8192"]),
    (MODEL_8K, dict(target=8192, type="yarn"), None, ["not scaled: the target of 8192 positions fits"]),
    (MODEL_8K, dict(target=4096, type="yarn", factor=2.0), ("yarn", 2, 8192), ["yarn scaling by 2"]),
    (MODEL_8K, dict(target=65536, type="yarn", factor=4.0), ("yarn", 4, 8192), ["by 4", "serves 32768 positions"]),
    (MODEL_8K, dict(target=65536, type="yarn", original=4096), ("yarn", 16, 4096), ["from a window of 4096"]),
    (LLAMA2, dict(target=32768), None, ["warning: the target of 32768", "window of 4096", "--rope-scaling-type yarn"]),
    (LLAMA2, dict(target=32768, type="none"), None, ["warning: the target of 32768"]),
    # The model's own scaling is kept if the target fits.
    (LLAMA31, dict(target=65536), ("llama3", 8, 8192), ["own llama3 scaling by 8 is kept: it serves 131072"]),
    (LLAMA31, dict(target=131072, type="llama3"), ("llama3", 8, 8192), ["is kept"]),
    (VICUNA, dict(target=4096), ("linear", 4, None), ["is kept: it serves 16384"]),
    (VICUNA | {"original": 4096}, dict(target=16384), ("linear", 4, None), ["is kept: it serves 16384"]),
    (TOGETHER, dict(target=32768, type="linear"), ("linear", 8, None), ["is kept: it serves 32768"]),
    (QWEN, dict(target=131072), ("yarn", 4, 32768), ["is kept: it serves 131072"]),
    (NTK, dict(target=16384), ("ntk", 8, None), ["is kept: it serves 32768"]),
    # It is widened if the target does not fit.
    (LLAMA31, dict(target=262144), ("llama3", 16, 8192), ["llama3 scaling changes from factor 8 (131072", "16 (262144"]),
    (LLAMA31 | {"positions": 8192}, dict(target=131072), ("llama3", 16, 8192), ["factor 8 (65536", "16 (131072"]),
    (VICUNA | {"original": 4096}, dict(target=65536), ("linear", 16, None), ["factor 4 (16384", "16 (65536"]),
    (TOGETHER, dict(target=65536), ("linear", 16, None), ["factor 8 (32768", "16 (65536", "taken as after"]),
    (QWEN, dict(target=262144), ("yarn", 8, 32768), ["yarn scaling changes from factor 4 (131072", "8 (262144"]),
    (NTK, dict(target=65536), ("ntk", 16, None), ["ntk scaling changes from factor 8 (32768", "16 (65536"]),
    (QWEN, dict(target=262144, factor=6.0), ("yarn", 6, 32768), ["to factor 6 (196608", "warning: --rope-scaling-fac"]),
    (QWEN, dict(target=65536, original=16384), ("yarn", 4, 16384), ["window 16384"]),
    (LONGROPE, dict(target=131072), ("longrope", 32, 4096), ["is kept: it serves 131072"]),
    (LONGROPE, dict(target=262144), ("longrope", 64, 4096), ["factor 32 (131072", "64 (262144"]),
    # Dynamic scaling has no fixed frequencies: training uses the equivalent ntk scaling at the target.
    (DYNAMIC, dict(target=4096), None, ["dynamic scaling by 2 from a window of 4096 has no effect at 4096"]),
    (DYNAMIC, dict(target=32768), ("ntk", 15, None), ["becomes ntk scaling by 15, which is equivalent at 32768"]),
    (DYNAMIC, dict(target=32768, factor=4.0), ("ntk", 4, None), ["becomes ntk scaling by 4", "serves 16384"]),
    (DYNAMIC, dict(target=32768, type="yarn"), ("yarn", 8, 4096), ["replaced by yarn scaling by 8"]),
    # Another type replaces it, starting from the window of pre-training.
    (LLAMA31, dict(target=262144, type="yarn"), ("yarn", 32, 8192), ["llama3 scaling by 8", "replaced by yarn scaling"]),
    (QWEN, dict(target=131072, type="linear"), ("linear", 4, None), ["yarn scaling by 4", "replaced by linear"]),
    (VICUNA, dict(target=8192, type="yarn"), ("yarn", 2, 4096), ["replaced by yarn scaling by 2", "taken as before"]),
    (LLAMA31, dict(target=8192, type="none"), None, ["llama3 scaling by 8", "is removed"]),
    (LLAMA31, dict(target=65536, type="none"), None, ["is removed", "warning: the target of 65536"]),
    (LLAMA31, dict(target=4096, type="linear"), None, ["is removed: the target of 4096 positions fits the window"]),
    # A linear model's positions are ambiguous: the guess, and --original-max-position-embeddings.
    (VICUNA, dict(target=8192), ("linear", 4, None), ["is kept: it serves 16384", "position_embeddings 4096", "before"]),
    (VICUNA, dict(target=8192, original=1024), ("linear", 8, None), ["window 1024"]),
    (TOGETHER, dict(target=65536, original=32768), ("linear", 8, None), ["is kept: it serves 262144"]),
]  # fmt: skip


@pytest.mark.parametrize("model, flags, expected, words", TABLE, ids=str)
def test_the_scaling_follows_from_the_model(model, flags, expected, words):
    rope = choose(model, **flags)
    scaling = rope.scaling or {}
    found = tuple(scaling.get(key) for key in ("rope_type", "factor", "original_max_position_embeddings"))
    assert (found if scaling else None) == expected
    assert rope.theta == (model or LLAMA2)["theta"]
    text = "\n".join(rope.lines)
    assert bool(words) == bool(text) and not [word for word in words if word not in text], text


def test_a_larger_theta_is_reported_and_compared_with_the_target():
    """For eight times Llama 2's window ntk needs a theta of 82,685: 2.0e5 is enough, 2.0e4 is not.

    Advised is the critical base: wavelengths of 4,096 become 32,768.
    """
    rope = choose(LLAMA2, target=32768, theta=2e5)
    assert (rope.theta, rope.scaling) == (2e5, None)
    assert rope.lines == ("rope: theta changes from the model's 10000 to 200000 (--rotary-base)",)
    rope = choose(LLAMA2, target=32768, theta=2e4)
    assert (
        "stretched to 8104 positions only" in rope.lines[1] and "--rotary-base 192144 instead of 20000" in rope.lines[1]
    )
    turns_once = math.log(4096 / (2 * math.pi)) / math.log(1e4)  # place of that dimension among those of the head
    assert 2 * math.pi * 192144**turns_once == pytest.approx(32768, rel=1e-5)
    for enough in (192144.0, 82685.0):  # the advised value, and ntk's
        assert choose(LLAMA2, target=32768, theta=enough).lines[1:] == ()
    # A window longer than the slowest wavelength: all dimensions have turned, and ntk's is the larger one.
    long = dict(theta=1e4, scaling=None, positions=131072)
    assert "or --rotary-base 20221.3" in choose(long, target=262144).lines[0]
    with_scaling = choose(LLAMA31, target=262144, theta=4e6)
    assert (with_scaling.theta, with_scaling.scaling["factor"]) == (4e6, 16) and len(with_scaling.lines) == 2
    assert choose(None, target=32768, theta=2e5).theta == 2e5


def test_yarns_temperature_follows_the_factor_unless_it_is_the_models_own():
    assert choose(QWEN, target=262144).scaling["attention_factor"] == 0.1 * math.log(8) + 1
    own = QWEN | {"scaling": QWEN["scaling"] | {"attention_factor": 1.5}}
    assert choose(own, target=262144).scaling["attention_factor"] == 1.5
    plain = {key: value for key, value in QWEN["scaling"].items() if key != "attention_factor"}
    assert "attention_factor" not in choose(QWEN | {"scaling": plain}, target=262144).scaling


def test_longrope_is_widened_most_where_it_divides_most():
    long = choose(LONGROPE, target=262144).scaling["long_factor"]
    assert long[0] == 1 and math.isclose(long[-1], 128) and math.isclose(long[1], 4 ** (1 + math.log(2) / math.log(64)))


@pytest.mark.parametrize("model", [VICUNA, TOGETHER])
def test_the_advice_for_a_linear_model_works(model):
    (warning,) = [line for line in choose(model, target=2 * 32768).lines if line.startswith("warning")]
    advised = int(warning.rpartition("--original-max-position-embeddings ")[2])
    rope = choose(model, target=2 * 32768, original=advised)
    assert rope.original == advised and not [line for line in rope.lines if line.startswith("warning")]


@pytest.mark.parametrize(
    "model, flags, error",
    [
        (None, dict(factor=8.0), "--rope-scaling-factor 8.0: only with"),
        (LLAMA2, dict(type="none", original=2048), "--original-max-position-embeddings 2048: only with"),
        (LLAMA31, dict(type="none", factor=8.0), "--rope-scaling-factor 8.0: only with"),
        (LLAMA2, dict(theta=-1.0), "--rotary-base -1: must be a number above 1"),
        (LLAMA2, dict(type="linear", factor=0.5), "'factor'. 0.5: must be a number of at least 1"),
    ],
    ids=str,
)
def test_contradicting_flags(model, flags, error):
    with pytest.raises((UsageError, ValueError), match=error):
        choose(model, **flags)


@settings(max_examples=200, deadline=None)
@given(
    own=st.sampled_from(ROPE_SCALING_TYPES),
    asked=st.sampled_from([None, *ROPE_SCALING_TYPES]),
    window=st.integers(1, 20),
    wider=st.integers(1, 64),
    samples=st.sampled_from([256, 4096, 131072]),
    target=st.integers(1, 1024),
)
def test_every_model_gets_a_window_that_fits_the_target(own, asked, window, wider, samples, target):
    """The scaled window fits or a warning is printed; choosing again from the result changes nothing."""
    original, target = window * 1024, target * 1024
    scaling = build_rope_scaling(own, float(wider), original)
    positions = original * wider if scaling else original
    model = ModelRope(theta=1e4, scaling=scaling, positions=positions, original=original)
    rope = choose_rope(RopeFlags(target=target, window=samples, type=asked), model, head_dim=128, default_theta=1e4)
    reach = original * (rope.scaling["factor"] if rope.scaling else 1)
    assert reach >= target * (1 - 1e-9) or [line for line in rope.lines if line.startswith("warning: the target")]
    trained = ModelRope(
        theta=rope.theta, scaling=rope.scaling, positions=max(target, positions), original=rope.original
    )
    again = choose_rope(RopeFlags(target=target, window=samples), trained, head_dim=128, default_theta=1e4)
    assert (again.theta, again.scaling) == (rope.theta, rope.scaling)


def test_a_resumed_run_keeps_its_rope():
    saved = ModelRope(theta=1e4, scaling=build_rope_scaling("linear", 16.0), positions=65536, original=4096)
    for flags in ({}, dict(type="linear"), dict(type="linear", factor=16.0), dict(original=4096)):
        assert not has_other_rope(RopeFlags(target=65536, window=4096, **flags), saved)
    for flags in (dict(type="yarn"), dict(factor=8.0), dict(original=8192), dict(theta=5e5), dict(target=32768)):
        assert has_other_rope(RopeFlags(**{"target": 65536, "window": 4096} | flags), saved)
