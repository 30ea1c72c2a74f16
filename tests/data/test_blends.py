"""Tests of blends: draws of their own in each data set, and more epochs than Megatron builds."""

import re
import shutil

import numpy as np
import pytest
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_cream.common.errors import UsageError
from megatron_cream.data.dataset import LongDocumentDataset
from megatron_cream.data.repeated_blend import RepeatedBlend, repeat_if_short
from tests.data.test_dataset import build, config, prefix  # noqa: F401  (a fixture)
from tests.launch import TINY, torchrun, write_documents

RUN = [*TINY, "--split", "80,20,0", "--eval-interval", 4, "--eval-iters", 3, "--global-batch-size", 2]


@pytest.fixture(scope="module")
def shards(prefix, tmp_path_factory):  # noqa: F811
    """The same documents three times, as shards of one corpus are alike."""
    folder = tmp_path_factory.mktemp("shards")
    for name in "abc":
        for suffix in (".bin", ".idx"):
            shutil.copy(prefix + suffix, folder / f"{name}{suffix}")
    return [str(folder / name) for name in "abc"]


def build_blend(shards, samples, **options):
    kind, rank = LongDocumentDataset, lambda: True
    return BlendedMegatronDatasetBuilder(kind, list(samples), rank, config(shards, **options)).build()


def plan_of(item) -> tuple[int, ...]:
    return tuple(item["position_ids"].tolist())


def test_alike_shards_draw_apart(prefix, shards):  # noqa: F811
    """A batch of three shards has as many independent draws as samples; the first shard draws as it does alone."""
    train = build_blend(shards, (300, 30, 0), weights=[1.0, 1.0, 1.0])[0]
    sets = train.datasets
    plans = [[plan_of(data[i]) for i in range(60)] for data in sets]
    assert [int(data[7]["document"]) for data in sets] == [int(sets[0][7]["document"])] * 3  # only the draws differ
    assert plans[0] == [plan_of(build(prefix)[0][i]) for i in range(60)]
    same = [sum(a == b for a, b in zip(plans[one], plans[other])) for one, other in ((0, 1), (0, 2), (1, 2))]
    assert max(same) <= 2


def test_a_blend_without_weights_draws_again_in_each_epoch(shards):
    train = build_blend(shards, (1000, 30, 0))[0]
    assert isinstance(train, BlendedDataset) and len(train) < 1000
    n, repeated = len(train), repeat_if_short(train, 1000)
    epochs = [[repeated[epoch * n + i] for i in range(n)] for epoch in range(3)]
    documents = [sorted((int(item["dataset_id"]), int(item["document"])) for item in epoch) for epoch in epochs]
    assert documents[0] == documents[1] == documents[2] and len(set(documents[0])) == n
    assert [plan_of(item) for item in epochs[0]] == [plan_of(train[i]) for i in range(n)]
    again = sum(plan_of(a) == plan_of(b) for a, b in zip(epochs[0], epochs[1]))
    assert again <= 0.1 * n and len(repeated) == 1001
    counted = np.bincount([int(repeated[i]["dataset_id"]) for i in range(2 * n + 11)], minlength=3)
    assert repeated.count_samples(2 * n + 11).tolist() == counted.tolist()


def test_a_weighted_blend_is_long_enough(shards):
    train = build_blend(shards, (1000, 30, 0), weights=[0.2, 0.3, 0.5])[0]
    assert not isinstance(repeat_if_short(train, 900), RepeatedBlend)
    assert repeat_if_short(None, 900) is None and repeat_if_short(train, None) is train


def test_a_shard_without_long_documents_is_named(shards, tmp_path):
    """Megatron would stop at an assertion about weights."""
    write_documents(tmp_path / "short", documents=5, shortest=10, longest=20)
    with pytest.raises(
        UsageError, match=r"train split of .*/short: none of its \d documents has 96 tokens; leave it out"
    ):
        build_blend([shards[0], str(tmp_path / "short")], (100, 10, 0))


def test_a_run_goes_on_after_an_epoch_of_a_blend_without_weights(tmp_path):
    """Two small files, 20 samples for their 8 documents, also in evaluations; resumed at a place in a later epoch."""
    files = [write_documents(tmp_path / name, documents=6, shortest=300, longest=400) for name in "ab"]
    given = [*RUN, "--data-path", *files, "--save", tmp_path / "run", "--load", tmp_path / "run", "--save-interval", 6]
    straight = torchrun(1, *RUN, "--data-path", *files, "--train-iters", 10)
    assert straight.returncode == 0, straight.stderr[-3000:]
    first = torchrun(1, *given, "--train-iters", 10, "--exit-interval", 6)
    assert first.returncode == 0, first.stderr[-3000:]
    resumed = torchrun(1, *given, "--train-iters", 10)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    last = [re.findall(r"step 10/10 \| loss ([\d.]+)", ended.stdout) for ended in (straight, resumed)]
    assert last[0] and last[0] == last[1]
