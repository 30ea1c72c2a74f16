"""Packed samples against their documents one by one: losses and gradients, and the layout for kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.model.packed_attention import Documents, attend_by_bounds, attend_each_document
from tests.model.test_llama import VOCABULARY, WINDOW, megatron_llama, one_rank

__all__ = ["one_rank"]  # a fixture


@pytest.fixture(scope="module")
def llama(one_rank):
    scaling = {"rope_type": "linear", "factor": 4.0}
    return megatron_llama(one_rank, kv_heads=2, tied=False, backend="sdpa", scaling=scaling)


def draw_sample(rng: np.random.Generator, ends: list[int]) -> dict[str, torch.Tensor]:
    """Return tokens, positions and document starts of a sample of WINDOW tokens."""
    starts, positions = torch.zeros(WINDOW, dtype=torch.long), torch.zeros(WINDOW, dtype=torch.long)
    for first, last in zip((0, *ends), ends):
        starts[first], positions[first:last] = 1, torch.arange(last - first)
    tokens, labels = (torch.from_numpy(rng.integers(0, VOCABULARY, WINDOW)) for _ in range(2))
    return {"tokens": tokens, "labels": labels, "positions": positions, "starts": starts}


def packed_losses(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    documents = Documents.read(batch["starts"])
    return model(batch["tokens"], batch["positions"], None, labels=batch["labels"], packed_seq_params=documents)


def losses_one_by_one(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = []
    for i, starts in enumerate(batch["starts"]):
        firsts = starts.nonzero()[:, 0].tolist()
        parts = [slice(first, last) for first, last in zip(firsts, (*firsts[1:], WINDOW))]
        names = ("tokens", "positions", "labels")
        pieces = [[batch[name][i : i + 1, part] for name in names] for part in parts]
        rows.append(torch.cat([model(tokens, ids, None, labels=labels) for tokens, ids, labels in pieces], dim=1))
    return torch.cat(rows)


documents_of_a_sample = st.sets(st.integers(1, WINDOW - 1), max_size=8).map(lambda cuts: [*sorted(cuts), WINDOW])


@settings(max_examples=15, deadline=None)
@given(ends=st.lists(documents_of_a_sample, min_size=1, max_size=3), seed=st.integers(0, 100))
def test_losses_equal_those_of_the_documents_one_by_one(llama, ends, seed):
    rng = np.random.default_rng(seed)
    samples = [draw_sample(rng, of_sample) for of_sample in ends]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    with torch.no_grad():
        torch.testing.assert_close(packed_losses(llama, batch), losses_one_by_one(llama, batch), rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_the_documents_one_by_one(llama):
    rng = np.random.default_rng(0)
    samples = [draw_sample(rng, ends) for ends in ([7, 8, 30, WINDOW], [WINDOW])]  # a packed and a long one
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    gradients = []
    for losses in (packed_losses, losses_one_by_one):
        llama.zero_grad()
        losses(llama, batch).mean().backward()
        gradients.append([parameter.grad.clone() for parameter in llama.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def attend(query, key, value):
    """Return causal attention aligned at the end, of [s, b, n, d] and one key head a query head."""
    scores = torch.einsum("sbnd,tbnd->bnst", query, key)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + key.shape[0] - query.shape[0])
    return torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)


def attend_between(query, key, value, bounds):
    """Stand in for a kernel of variable length."""
    pairs = zip(bounds.queries[:-1], bounds.queries[1:], bounds.keys[:-1], bounds.keys[1:], strict=True)
    parts = [attend(*(x[:, None] for x in (query[a:b], key[c:d], value[c:d])))[:, 0] for a, b, c, d in pairs]
    assert max(len(part) for part in parts) == bounds.longest_queries
    assert max(bounds.keys.diff()) == bounds.longest_keys
    return torch.cat(parts)


@settings(max_examples=30, deadline=None)
@given(ends=st.lists(documents_of_a_sample, min_size=1, max_size=2), piece=st.integers(0, 3), length=st.integers(1, 4))
def test_kernels_of_variable_length_get_the_same_documents(ends, piece, length):
    """Also for a chunk of the queries, as context-parallel ranks have it."""
    torch.manual_seed(piece)
    begin, end = 12 * piece, min(12 * (piece + length), WINDOW)
    documents = Documents(ends=tuple(map(tuple, ends)))
    query, key, value = (torch.randn(WINDOW, len(ends), 2, 4, dtype=torch.float64) for _ in range(3))
    whole = attend_each_document(attend, documents, query, key, value)
    chunk = query[begin:end], key[:end], value[:end]
    for result in (
        attend_each_document(attend, documents, *chunk),
        attend_by_bounds(attend_between, documents, *chunk),
    ):
        torch.testing.assert_close(result, whole[begin:end], rtol=1e-12, atol=1e-12)
