"""Sliding-window perplexity against one forward pass per token, and the key tokens of LongPPL."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation import conventions
from megatron_cream.evaluation.longppl import KeyTokenRule, find_key_spans, find_key_tokens, find_tokens_in_spans
from megatron_cream.evaluation.models.hf_model import HfModel
from megatron_cream.evaluation.models.tokenizer import open_tokenizer
from megatron_cream.evaluation.runner import summarise_perplexity
from megatron_cream.evaluation.sliding_window import Document, iterate_windows, read_texts, select_long_documents
from tests.evaluation_models import save_tokenizer
from tests.hf_models import save_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, which is fastest for small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def window_and_stride(most: int):
    return st.integers(1, most).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window)))


def context_of(token: int, window: int, stride: int) -> int:
    """Return the start of a token's context: the first multiple of the stride within `window` tokens of it."""
    begin = 0
    while token - begin > window:
        begin += stride
    return begin


@given(length=st.integers(1, 200), window_stride=window_and_stride(60))
def test_each_token_is_scored_once_with_the_most_context(length, window_stride):
    window, stride = window_stride
    scored = {}
    for begin, first, end in iterate_windows(length, window, stride):
        assert begin < first < end <= length and end - 1 - begin <= window
        for token in range(first, end):
            assert token not in scored
            scored[token] = begin
    assert scored == {token: context_of(token, window, stride) for token in range(1, length)}
    assert all(token - begin >= min(token, window - stride + 1) for token, begin in scored.items())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    theirs = save_model(folder, "llama-gqa-odd-vocabulary")
    common = dict(dtype=torch.float32, tokenizer=None, stop_ids=frozenset(), max_positions=512)
    return theirs, HfModel(folder, prefill_chunk=7, **common)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, 24), window_stride=window_and_stride(20), seed=st.integers(0, 1000))
def test_log_probs_are_those_of_each_context_alone(llama, length, window_stride, seed):
    theirs, model = llama
    window, stride = window_stride
    tokens = torch.randint(0, 1003, (length,), generator=torch.Generator().manual_seed(seed))
    expected = []
    for token in range(1, length):
        context = tokens[context_of(token, window, stride) : token]
        with torch.inference_mode():
            expected.append(theirs(context[None]).logits[0, -1].log_softmax(-1)[tokens[token]])
    ours = conventions.log_probs("ours", model, tokens.tolist(), window, stride)
    assert torch.allclose(ours, torch.stack(expected), atol=2e-4)


class ByContext:
    """A LanguageModel whose log-probabilities are a function of the token and its context length."""

    def __init__(self, function, tokenizer=None):
        self.function, self.tokenizer = function, tokenizer

    def log_probs(self, tokens, start):
        values = [self.function(int(tokens[0, i]), i) for i in range(start, tokens.shape[1])]
        return torch.tensor([values], dtype=torch.float32)


