"""Tests of packed short texts: whole documents, each once an epoch; exact shares of a mixture."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_cream.common.errors import UsageError
from megatron_cream.data.dataset import LongDocumentDataset, LongDocumentDatasetConfig
from megatron_cream.data.mixed_dataset import Mix, MixedDataset
from megatron_cream.data.order import permute, permute_range
from megatron_cream.data.packed_dataset import PackedDocumentDataset
from megatron_cream.data.packing import Packing
from megatron_cream.data.repeated_blend import repeat_if_short
from megatron_cream.data.usage import Usage
from megatron_cream.model.packed_attention import Documents

N = 96


def read_epoch(packing: Packing, epoch: int, seed: int = 7) -> list[tuple[int, ...]]:
    first = epoch * packing.samples
    return [tuple(packing.sample_documents(first + i, seed)) for i in range(packing.samples)]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=120), window=st.integers(2, 50), epoch=st.integers(0, 3))
def test_every_document_that_fits_is_in_one_sample_of_an_epoch(lengths, window, epoch):
    lengths = np.array(lengths, dtype=np.int32)
    packing = Packing(lengths, window)
    samples = read_epoch(packing, epoch)
    fits = np.flatnonzero((lengths >= 2) & (lengths <= window))
    assert sorted(document for sample in samples for document in sample) == list(fits)
    assert all(0 < lengths[list(sample)].sum() <= window for sample in samples)
    totals = packing.totals
    assert (totals.documents, totals.tokens) == (len(fits), lengths[fits].sum())
    assert (totals.too_short, totals.too_long) == ((lengths < 2).sum(), (lengths > window).sum())
    # Best fit: no two samples could be one.
    totals = sorted(lengths[list(sample)].sum() for sample in samples)
    assert len(totals) < 2 or totals[0] + totals[1] > window


def test_documents_get_new_neighbours_each_epoch_and_little_padding():
    lengths = np.random.default_rng(0).integers(2, 80, size=3000).astype(np.int32)
    packing = Packing(lengths, N)
    first, second = (set(read_epoch(packing, epoch)) for epoch in (0, 1))
    assert len(first & second) < 0.1 * len(first)
    assert packing.totals.padding < 0.1 and packing.totals.padding == 1 - lengths.sum() / (packing.samples * N)
    squares = [lengths[list(sample)].astype(np.int64) @ lengths[list(sample)] for sample in first]
    assert packing.totals.mean_context == pytest.approx(sum(squares) / (packing.samples * N))


def write(path, lengths, base=0, mask=False) -> str:
    """Write documents whose tokens tell where they come from: token i of document d is base + 200 d + i."""
    names = [path, f"{path}_loss_mask"] if mask else [path]
    for name in names:
        builder = IndexedDatasetBuilder(f"{name}.bin", dtype=np.int32 if name == path else np.uint8)
        for d, length in enumerate(lengths):
            tokens = torch.arange(base + 200 * d, base + 200 * d + length)
            builder.add_document(tokens if name == path else tokens % 3 == 0, [length])
        builder.finalize(f"{name}.idx")
    return str(path)


def build(kind, samples, prefixes, weights=None, **options):
    config = LongDocumentDatasetConfig(
        random_seed=5,
        sequence_length=N,
        blend_per_split=[(prefixes, weights), None, None],
        split=None,
        sampler=dict(name="pi", window=N, target=N),
        mark_documents=True,
        **options,
    )
    return BlendedMegatronDatasetBuilder(kind, [samples, 0, 0], lambda: True, config).build()[0]


LENGTHS = [*np.random.default_rng(1).integers(2, 97, size=40).tolist(), 0, 1, 97, 200]


@pytest.mark.parametrize("mask", [False, True])
def test_samples_hold_whole_documents(tmp_path, mask):
    packed = build(PackedDocumentDataset, 60, [write(tmp_path / "short", LENGTHS, mask=mask)], eod_token=203)
    seen = []
    for index in range(packed.packing.samples):
        item = packed[index]
        assert {name: value.shape for name, value in item.items() if value.ndim} == dict.fromkeys(
            ("tokens", "labels", "loss_mask", "position_ids", "document_starts"), (N,)
        )
        (ends,) = (Documents.read(torch.from_numpy(item["document_starts"])[None]) or Documents(ends=((N,),))).ends
        for first, last in zip((0, *ends), ends):
            tokens, labels, weights = (item[name][first:last] for name in ("tokens", "labels", "loss_mask"))
            np.testing.assert_array_equal(item["position_ids"][first:last], np.arange(last - first))
            if last == N and not tokens.any() and not weights.any():  # padding
                continue
            document = tokens[0] // 200
            seen.append(document)
            np.testing.assert_array_equal(tokens, 200 * document + np.arange(LENGTHS[document]))
            np.testing.assert_array_equal(labels, [*tokens[1:], 0])
            expected = (labels % 3 == 0) if mask else np.ones(len(tokens))
            np.testing.assert_array_equal(weights, expected * (tokens != tokens[-1]) * (tokens != 203))
    assert sorted(seen) == list(range(40))


def test_usage_counts_what_was_used(tmp_path):
    """Against the samples themselves: epochs, parts of epochs, and a blend that repeats."""
    long = build(LongDocumentDataset, 70, [write(tmp_path / "long", [*range(96, 126), 300, 900], base=100_000)])
    prefixes = [write(tmp_path / name, LENGTHS) for name in "ab"]
    one_epoch = build(PackedDocumentDataset, 200, prefixes)  # without weights
    short = repeat_if_short(one_epoch, 200)
    usage, samples = Usage(), 128 + 37
    usage.dataset = MixedDataset(long, short, Mix(0.6, 3), samples)
    items = [usage.dataset[i] for i in range(samples)]
    lines = usage.describe_sources(samples)
    assert usage.dataset.mix.count_short(samples) > len(one_epoch) and len(lines) == 3

    def count(source: int) -> tuple[int, int, int]:
        """Return the samples of a source, their documents and the documents' tokens."""
        mine = [item for item in items if item["dataset_id"] == source]
        weights = np.concatenate([item["loss_mask"] for item in mine])
        documents = int((np.diff(weights, append=0.0) == -1).sum())
        return len(mine), documents, int(weights.sum()) + documents

    for source, line in enumerate(lines):
        found, documents, tokens = count(source)
        kind, tokens = (" packed", tokens) if source else ("", found * N)
        assert f": {found:,}{kind} samples, {tokens:,} tokens" in line
        by_length = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of (?:up to|above)", line)]
        assert sum(by_length) == (documents if source else found)
        if source:
            assert f"{100 * (1 - tokens / (found * N)):.1f} % padding" in line


