"""Frequencies that depend on the longest position, against transformers' own rotary embedding."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_cream.checkpoint.families import shape_from_config
from megatron_cream.model.rotary import RotaryEmbedding
from tests.test_rope_real_configs import SIZES

HEAD_DIM = SIZES["head_dim"]
DYNAMIC = {"type": "dynamic", "factor": 2.5}
LONGROPE = {
    "type": "longrope", "short_factor": [1 + i / 100 for i in range(64)], "long_factor": [1 + i for i in range(64)],
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("scaling", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_frequencies_follow_the_longest_position_as_in_transformers(scaling):
    """Within the window of 64 and beyond it, growing, and back again."""
    config = SIZES | {"max_position_embeddings": 64 if scaling is DYNAMIC else 1024, "rope_scaling": scaling}
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**copy.deepcopy(config)))
    shape = shape_from_config(copy.deepcopy(config), Path("config.json"))
    ours, seen = shape.rotary(by_length=True), set()
    ours.max_position_embeddings = 1024
    for length in (40, 64, 65, 300, 1000, 50):
        positions = torch.arange(length)[None]
        expected = theirs(torch.zeros(1), positions)
        for a, b in zip(ours.cos_sin(positions), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # theirs rounds the angle
        seen.add(round(float(expected[0][0, 30, 40]), 4))
    assert len(seen) > 1  # the lengths do make a difference


def test_training_takes_one_set_of_frequencies():
    """Whatever positions a sample or a rank has: the long ones, for a run that goes beyond the window."""
    for limit, name in ((64, "short_factor"), (1024, "long_factor")):
        rope = RotaryEmbedding(head_dim=HEAD_DIM, max_position_embeddings=limit, rope_scaling=LONGROPE)
        assert rope.inv_freq[-1] * 10000 ** (126 / 128) == pytest.approx(1 / LONGROPE[name][-1])
        alone, among = rope.cos_sin(torch.tensor([[3]]))[0], rope.cos_sin(torch.tensor([[3, limit - 1]]))[0][:, :1]
        assert torch.equal(alone, among)
