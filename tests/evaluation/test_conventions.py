"""Perplexity by each convention, and LongPPL, against the authors' formulas applied to transformers' losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_cream.evaluation import conventions
from megatron_cream.evaluation.longppl import KeyTokenRule
from megatron_cream.evaluation.models.hf_model import HfModel
from megatron_cream.evaluation.models.tokenizer import open_tokenizer
from megatron_cream.evaluation.results import open_results
from megatron_cream.evaluation.runner import PerplexitySettings, run_perplexity, summarise_perplexity
from megatron_cream.evaluation.sliding_window import Document
from tests.evaluation_models import save_llama

TEXT = "def naive(x): return x ** 2  # The quick brown fox, aged 7 years, jumps over it.\n" * 4
LENGTHS, STRIDE = [20, 33, 60], 7


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return transformers' model, our model and a document that starts with BOS."""
    folder = save_llama(tmp_path_factory.mktemp("llama") / "hf")
    tokenizer = open_tokenizer(folder, flag="--model")
    common = dict(dtype=torch.float32, stop_ids=frozenset(), max_positions=2048, prefill_chunk=16)
    document = Document("d", TEXT, tokenizer.encode_prompt(TEXT)[: LENGTHS[-1]])
    assert len(document.tokens) == LENGTHS[-1] and document.tokens[0] == tokenizer.bos
    return AutoModelForCausalLM.from_pretrained(folder), HfModel(folder, tokenizer=tokenizer, **common), document


def losses(model, ids: list[int]) -> torch.Tensor:
    """Return the losses of ids[1:] from one forward pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def measure(llama, tmp_path, convention: str, rule: KeyTokenRule | None = None, longppl_bos: bool = False) -> dict:
    _, model, document = llama
    with open_results(tmp_path, settings={}, model={}, model_path=tmp_path, overwrite=False) as results:
        records = run_perplexity(
            lambda: model,
            [document],
            settings=PerplexitySettings(convention, LENGTHS, STRIDE, rule, longppl_bos),
            key={},
            results=results,
        )
    return summarise_perplexity(records)


def test_cream_is_one_window_of_the_first_tokens(llama, tmp_path):
    """The window is BOS and the first W - 1 tokens; all of them are scored."""
    theirs, _, document = llama
    found = measure(llama, tmp_path, "cream")
    for length in LENGTHS:
        ids = torch.tensor([document.tokens[:length]])
        with torch.inference_mode():
            expected = math.exp(theirs(ids, labels=ids).loss.item())
        assert found[str(length)]["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert found[str(length)]["tokens"] == length - 1


def test_pose_has_a_bos_before_each_window(llama, tmp_path):
    """A window is BOS and W - 1 tokens; it scores the tokens that no earlier window contains."""
    theirs, _, document = llama
    bos, text = document.tokens[0], document.tokens[1:]
    found = measure(llama, tmp_path, "pose")
    for length in LENGTHS:
        total, begin, done = 0.0, 0, 0
        while done < len(text):
            end = min(begin + length - 1, len(text))
            total += losses(theirs, [bos, *text[begin:end]])[done - end :].sum().item()
            begin, done = begin + STRIDE, end
        assert found[str(length)]["tokens"] == len(text)
        assert found[str(length)]["perplexity"] == pytest.approx(math.exp(total / len(text)), rel=1e-4)


def test_conventions_differ_but_at_the_whole_text(llama, tmp_path):
    values = [measure(llama, tmp_path / name, name) for name in conventions.CONVENTIONS]
    for length in LENGTHS:
        different = {round(value[str(length)]["perplexity"], 3) for value in values}
        assert len(different) == (1 if length == LENGTHS[-1] else 3)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 60), window=st.integers(2, 30), data=st.data())
def test_which_tokens_pose_and_cream_score(n, window, data):
    """The contexts equal those of the definition, token by token."""
    stride = data.draw(st.integers(1, window - 1))
    text = list(range(1, n))
    scored = {}
    for ids, start in conventions.iterate_contexts("pose", [0, *text], window, stride):
        assert ids[0] == 0 and len(ids) <= window
        for place in range(start, len(ids)):
            assert ids[place] not in scored
            scored[ids[place]] = ids[:place]
    for i, token in enumerate(text):
        begin = next(b for b in range(0, n, stride) if i - b <= window - 2)
        assert scored.pop(token) == [0, *text[begin:i]]
    assert not scored
    assert list(conventions.iterate_contexts("cream", [0, *text], window, stride)) == [([0, *text][:window], 1)]


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("convention", conventions.CONVENTIONS)
def test_longppl_scores_without_a_bos_as_published(llama, tmp_path, convention, with_bos):
    """Key tokens are found with BOS; their losses are computed without BOS unless --longppl-bos is given."""
    theirs, _, document = llama
    bos, text = document.tokens[0], document.tokens[1:]
    rule = KeyTokenRule(alpha=0.005, beta=-9.0, short_context=16, block=9)  # larger than rounding errors
    read = [bos, *text]
    with_long, key = losses(theirs, read), []
    for token in range(rule.short_context, len(read)):
        begin = (token - rule.short_context) // rule.block * rule.block
        with_short = losses(theirs, read[begin : token + 1])[-1]
        if with_short - with_long[token - 1] > rule.alpha and with_long[token - 1] < -rule.beta:
            key.append(token - 1)  # its index in the text without BOS
    assert 5 < len(key) < len(text) - rule.short_context
    of_text = with_long if with_bos else torch.cat([torch.zeros(1), losses(theirs, text)])
    found = measure(llama, tmp_path, convention, rule, with_bos)[str(LENGTHS[-1])]
    assert found["key_tokens"] == len(key)
    assert found["longppl"] == pytest.approx(math.exp(of_text[key].mean().item()), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(with_long.mean().item()), rel=1e-4)  # always with BOS
