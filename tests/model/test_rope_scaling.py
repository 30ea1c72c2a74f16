"""The rope_scaling of a config.json: round trips, and invalid values."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig

from megatron_cream.model.rotary import RotaryEmbedding, build_rope_scaling
from tests.model.test_rotary import (
    LIMIT,
    ONE_OF_EACH,
    SCALINGS,
    build,
    name,
    transformers_rope,
)


@pytest.mark.parametrize("scaling", SCALINGS, ids=name)
def test_hf_config_survives_the_disk(scaling, tmp_path):
    rope = build(scaling, 64, 500000.0)
    before = json.dumps(rope.hf_config())
    LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, **rope.hf_config()).save_pretrained(tmp_path)
    reloaded = LlamaConfig.from_pretrained(tmp_path)
    inv_freq, attention_factor = transformers_rope(reloaded)
    assert torch.equal(inv_freq, rope.inv_freq) and attention_factor == rope.attention_factor
    assert reloaded.max_position_embeddings == LIMIT
    assert json.dumps(rope.hf_config()) == before  # transformers modifies the dicts that it receives

    # The format of transformers 5 (rope_parameters, with rope_theta inside) is accepted.
    saved = json.loads((tmp_path / "config.json").read_text())
    again = RotaryEmbedding(
        head_dim=64, max_position_embeddings=saved["max_position_embeddings"], rope_scaling=saved["rope_parameters"]
    )
    assert torch.equal(again.inv_freq, rope.inv_freq) and again.attention_factor == rope.attention_factor


@pytest.mark.parametrize("scaling", ONE_OF_EACH, ids=name)
def test_plain_config_json_is_understood_by_transformers(scaling, tmp_path):
    """transformers reads the layout of our converter: rope_theta and rope_scaling at the top level."""
    rope = build(scaling, 64)
    shape = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape | rope.hf_config()))
    inv_freq, attention_factor = transformers_rope(LlamaConfig.from_pretrained(tmp_path))
    assert torch.equal(inv_freq, rope.inv_freq) and attention_factor == rope.attention_factor


def test_equivalent_rope_settings():
    linear = build({"rope_type": "linear", "factor": 8.0}).inv_freq
    legacy = {"type": "linear", "factor": 8.0}
    assert torch.equal(build(legacy).inv_freq, linear)
    assert legacy == {"type": "linear", "factor": 8.0}  # the caller's dict is unchanged
    inside = {"rope_type": "linear", "factor": 8, "rope_theta": 10000}
    assert torch.equal(build(inside).inv_freq, linear)
    assert torch.equal(build(inside, rope_theta=None).inv_freq, linear)
    for nothing in (None, {}, {"rope_type": "default"}, {"rope_type": "none", "rope_theta": 10000.0}):
        assert torch.equal(build(nothing, rope_theta=None).inv_freq, build(None).inv_freq)
        assert build(nothing).hf_config()["rope_scaling"] is None


def test_rope_scaling_dict():
    assert build_rope_scaling("none", 8.0, 4096) is None
    assert build_rope_scaling("linear", 8.0, 4096) == {"rope_type": "linear", "factor": 8.0}
    assert build_rope_scaling("ntk", 8.0) == {"rope_type": "ntk", "factor": 8.0}
    assert build_rope_scaling("yarn", 8.0, 4096) == {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": 0.1 * math.log(8) + 1,
    }
    assert build_rope_scaling("llama3", 8.0, 4096, low_freq_factor=2.0) == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }


# ------------------------------------------------------------------ errors

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3 = build_rope_scaling("llama3", 8.0, 4096)
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
LONGROPE |= {"original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"head_dim": 63}, "head_dim 63: must be even and at least 2"),
        ({"head_dim": 0}, "head_dim 0: must be even and at least 2"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "ntk", "factor": 8}}, "head_dim 2: .* at least 4"),
        ({"rope_theta": 1.0}, "rope_theta 1.0: must be a number above 1"),
        ({"rope_theta": math.nan}, "rope_theta nan: must be a number above 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings 0: must be at least 1"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 8.0}}, "'spiral': choose from none, linear, ntk, yarn"),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0]}},
            r"\['long_factor'\] has 1 numbers: must be 64, head_dim / 2",
        ),
        ({"rope_scaling": LONGROPE | {"short_factor": [0.0] * 64}}, r"must be a list of numbers above 0"),
        ({"rope_scaling": {"factor": 8.0}}, "None: choose from none"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"\['factor'\] is missing: 'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": None}}, r"\['factor'\] is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"\['factor'\] 0.5: must be a number of at least 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, r"\['factor'\] '8': must be a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, r"\['factor'\] True: must be a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, r"\['factor'\] inf: must be a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8, "beta": 1}}, r"\['beta'\] 1: 'linear' takes factor"),
        ({"rope_scaling": {"rope_type": "none", "factor": 8}}, r"\['factor'\] 8: 'none' takes no further key"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, r"\['original_max_position_embeddings'\] is missing"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 4096.5}}, "4096.5: must be a whole number"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, r"\['beta_fast'\] 0: must be a number above 0"),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, r"\['beta_slow'\] 32: must be below"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, r"\['attention_factor'\] -1.0: must be a number above 0"),
        ({"rope_scaling": YARN | {"truncate": None}}, r"\['truncate'\] None: must be true or false"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, r"\['low_freq_factor'\] is missing: 'llama3' needs"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, r"\['low_freq_factor'\] 1.0: must be below"),
        ({"rope_scaling": {"rope_type": "none", "rope_theta": 5e5}}, "rope_theta 10000.0: .* 500000.0; give one"),
    ],
)
def test_invalid_settings(settings_, message):
    usual = {"head_dim": 128, "rope_theta": 10000.0, "max_position_embeddings": 32768}
    with pytest.raises(ValueError, match=message) as error:
        RotaryEmbedding(**(usual | settings_))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("linear", 0.5), "'factor'. 0.5: must be a number of at least 1"),
        (("yarn", -1.0, 4096), "'factor'. -1.0"),
        (("yarn", 8.0), "'original_max_position_embeddings'. is missing"),
        (("longrope", 8.0, 4096), "'short_factor'. is missing"),
    ],
)
def test_invalid_rope_scaling_dicts(call, message):
    with pytest.raises(ValueError, match=message):
        build_rope_scaling(*call)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([[0, 100]]), r"from 0 to 100: must be in 0 \.\. 99"),
        (torch.tensor([[3, -1]]), r"from -1 to 3: must be in 0 \.\. 99"),
        (torch.tensor([[0.0]]), "torch.float32: must be integers"),
    ],
)
def test_invalid_positions(positions, message):
    rope = build(None, limit=100)
    assert rope.cos_sin(torch.tensor([[0, 99]]))[0].shape == (1, 2, 128)
    with pytest.raises(ValueError, match=message):
        rope.cos_sin(positions)
