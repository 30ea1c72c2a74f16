"""Generation and log-probabilities of both engines, against transformers' full forward pass and each other."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_cream.checkpoint.convert import export_hf, import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.evaluation.models import generation
from megatron_cream.evaluation.models.hf_model import HfModel
from megatron_cream.evaluation.models.megatron_model import MegatronModel
from megatron_cream.model.rotary import build_rope_scaling
from tests.hf_models import save_model
from tests.process_groups import leave_process_group

GREEDY = dict(temperature=0.0, top_p=1.0)
# Very different lengths, one shorter than a chunk, so that some chunks are only padding.
LENGTHS = (41, 3, 17, 41)
SCALINGS = {
    "llama-gqa-odd-vocabulary": ("linear", 8.0),
    "llama-mha": ("yarn", 8.0),
    "qwen3": ("ntk", 8.0),
}


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    yield
    leave_process_group()


@pytest.fixture(scope="module", params=SCALINGS)
def pair(request, tmp_path_factory):
    """Return {engine: open(chunk)} for one model with scaled positions, and its export in transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder / "hf", request.param)
    import_hf(HfFolder(folder / "hf"), folder / "ckpt")
    checkpoint = MegatronCheckpoint(folder / "ckpt")
    scaling = build_rope_scaling(*SCALINGS[request.param], 512)
    checkpoint.shape = replace(checkpoint.shape, rope_scaling=scaling, max_position_embeddings=4096)
    export_hf(checkpoint, folder / "out")
    common = dict(dtype=torch.float32, tokenizer=None, stop_ids=frozenset(), max_positions=4096)
    engines = {
        "transformers": lambda chunk: HfModel(folder / "out", prefill_chunk=chunk, **common),
        "megatron": lambda chunk: MegatronModel(checkpoint, prefill_chunk=chunk, **common),
    }
    return engines, AutoModelForCausalLM.from_pretrained(folder / "out", attn_implementation="eager").eval()