def gain_of_context(token: int, context: int) -> float:
    """Return a log-probability that rises with context for some tokens and falls for others, without ties."""
    return -3.7 + (token % 7) * 0.3 + (token % 5 - 1) * 0.0131 * context


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(2, 300),
    short=st.integers(1, 60),
    block=st.integers(1, 80),
    alpha=st.floats(-1, 3),
    beta=st.floats(-4, 1),
)
def test_key_tokens_are_those_of_the_definition(length, short, block, alpha, beta):
    """Key tokens gain more than alpha over the short context, and exceed beta with the full context.

    The short context has from `short` to `short + block - 1` tokens.
    """
    tokens = list(range(length))
    long = torch.tensor([gain_of_context(t, t) for t in tokens[1:]], dtype=torch.float32)
    ours = find_key_tokens(ByContext(gain_of_context), tokens, long, KeyTokenRule(alpha, beta, short, block))
    for token in tokens[1:]:
        context = short + (token - short) % block
        with_short = torch.tensor(gain_of_context(token, context), dtype=torch.float32)
        expected = token >= short and bool(long[token - 1] - with_short > alpha) and bool(long[token - 1] > beta)
        assert bool(ours[token - 1]) == expected, token


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return two tokenizers with different vocabularies."""
    folders = [tmp_path_factory.mktemp("tokenizer") for _ in range(2)]
    save_tokenizer(folders[0])
    save_tokenizer(folders[1], vocabulary=600)
    return [open_tokenizer(folder, flag="") for folder in folders]


TEXT = "The quick brown fox, aged 7½ years, jumps.\n\tdef naïve(x): return x ** 2  # 東京\n" * 6


def test_spans_are_where_tokens_lie(tokenizers):
    """Spans are in order and cover the text except whitespace; each decoded token equals its span."""
    for tokenizer in tokenizers:
        ids, spans = tokenizer.encode(TEXT), tokenizer.token_spans(TEXT)
        assert len(spans) == len(ids) and spans == sorted(spans)
        covered = {i for start, end in spans for i in range(start, end)}
        assert all(i in covered or TEXT[i].isspace() for i in range(len(TEXT)))
        for token, (start, end) in zip(ids, spans, strict=True):
            said = tokenizer.decode([token])
            assert said.strip() == TEXT[start:end].strip() or "\ufffd" in said


def test_key_tokens_of_a_model_with_another_tokenizer(tokenizers):
    """Our key tokens are those within the spans of the other model's key tokens; with one tokenizer, all of them."""
    rule = KeyTokenRule(alpha=0.5, beta=-3.0, short_context=10, block=7)
    for mine in tokenizers:
        document = Document("d", TEXT, mine.encode_prompt(TEXT)[:120])
        where = mine.token_spans(TEXT)[:119]
        for other in tokenizers:
            model = ByContext(gain_of_context, other)
            spans = find_key_spans(model, document, mine, rule)
            read = other.encode_prompt(TEXT[: where[-1][1]])
            long = model.log_probs(torch.tensor([read]), 1)[0]
            own = find_key_tokens(model, read, long, rule).tolist()
            characters = {
                i for (a, b), key in zip(other.token_spans(TEXT), own, strict=False) if key for i in range(a, b)
            }
            assert {i for a, b in spans for i in range(a, b)} == characters and characters
            assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
            ours = find_tokens_in_spans(document, mine, spans).tolist()
            assert ours == [a < b and characters.issuperset(range(a, b)) for a, b in where]
            assert any(ours) and not all(ours)
            if other is mine:
                assert all(told for told, key in zip(ours, own, strict=True) if key)


def test_documents_are_the_first_long_ones(tmp_path, tokenizers):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "{"word " * n}"}}\n' for n in (5, 500, 20, 300, 400)))
    tokenizer = tokenizers[0]

    def documents(**options):
        return select_long_documents(tokenizer, read_texts([file], "text"), **options)

    found = documents(minimum=100, longest=150, most=2)
    assert [document.name for document in found] == [f"{file}:2", f"{file}:4"]
    for document in found:
        assert document.tokens == tokenizer.encode_prompt(document.text)[:150] and document.tokens[0] == tokenizer.bos
    assert len(documents(minimum=1, longest=10, most=100)) == 5
    with pytest.raises(UsageError, match="--min-tokens 10000: none of the 5 documents"):
        documents(minimum=10_000, longest=10_000, most=2)


def test_perplexities_are_over_all_tokens():
    """Perplexity is exp of the mean over all tokens, not a mean over documents."""
    records = [
        {"lengths": {"8": {"nll": 10.0, "tokens": 5, "key_nll": 4.0, "key_tokens": 2}}},
        {"lengths": {"8": {"nll": 1.0, "tokens": 6, "key_nll": 0.0, "key_tokens": 0}}},
    ]
    assert summarise_perplexity(records) == {
        "8": {"perplexity": math.exp(1.0), "tokens": 11, "longppl": math.exp(2.0), "key_tokens": 2}
    }
    none = [{"lengths": {"8": {"nll": 1.0, "tokens": 6, "key_nll": 0.0, "key_tokens": 0}}}]
    assert summarise_perplexity(none)["8"]["longppl"] is None
