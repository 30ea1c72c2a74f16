"""Adapters against PEFT's: equal weights give equal losses and gradients, on one rank and on two."""

import functools
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.training import training
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from megatron_cream.checkpoint.adapters import settings_of
from megatron_cream.config import parse
from megatron_cream.optimizer import lora_plus
from tests.hf_models import relative, save_model, some_tokens
from tests.launch import torchrun, write_documents
from tests.model.lora_ranks import VARIANTS

RANKS = Path(__file__).with_name("lora_ranks.py")
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
TRAINED = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Write a model, a random adapter and a batch; return the folder, and what PEFT computes.

    That is the losses and gradients, and the losses without some of the targets.
    """
    folder = tmp_path_factory.mktemp("lora")
    base = save_model(folder / "hf", "llama-gqa-odd-vocabulary")
    options = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=TARGETS,
        modules_to_save=TRAINED,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, options).eval()
    model.save_pretrained(folder / "peft")
    tokens, ids = some_tokens(base)
    labels = torch.randint(0, base.config.vocab_size, tokens.shape, generator=torch.Generator().manual_seed(2))
    batch = {"tokens": tokens, "ids": ids, "labels": labels}
    torch.save(batch, folder / "batch.pt")
    expected = compute_gradients(model, batch)
    left_out = [name for name in TARGETS if name not in VARIANTS["some-targets"][1].targets]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name and any(target in name for target in left_out):
                weight.zero_()
        return folder, expected, losses_of(model, batch)


def compute_gradients(model, batch) -> dict[str, torch.Tensor]:
    """Return the losses and the gradient of each trained parameter of a PEFT model, by its name in an adapter."""
    losses = losses_of(model.double(), batch)  # in float64, so that only our rounding counts
    losses.sum().backward()
    expected = {"losses": losses.detach()}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            expected[name.replace(".modules_to_save.default", "").replace(".default", "")] = weight.grad
    return expected


@pytest.fixture(scope="module")
def variants(reference):
    """Return a function that runs lora_ranks.py on a number of ranks, once, and returns {variant: results}."""

    @functools.cache
    def compute(ranks):
        result = torchrun(ranks, reference[0], script=RANKS)
        assert result.returncode == 0, result.stderr[-3000:]
        found = {name: reference[0] / f"{name}.pt" for name in VARIANTS}
        return {name: torch.load(path) for name, path in found.items() if path.exists()}

    return compute


def losses_of(model, batch) -> torch.Tensor:
    """Return the loss of each token, [b, n]."""
    tokens, labels = batch["tokens"], batch["labels"]
    mask = torch.full((tokens.shape[1],) * 2, float("-inf"), dtype=torch.float64).triu(1)[None, None]
    mask = mask.expand(len(tokens), 1, -1, -1)
    logits = model(tokens, position_ids=batch["ids"], attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients(reference, variants, ranks):
    _, expected, fewer = reference
    for variant in ["all", "adapters-only", *["sequence-parallel"] * (ranks == 2)]:
        ours = variants(ranks)[variant]
        names = [name for name in expected if variant != "adapters-only" or "lora_" in name or name == "losses"]
        assert ours.keys() == set(names)
        for name in names:
            error = relative(ours[name].reshape(expected[name].shape), expected[name])
            assert error < (1e-5 if name == "losses" else 2e-5), f"{variant}: {name}: {error}"
    ours = variants(ranks)["some-targets"]
    assert relative(ours["losses"], fewer) < 1e-5
    assert 0.01 < relative(ours["dropped"], fewer) < 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients_on_frozen_weights_in_nf4(reference, variants, ranks):
    """PEFT computes the same on the unpacked weights, which are within NF4's error of the model's."""
    pytest.importorskip("torchao")
    folder = reference[0]
    for variant in ["nf4", *["nf4-sequence-parallel"] * (ranks == 2)]:
        ours = dict(variants(ranks)[variant])
        model = AutoModelForCausalLM.from_pretrained(folder / "hf")
        model = PeftModel.from_pretrained(model, folder / "peft", is_trainable=True).eval()
        for name, weight in model.named_parameters():
            if ".base_layer." in name:
                unpacked = ours.pop(name.replace(".base_layer", ""))
                assert 0.02 < relative(unpacked, weight) < 0.15, name
                weight.data = unpacked
        expected = compute_gradients(model, torch.load(folder / "batch.pt"))
        assert ours.keys() == expected.keys()
        for name in ours:
            error = relative(ours[name].reshape(expected[name].shape), expected[name])
            assert error < (1e-5 if name == "losses" else 3e-5), f"{variant}: {name}: {error}"


def test_settings_of_flags(reference, tmp_path):
    flags = "--seq-length 128 --micro-batch-size 1 --train-iters 2 --tokenizer-type NullTokenizer --lora-rank 8".split()
    flags += ["--data-path", str(write_documents(tmp_path / "data")), "--load-hf", str(reference[0] / "hf")]
    settings = settings_of(parse.read(flags))
    assert (settings.scale, settings.targets, settings.trained) == (2.0, tuple(TARGETS), ("embeddings", "norms"))
    flags += "--lora-targets v_proj,q_proj --lora-train none --lora-dropout 0.1 --lora-alpha 4".split()
    settings = settings_of(parse.read(flags))
    assert (settings.scale, settings.targets, settings.trained) == (0.5, ("q_proj", "v_proj"), ())
    assert settings.dropout == 0.1


def test_lora_plus_has_another_rate_for_b():
    lora_plus.install(4.0)
    overrides = training.get_standard_config_overrides(config=OptimizerConfig(lr=1e-3, min_lr=1e-4))
    lora_plus.install(None)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    rates = {
        letter: [
            each
            for key, each in overrides.items()
            if key.matches(weight, f"decoder.layers.0.lora.linear_qkv.q_proj_{letter}")
        ]
        for letter in "AB"
    }
    assert rates == {"A": [], "B": [{"max_lr": 4e-3, "min_lr": 4e-4}]}
