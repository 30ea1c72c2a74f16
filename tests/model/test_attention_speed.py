"""The attention that `auto` chooses from given times; training/test_gpu.py measures real times."""

import itertools

import pytest
import torch

from megatron_cream.distributed import rendezvous
from megatron_cream.model import attention, attention_speed
from megatron_cream.model.attention import choose_backend, list_alternatives
from megatron_cream.model.attention_speed import Shape

SHAPE = Shape(tokens=4096, samples=2, heads=32, groups=32, head_dim=128, dtype=torch.bfloat16)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that every attention is installed, and return the alternatives."""
    monkeypatch.setattr(attention, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(attention, "find_flash_attention", lambda: print)
    return list_alternatives(choose_backend("auto", has_cuda=True, half=True), half=True)


def test_installed_kernels_are_compared_in_the_same_layers(installed, monkeypatch):
    assert [each.name for each in installed] == ["flash", "te", "sdpa"]
    assert {each.transformer_engine for each in installed} == {True}
    assert installed[1].te_kernel == "fused"  # Transformer Engine must not use flash-attn 4
    float32 = list_alternatives(choose_backend("auto", has_cuda=True, half=False), half=False)
    assert [each.name for each in float32] == ["te", "sdpa"]
    monkeypatch.setattr(attention, "has_transformer_engine", lambda: False)
    without = list_alternatives(choose_backend("auto", has_cuda=True, half=True), half=True)
    assert [(each.name, each.transformer_engine) for each in without] == [("flash", False), ("sdpa", False)]
    monkeypatch.setattr(attention, "find_flash_attention", lambda: None)
    assert len(list_alternatives(choose_backend("auto", has_cuda=True, half=True), half=True)) == 1


@pytest.mark.parametrize(
    "times, name",
    [
        ((2.0, 1.9, 2.5), "te"),
        ((2.0, 1.95, 2.5), "flash"),  # too close: another start might measure the opposite
        ((2.0, None, 1.0), "sdpa"),
        ((None, 3.0, 3.0), "te"),
        ((None, None, None), "flash"),
    ],
)
def test_the_fastest_by_more_than_the_margin_is_taken(installed, monkeypatch, times, name):
    by_name = dict(zip(("flash", "te", "sdpa"), times, strict=True))
    monkeypatch.setattr(attention_speed, "measure", lambda candidates, shape: by_name)
    chosen = attention_speed.choose_fastest(installed, SHAPE)
    assert chosen.name == name
    assert chosen.te_kernel == {each.name: each.te_kernel for each in installed}[name]
    for each, value in by_name.items():
        assert f"{each} {'failed' if value is None else f'{value:.2f} ms'}" in str(chosen)


def test_small_work_is_not_measured_and_long_sequences_only_in_part(installed, monkeypatch):
    measured = []
    monkeypatch.setattr(
        attention_speed, "measure", lambda _, shape: measured.append(shape.tokens) or dict.fromkeys(("flash",), 1.0)
    )
    small = attention_speed.choose_fastest(installed, Shape(512, 2, 8, 8, 64, torch.bfloat16))
    assert small.name == "flash" and "too little work" in small.reason and not measured
    assert attention_speed.choose_fastest(installed[:1], SHAPE) == installed[0] and not measured
    attention_speed.choose_fastest(installed[:1] * 2, Shape(262144, 1, 32, 32, 128, torch.bfloat16))
    assert measured == [8192]


def test_every_rank_takes_what_rank_0_measured(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(rendezvous, "open_store", lambda: store)
    heard = []
    for rank in range(3):
        monkeypatch.setattr(rendezvous, "_exchange_numbers", itertools.count())
        monkeypatch.setenv("RANK", str(rank))
        heard.append([rendezvous.broadcast_from_rank_0(f"{rank} {time}") for time in ("first", "second")])
    assert heard == [["0 first", "0 second"]] * 3


def test_transformer_engines_kernel_is_named_only_while_it_is_measured(monkeypatch):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")
    monkeypatch.delenv("NVTE_FUSED_ATTN", raising=False)
    with attention_speed._select_te_kernel("fused"):
        names = [attention_speed.os.environ[f"NVTE_{kernel}_ATTN"] for kernel in ("FLASH", "FUSED", "UNFUSED")]
        assert names == ["0", "1", "0"]
    assert attention_speed.os.environ["NVTE_FLASH_ATTN"] == "1" and "NVTE_FUSED_ATTN" not in attention_speed.os.environ