def some_prompts(theirs, lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, theirs.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def greedy_by_full_forward(theirs, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Return greedy tokens and their logits [count, vocabulary], computed without a cache."""
    ids, logits = list(prompt), []
    for _ in range(count):
        with torch.inference_mode():
            logits.append(theirs(torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


class Recorded:
    """A CachedBatch that records its logits, [b, vocabulary] per call."""

    def __init__(self, batch):
        self.batch, self.logits = batch, []

    def prefill(self, prompts):
        self.logits.append(self.batch.prefill(prompts))
        return self.logits[-1]

    def step(self, tokens):
        self.logits.append(self.batch.step(tokens))
        return self.logits[-1]


@pytest.mark.parametrize("engine", ["transformers", "megatron"])
def test_greedy_is_that_of_the_full_forward(pair, engine, monkeypatch):
    """In a batch of unequal lengths, read in chunks, tokens are equal and logits agree within 1e-4 at each step."""
    engines, theirs = pair
    model, recorded, original = engines[engine](16), [], generation.generate

    def record(batch, *args, **kwargs):
        recorded.append(Recorded(batch))
        return original(recorded[-1], *args, **kwargs)

    monkeypatch.setattr(generation, "generate", record)
    prompts = some_prompts(theirs)
    outputs = model.generate(prompts, 6, seeds=[0] * len(prompts), **GREEDY)
    for i, prompt in enumerate(prompts):
        tokens, logits = greedy_by_full_forward(theirs, prompt, 6)
        assert outputs[i] == tokens
        ours = torch.stack([step[i] for step in recorded[0].logits])
        assert torch.allclose(ours, logits, atol=1e-4 * logits.abs().max().item(), rtol=0)


@pytest.mark.parametrize("engine", ["transformers", "megatron"])
@pytest.mark.parametrize("sampling", [GREEDY, dict(temperature=1.3, top_p=0.9)], ids=["greedy", "sampled"])
def test_neither_batch_nor_chunks_change_an_answer(pair, engine, sampling):
    engines, theirs = pair
    prompts, seeds = some_prompts(theirs), [11, 12, 13, 14]
    one = engines[engine](4096)
    together = one.generate(prompts, 8, seeds=seeds, **sampling)
    assert together == [
        one.generate([prompt], 8, seeds=[seed], **sampling)[0] for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert together == engines[engine](5).generate(prompts, 8, seeds=seeds, **sampling)
    assert together[0] != together[3]
    if sampling["temperature"]:
        assert together != one.generate(prompts, 8, seeds=[seed + 1 for seed in seeds], **sampling)


@pytest.mark.parametrize("engine", ["transformers", "megatron"])
def test_log_probs_are_those_of_the_full_forward(pair, engine):
    engines, theirs = pair
    tokens = torch.tensor(some_prompts(theirs, (64, 64)))
    with torch.inference_mode():
        expected = theirs(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    for chunk in (7, 16, 63, 4096):
        model = engines[engine](chunk)
        for start in (1, 2, 16, 17, 40, 63):
            ours = model.log_probs(tokens, start)
            assert ours.dtype == torch.float32 and ours.shape == (2, 64 - start)
            assert torch.allclose(ours, expected[:, start - 1 :], atol=2e-4), (chunk, start)


def test_positions_far_beyond_the_window(pair):
    """At 3,900 of 4,096 positions, read in chunks, both engines agree with the full forward pass."""
    engines, theirs = pair
    tokens = torch.tensor(some_prompts(theirs, (3900,)))
    with torch.inference_mode():
        logits = theirs(tokens[:, :-1], logits_to_keep=20).logits
    expected = logits.log_softmax(-1).gather(-1, tokens[:, -20:, None]).squeeze(-1)
    for open_model in engines.values():
        assert torch.allclose(open_model(1024).log_probs(tokens, 3880), expected, atol=2e-3)


def test_an_answer_ends_before_a_stop_token(pair):
    engines, theirs = pair
    prompts = some_prompts(theirs)
    model = engines["transformers"](4096)
    answers = model.generate(prompts, 6, seeds=[0] * 4, **GREEDY)
    stop = answers[0][3]
    model._stop_ids = {stop}
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in answers]
    assert model.generate(prompts, 6, seeds=[0] * 4, **GREEDY) == expected and len(expected[0]) <= 3


class Fixed:
    """A CachedBatch that always returns the same logits [b, vocabulary]."""

    def __init__(self, logits):
        self.logits = logits

    def prefill(self, prompts):
        return self.logits.expand(len(prompts), -1)

    def step(self, tokens):
        return self.logits.expand(len(tokens), -1)


def draw(logits, count: int, temperature: float, top_p: float, seed: int = 0) -> list[int]:
    outputs = generation.generate(
        Fixed(torch.tensor(logits)), [[0]], count, stop_ids=(), temperature=temperature, top_p=top_p, seeds=[seed]
    )
    return outputs[0]


def test_draws_follow_the_probabilities():
    """A chi-square test of 8,000 draws accepts the softmax at a temperature, with and without top_p."""
    from scipy.stats import chisquare

    logits = [2.0, 0.0, 1.0, -1.0, 0.5]
    scaled = torch.tensor(logits, dtype=torch.float64).div(0.7).softmax(-1)
    drawn = torch.tensor(draw(logits, 8_000, 0.7, 1.0)).bincount(minlength=5).numpy()
    assert chisquare(drawn, (scaled * 8_000).numpy()).pvalue > 1e-4
    # The probabilities 0.72 and 0.17 together exceed top_p 0.8, so two tokens are kept.
    kept = scaled * torch.tensor([1, 0, 1, 0, 0])
    drawn = torch.tensor(draw(logits, 8_000, 0.7, 0.8)).bincount(minlength=5)
    assert drawn[[1, 3, 4]].sum() == 0
    assert chisquare(drawn[[0, 2]].numpy(), (kept / kept.sum() * 8_000)[[0, 2]].numpy()).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8),
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 2**56),
)
def test_a_drawn_token_is_among_the_likeliest(logits, temperature, top_p, seed):
    probabilities = torch.tensor(logits, dtype=torch.float32).double().div(temperature).softmax(-1).tolist()
    for token in draw(logits, 5, temperature, top_p, seed):
        likelier = math.fsum(p for p in probabilities if p > probabilities[token])
        assert likelier < top_p + 1e-9


def test_seeds_of_examples():
    seeds = {generation.derive_seed(seed, name) for seed in range(10) for name in ("a", "b", "needle/1024")}
    assert len(seeds) == 30 and all(0 <= seed < 2**63 for seed in seeds)
    assert generation.derive_seed(1, "a") == generation.derive_seed(1, "a")


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [8, 2])
def test_engines_agree_in_bf16(tmp_path, groups):
    """On a GPU in bf16, both engines agree with float32 on the CPU, within rounding.

    Heads of 128, 6,000 tokens in chunks: the log-probabilities agree. In a batch of unequal prompts, each generated
    token is about the likeliest one in float32.
    """
    options = dict(hidden_size=1024, num_attention_heads=8, num_key_value_heads=groups, max_position_embeddings=8192)
    theirs = save_model(tmp_path / "hf", "llama-mha", **options)
    import_hf(HfFolder(tmp_path / "hf"), tmp_path / "ckpt")
    common = dict(dtype=torch.bfloat16, prefill_chunk=1024, tokenizer=None, stop_ids=frozenset(), max_positions=8192)
    tokens = torch.tensor(some_prompts(theirs, (6000,)))
    with torch.inference_mode():
        logits = theirs(tokens[:, :-1], logits_to_keep=300).logits
    expected = logits.log_softmax(-1).gather(-1, tokens[:, -300:, None]).squeeze(-1)
    prompts = some_prompts(theirs, (3000, 700, 2999))
    for model in (HfModel(tmp_path / "hf", **common), MegatronModel(MegatronCheckpoint(tmp_path / "ckpt"), **common)):
        difference = (model.log_probs(tokens, 5700) - expected).abs()
        assert difference.mean() < 0.1 * expected.abs().mean()
        answers = model.generate(prompts, 8, seeds=[0] * 3, **GREEDY)
        for prompt, answer in zip(prompts, answers, strict=True):
            with torch.inference_mode():
                logits = theirs(torch.tensor([[*prompt, *answer[:-1]]]), logits_to_keep=8).logits[0]
            missed = logits.max(-1).values - logits.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)
            assert missed.mean() < 0.2 * logits.std() and missed.max() < logits.std(), missed  # random tokens: 3 std
