"""Tests of the dataset: long documents only, new plans each epoch, equal samples for every number of workers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_cream.common.errors import UsageError
from megatron_cream.data.dataset import LongDocumentDataset, LongDocumentDatasetConfig
from megatron_cream.data.order import permute
from megatron_cream.positions import build_sampler

N, L = 96, 384
SAMPLER = dict(name="cream", window=N, target=L, sigma=3.0, variant="paper")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Documents whose tokens encode their origin: token i of document d is 1000 d + i."""
    path = tmp_path_factory.mktemp("data") / "documents"
    rng = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.int32)
    for d, length in enumerate(rng.integers(40, 900, size=50)):
        builder.add_document(torch.arange(1000 * d, 1000 * d + length), [length])
    builder.finalize(f"{path}.idx")
    return str(path)


def config(prefixes, sampler=SAMPLER, seed=5, **options) -> LongDocumentDatasetConfig:
    blend = (prefixes, options.pop("weights", None))
    return LongDocumentDatasetConfig(
        random_seed=seed,
        sequence_length=N,
        blend=blend,
        split=options.pop("split", "80,20,0"),
        sampler=sampler,
        **options,
    )


def build(prefix, samples=(200, 40, 0), **options):
    return BlendedMegatronDatasetBuilder(
        LongDocumentDataset, list(samples), lambda: True, config([prefix], **options)
    ).build()


def test_a_finished_run_can_start_again(prefix):
    """Megatron's sampler rejects data with no samples left."""
    train, _, _ = build(prefix)
    sampler = MegatronPretrainingSampler(
        len(train), consumed_samples=200, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1
    )
    assert list(sampler) == []


def test_samples_are_what_the_sampler_planned(prefix):
    train, valid, _ = build(prefix)
    dataset = IndexedDataset(prefix)  # keeps the memory map alive
    lengths = dataset.sequence_lengths
    long = np.flatnonzero(lengths[:40] >= N)
    assert 0 < len(long) < 40 and list(train.documents) == list(long)
    sampler = build_sampler(**SAMPLER, seed=5)
    for index in range(len(train)):
        item = train[index]
        assert {k: (v.shape, v.dtype) for k, v in item.items()} == {
            "tokens": ((N,), np.int64),
            "labels": ((N,), np.int64),
            "position_ids": ((N,), np.int64),
            "loss_mask": ((N,), np.float32),
            "sample": ((), np.int64),
            "document": ((), np.int64),
        }
        epoch, place = divmod(index, len(long))
        sample = permute(place, len(long), (5, epoch))
        document = int(item["tokens"][0]) // 1000
        assert document == long[sample] == item["document"] and item["sample"] == index
        plan = sampler.plan(epoch=epoch, sample=sample, document_length=int(lengths[document]))
        np.testing.assert_array_equal(item["tokens"] - 1000 * document, plan.token_indices)
        np.testing.assert_array_equal(item["position_ids"], plan.position_ids)
        np.testing.assert_array_equal(item["labels"][:-1], item["tokens"][1:])
        assert item["loss_mask"].sum() == N - 1 and item["loss_mask"][-1] == 0


def test_an_epoch_visits_every_document_once_with_new_draws(prefix):
    train = build(prefix)[0]
    n = len(train.documents)
    epochs = [[train[e * n + i] for i in range(n)] for e in range(3)]
    orders = [[int(item["tokens"][0]) // 1000 for item in epoch] for epoch in epochs]
    assert all(sorted(order) == sorted(train.documents) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    plans = [{int(i["tokens"][0]) // 1000: tuple(i["position_ids"]) for i in epoch} for epoch in epochs]
    assert sum(plans[0][d] != plans[1][d] for d in plans[0]) > 0.9 * n


def test_held_out_samples_do_not_change_between_evaluations(prefix):
    valid = build(prefix)[1]
    n = len(valid.documents)
    by_document = [{int(valid[e * n + i]["tokens"][0]) // 1000: valid[e * n + i] for i in range(n)} for e in range(2)]
    for document, item in by_document[0].items():
        np.testing.assert_array_equal(item["position_ids"], by_document[1][document]["position_ids"])


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers(prefix, workers):
    train = build(prefix)[0]
    loader = torch.utils.data.DataLoader(train, batch_size=4, num_workers=workers)
    for start, batch in zip(range(0, 40, 4), loader):
        for row in range(4):
            np.testing.assert_array_equal(batch["tokens"][row], train[start + row]["tokens"])


def test_segment_starts_masked(prefix):
    plain, masked = build(prefix)[0], build(prefix, mask_segment_starts=True)[0]
    for index in range(30):
        item = masked[index]
        jumps = np.flatnonzero(np.diff(item["position_ids"]) != 1)
        dropped = np.flatnonzero(plain[index]["loss_mask"] != item["loss_mask"])
        # Every jump in position starts a segment; a segment may also start without one (alpha = 1).
        assert set(jumps) <= set(dropped) and len(dropped) == 2


def test_eod_masked(prefix):
    token = int(build(prefix)[0][0]["tokens"][3])
    item = build(prefix, eod_token=token)[0][0]
    assert item["loss_mask"][3] == 0 and item["loss_mask"].sum() == N - 2


def test_blend_of_two_files(prefix, tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/other.bin", dtype=np.int32)
    for d in range(20):
        builder.add_document(torch.arange(10**6 + 1000 * d, 10**6 + 1000 * d + 300), [300])
    builder.finalize(f"{tmp_path}/other.idx")
    settings = config([prefix, f"{tmp_path}/other"], weights=[0.75, 0.25], split="100,0,0")
    train = BlendedMegatronDatasetBuilder(LongDocumentDataset, [400, 0, 0], lambda: True, settings).build()[0]
    share = np.mean([train[i]["tokens"][0] >= 10**6 for i in range(400)])
    assert share == pytest.approx(0.25, abs=0.01)


def test_no_document_long_enough_prints_one_line(prefix):
    sampler = dict(name="pi", window=5000, target=5000)
    with pytest.raises(UsageError, match=r"train split of .*: none of its 40 documents has 5000 tokens") as caught:
        build(prefix, sampler=sampler)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_order_is_a_permutation(n, seed, epoch):
    assert sorted(permute(i, n, (seed, epoch)) for i in range(n)) == list(range(n))


def test_order_looks_random():
    """Over many epochs the place of document 0 is uniform, and neighbours do not stay neighbours."""
    from scipy.stats import chisquare

    n, epochs = 50, 5000
    counts = np.bincount([permute(0, n, (1, e)) for e in range(epochs)], minlength=n)
    assert chisquare(counts).pvalue > 1e-4
    together = np.mean([abs(permute(3, n, (1, e)) - permute(4, n, (1, e))) == 1 for e in range(epochs)])
    assert together == pytest.approx(2 / n, abs=0.015)
