"""All rope settings of a config.json, in all its layouts, against transformers' rotary embedding."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_cream.checkpoint.families import shape_from_config
from megatron_cream.model.rotary import RotaryEmbedding
from tests.model.test_rope_real_configs import SIZES

HEAD_DIM = SIZES["head_dim"]
DYNAMIC = {"type": "dynamic", "factor": 2.5}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1 + i / 100 for i in range(64)],
    "long_factor": [1 + i for i in range(64)],
    "original_max_position_embeddings": 64,
}


def maybe(**values):
    """Draw a dict with any subset of the keys."""
    return st.fixed_dictionaries({}, optional=values)


FACTOR = st.floats(1, 100) | st.integers(1, 64)
WINDOW = st.integers(16, 1 << 17)
DIVISORS = st.lists(st.floats(0.5, 70), min_size=HEAD_DIM // 2, max_size=HEAD_DIM // 2)
YARN = maybe(
    original_max_position_embeddings=WINDOW,
    attention_factor=st.floats(0.5, 2) | st.none(),
    finetuned=st.booleans(),
    mscale=st.floats(0.1, 2),
    mscale_all_dim=st.floats(0.1, 2),
    truncate=st.booleans(),
    beta_fast=st.floats(16, 64) | st.none(),
    beta_slow=st.floats(0.5, 4) | st.none(),
)
SCALINGS = st.one_of(
    st.just({"rope_type": "default"}),
    st.builds(lambda factor: {"rope_type": "linear", "factor": factor}, FACTOR),
    st.builds(lambda factor: {"rope_type": "dynamic", "factor": factor}, FACTOR),
    st.builds(lambda factor, more: {"rope_type": "yarn", "factor": factor} | more, FACTOR, YARN),
    st.builds(
        lambda factor, window: {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": window,
        },
        FACTOR,
        WINDOW,
    ),
    st.builds(
        lambda short, long, more: {"rope_type": "longrope", "short_factor": short, "long_factor": long} | more,
        DIVISORS,
        DIVISORS,
        maybe(factor=FACTOR, attention_factor=st.floats(0.5, 2), original_max_position_embeddings=WINDOW),
    ),
)


@st.composite
def configs(draw):
    """Draw a config in any layout.

    rope_scaling and rope_theta, or rope_parameters with rope_theta inside; keys type, rope_type or both.
    """
    scaling = dict(draw(SCALINGS))
    name = scaling.pop("rope_type")
    scaling |= {key: name for key in draw(st.sampled_from([("type",), ("rope_type",), ("type", "rope_type")]))}
    config = SIZES | {"max_position_embeddings": draw(WINDOW)}
    theta = draw(st.floats(100, 1e9))
    if draw(st.booleans()):
        config["rope_parameters"] = scaling | {"rope_theta": theta}
    else:
        config |= {"rope_scaling": scaling, "rope_theta": theta}
    if draw(st.booleans()) and name in ("yarn", "llama3", "longrope"):
        config["original_max_position_embeddings"] = draw(WINDOW)
    return config


def transformers_rope(config: dict, length: int) -> LlamaRotaryEmbedding:
    rope = LlamaRotaryEmbedding(AutoConfig.for_model(**copy.deepcopy(config)))
    rope(torch.zeros(1), torch.tensor([[length - 1]]))  # for types whose frequencies depend on the length
    return rope


@settings(max_examples=200, deadline=None)
@given(configs())
def test_any_config_and_its_export(config):
    shape = shape_from_config(copy.deepcopy(config), Path("config.json"))
    length = shape.max_position_embeddings
    for raw in (config, shape.hf_config(config)):
        theirs = transformers_rope(raw, length)
        assert torch.equal(shape.rotary().inv_freq, theirs.inv_freq)
        assert math.isclose(shape.rotary().attention_factor, theirs.attention_scaling)
    again = shape_from_config(shape.hf_config(config), Path("config.json"))
    assert again.rope() == shape.rope()


@pytest.mark.parametrize("scaling", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_frequencies_follow_the_longest_position_as_in_transformers(scaling):
    """Lengths grow from within the window of 64 to beyond it, and shrink again."""
    config = SIZES | {"max_position_embeddings": 64 if scaling is DYNAMIC else 1024, "rope_scaling": scaling}
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**copy.deepcopy(config)))
    shape = shape_from_config(copy.deepcopy(config), Path("config.json"))
    ours, seen = shape.rotary(by_length=True), set()
    ours.max_position_embeddings = 1024
    for length in (40, 64, 65, 300, 1000, 50):
        positions = torch.arange(length)[None]
        expected = theirs(torch.zeros(1), positions)
        for a, b in zip(ours.cos_sin(positions), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # transformers rounds the angle
        seen.add(round(float(expected[0][0, 30, 40]), 4))
    assert len(seen) > 1  # the values depend on the length


def test_training_takes_one_set_of_frequencies():
    """Frequencies depend on the run's longest position, not on a sample's: long factors beyond the window."""
    for limit, name in ((64, "short_factor"), (1024, "long_factor")):
        rope = RotaryEmbedding(head_dim=HEAD_DIM, max_position_embeddings=limit, rope_scaling=LONGROPE)
        assert rope.inv_freq[-1] * 10000 ** (126 / 128) == pytest.approx(1 / LONGROPE[name][-1])
        alone, among = rope.cos_sin(torch.tensor([[3]]))[0], rope.cos_sin(torch.tensor([[3, limit - 1]]))[0][:, :1]
        assert torch.equal(alone, among)
