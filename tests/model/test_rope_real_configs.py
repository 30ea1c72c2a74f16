"""Rope settings of published models' config.json: their meaning, and the scaling for longer targets."""

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_cream.checkpoint.families import shape_from_config
from megatron_cream.model.rope_choice import RopeFlags, choose_rope

K = 1024
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"rope_type": "llama3", "factor": 8.0}

# Rope keys of config.json; for each target: type, factor and window of the scaling, and words in the lines.
MODELS = {
    "Llama-2-7b-hf": (
        {"max_position_embeddings": 4096, "rope_scaling": None},
        {4 * K: (None, []), 32 * K: (None, ["warning: the target of 32768", "--rotary-base 192144"])},
    ),
    "Llama-3.1-8B": (
        {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {64 * K: (("llama3", 8, 8192), ["is kept"]), 512 * K: (("llama3", 32, 8192), ["8 (131072", "32 (524288"])},
    ),
    "Llama-3.2-1B": (
        {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"factor": 32.0}},
        {128 * K: (("llama3", 32, 8192), ["is kept"]), 256 * K: (("llama3", 64, 8192), ["32 (131072", "64 (262144"])},
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {256 * K: (("llama3", 16, 8192), ["8 (131072", "16 (262144"])},
    ),
    "Llama-3-8B-Instruct-Gradient-1048k": (
        {"max_position_embeddings": 1048576, "rope_theta": 2804339835.0, "rope_scaling": None},
        {1024 * K: (None, []), 2048 * K: (None, ["warning: the target of 2097152", "window of 1048576"])},
    ),
    "CodeLlama-7b-hf": (
        {"max_position_embeddings": 16384, "rope_theta": 1000000, "rope_scaling": None},
        {16 * K: (None, []), 64 * K: (None, ["warning: the target of 65536", "window of 16384"])},
    ),
    "Yarn-Llama-2-7b-64k": (
        {"max_position_embeddings": 65536, "rope_theta": 10000.0, "rope_scaling": {
            "factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True}},
        {64 * K: (("yarn", 16, 4096), ["is kept"]), 128 * K: (("yarn", 32, 4096), ["16 (65536", "32 (131072"])},
    ),
    "vicuna-7b-v1.5-16k": (
        {"max_position_embeddings": 4096, "max_sequence_length": 16384, "rope_scaling": {
            "factor": 4.0, "type": "linear"}},
        {16 * K: (("linear", 4, None), ["is kept"]), 32 * K: (("linear", 8, None), ["4 (16384", "8 (32768"])},
    ),
    "longchat-7b-v1.5-32k": (
        {"max_position_embeddings": 4096, "rope_scaling": {"factor": 8.0, "type": "linear"}},
        {4 * K: (("linear", 8, None), ["is kept"]), 64 * K: (("linear", 16, None), ["8 (32768", "taken as before"])},
    ),
    "LLaMA-2-7B-32K": (
        {"max_position_embeddings": 32768, "rope_scaling": {"factor": 8.0, "type": "linear"}},
        {32 * K: (("linear", 8, None), ["is kept"]), 64 * K: (("linear", 16, None), ["8 (32768", "taken as after"])},
    ),
    "deepseek-coder-6.7b-base": (
        {"max_position_embeddings": 16384, "rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {16 * K: (("linear", 4, None), ["is kept"]), 64 * K: (("linear", 16, None), ["4 (16384", "taken as after"])},
    ),
    "Qwen2.5-7B-Instruct": (
        {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0},
        {32 * K: (None, []), 128 * K: (None, ["window of 32768"])},
    ),
    "Qwen2.5-7B-Instruct, yarn as its page says": (
        {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rope_scaling": {
            "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
        {128 * K: (("yarn", 4, 32768), ["is kept"]), 256 * K: (("yarn", 8, 32768), ["4 (131072", "8 (262144"])},
    ),
    "Qwen3-8B, yarn as its page says": (
        {"model_type": "qwen3", "max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {128 * K: (("yarn", 4, 32768), ["is kept"]), 256 * K: (("yarn", 8, 32768), ["4 (131072", "8 (262144"])},
    ),
    "Mistral-7B-v0.3": (
        {"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None},
        {32 * K: (None, []), 64 * K: (None, ["window of 32768"])},
    ),
    "SmolLM2-1.7B": (
        {"max_position_embeddings": 8192, "rope_theta": 130000, "rope_scaling": None, "rope_interleaved": False},
        {64 * K: (None, ["window of 8192"])},
    ),
    "TinyLlama-1.1B": (
        {"max_position_embeddings": 2048, "rope_theta": 10000.0, "rope_scaling": None},
        {2 * K: (None, []), 8 * K: (None, ["window of 2048"])},
    ),
    "yarn with a temperature of its own, transformers 5": (
        {"max_position_embeddings": 163840, "rope_parameters": {
            "rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0,
            "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}},
        {160 * K: (("yarn", 40, 4096), ["is kept"]), 320 * K: (("yarn", 80, 4096), ["40 (163840", "80 (327680"])},
    ),
    "yarn whose window stands beside it": (
        {"max_position_embeddings": 32768, "original_max_position_embeddings": 8192, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384, "attention_factor": 1,
            "truncate": False, "beta_fast": None}},
        {32 * K: (("yarn", 4, 8192), ["is kept"])},
    ),
    "linear whose window stands inside, both names of the type": (
        {"max_position_embeddings": 32768, "rope_scaling": {
            "type": "linear", "rope_type": "linear", "factor": 2, "original_max_position_embeddings": 16384}},
        {64 * K: (("linear", 4, None), ["2 (32768", "4 (65536"])},
    ),
    "Llama-2-7b-chat-hf with dynamic scaling": (
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {4 * K: (None, ["has no effect at 4096"]), 16 * K: (("ntk", 7, None), ["ntk scaling by 7"])},
    ),
    "a Llama with the longrope of Phi-3-mini-128k": (
        {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": {
            "type": "longrope", "short_factor": [1.05] * 64, "long_factor": [1.03 + x for x in range(64)]}},
        {128 * K: (("longrope", 32, 4096), ["is kept"]), 256 * K: (("longrope", 64, 4096), ["64 (262144"])},
    ),
}  # fmt: skip
SIZES = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 128,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
CASES = [(name, target) for name, (_, targets) in MODELS.items() for target in targets]


def read(name: str):
    raw = copy.deepcopy(SIZES | MODELS[name][0])
    return raw, shape_from_config(copy.deepcopy(raw), Path("config.json"))


@pytest.mark.parametrize("name, target", CASES)
def test_rope_for_a_target(name, target):
    _, shape = read(name)
    flags = RopeFlags(target=target, window=2048)
    rope = choose_rope(flags, shape.rope(), head_dim=shape.kv_channels, default_theta=1e4)
    expected, words = MODELS[name][1][target]
    keys = ("rope_type", "factor", "original_max_position_embeddings")
    assert (rope.scaling and tuple(rope.scaling.get(key) for key in keys)) == expected
    text = "\n".join(rope.lines)
    assert bool(words) == bool(text) and not [word for word in words if word not in text], text


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_equal_transformers_before_and_after_export(name):
    raw, shape = read(name)
    ours = shape.rotary()
    exported = shape.hf_config(raw)
    for config in (raw, exported):
        theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**copy.deepcopy(config)))
        if shape.rope_scaling and shape.rope_scaling["rope_type"] == "longrope":  # starts with short factors
            theirs(torch.zeros(1), torch.tensor([[shape.max_position_embeddings - 1]]))
        assert torch.equal(ours.inv_freq, theirs.inv_freq) and ours.attention_factor == theirs.attention_scaling
    assert shape_from_config(exported, Path("config.json")).rope() == shape.rope()


def test_a_temperature_of_the_model_follows_its_formula():
    _, shape = read("yarn with a temperature of its own, transformers 5")
    flags = RopeFlags(target=320 * K, window=2048)
    rope = choose_rope(flags, shape.rope(), head_dim=128, default_theta=1e4)
    assert (rope.scaling["mscale"], rope.scaling["mscale_all_dim"]) == (1.0, 0.707)
    assert math.isclose(
        type(shape.rotary())(head_dim=128, max_position_embeddings=320 * K, rope_scaling=rope.scaling).attention_factor,
        (0.1 * math.log(80) + 1) / (0.0707 * math.log(80) + 1),
    )