def test_no_document_that_fits_is_one_line(tmp_path):
    prefix = write(tmp_path / "short", [97, 1])
    with pytest.raises(UsageError, match=r"--short-data-path .*: none of its 2 documents has from 2 to 96 tokens"):
        build(PackedDocumentDataset, 5, [prefix])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_the_order_of_many_places_at_once(n, seed, epoch):
    np.testing.assert_array_equal(permute_range(n, n, (seed, epoch)), [permute(i, n, (seed, epoch)) for i in range(n)])


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 0.99), seed=st.integers(0, 2**32), block=st.integers(0, 10**6))
def test_the_share_is_exact_over_any_stretch(share, seed, block):
    mix = Mix(share, seed)
    for samples in (64 * block, 64 * block + 1000):
        assert abs(mix.count_short(samples) - share * samples) <= 32
    assert abs(mix.count_short(64 * block) - share * 64 * block) <= 0.51
    chosen = [mix.is_short(64 * block + i) for i in range(64)]
    assert mix.count_short(64 * (block + 1)) - mix.count_short(64 * block) == sum(chosen)


def test_places_of_short_samples_are_shuffled():
    mix = Mix(0.5, 3)
    chosen = np.array([mix.is_short(i) for i in range(4096)])
    assert chosen.mean() == 0.5 and 0.3 < np.mean(chosen[1:] == chosen[:-1]) < 0.7


def test_a_mixture_has_the_samples_of_its_sources_in_order(tmp_path):
    long = build(LongDocumentDataset, 64, [write(tmp_path / "long", [150] * 20, base=100_000)])
    prefixes = [write(tmp_path / name, LENGTHS, base=base) for name, base in (("a", 0), ("b", 20_000))]
    short = build(PackedDocumentDataset, 64, prefixes, weights=[0.25, 0.75])
    mix = Mix(0.5, 3)
    mixed = MixedDataset(long, short, mix, 128)
    counts = [0, 0]
    for index in range(128):
        which = mix.is_short(index)
        item, expected = mixed[index], (long, short)[which][counts[which]]
        counts[which] += 1
        assert item["dataset_id"] == (1 + expected["dataset_id"] if which else 0)
        assert item.keys() == expected.keys() | {"dataset_id"}
        for name in expected.keys() - {"dataset_id"}:
            np.testing.assert_array_equal(item[name], expected[name])
    assert counts == [64, 64]
    batch = next(iter(torch.utils.data.DataLoader(mixed, batch_size=128, num_workers=1)))
    assert torch.bincount(batch["dataset_id"]).tolist() == [64, 16, 48]
