"""Perplexity by context length: which tokens are scored, and equal values at every layout."""

import json

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.evaluation.perplexity import read_held_out_documents
from megatron_cream.evaluation.teacher_forced import ScoredText, build_batch
from tests.launch import train, write_documents

LENGTHS = [96, 192, 384]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    return folder, write_documents(folder / "documents")


def test_documents_are_spread_over_the_long_ones(data):
    dataset = IndexedDataset(str(data[1]))
    long = [i for i, n in enumerate(dataset.sequence_lengths) if n >= 384]
    documents = read_held_out_documents([(str(data[1]), (0.0, 1.0))], minimum=384, most=5)
    assert len(documents) == 5 and all(len(d) == 384 for d in documents)
    chosen = [i for d in documents for i in long if np.array_equal(dataset.get(i, 0, 384), d)]
    assert chosen[0] == long[0] and chosen[-1] == long[-1]
    whole = [(str(data[1]), (0.0, 1.0))]
    assert len(read_held_out_documents(whole, 384, 10**6)) == len(long)
    assert read_held_out_documents(whole, 10**6, 5) == []
    # Only the held-out share is read: documents 30 to 53 of 60.
    part = read_held_out_documents([(str(data[1]), (0.5, 0.9))], 384, 10**6)
    assert len(part) == sum(30 <= i < 54 for i in long)


def test_the_scored_tokens_are_the_last_that_have_a_label():
    batch = build_batch(ScoredText(np.arange(100, 110), first=6), length=10)
    mask = batch["loss_mask"][0].bool()
    assert batch["labels"][0][mask].tolist() == [106, 107, 108, 109]
    assert batch["position_ids"][0].tolist() == list(range(10))


@pytest.mark.slow
def test_perplexity_is_equal_at_every_layout(data, tmp_path):
    """One rank, TP 2, PP 2, CP 2 and DP 2 (with 5 documents: uneven) report the same perplexities."""
    folder, prefix = data
    flags = ["--data-path", prefix, "--split", "50,50,0", "--train-iters", 1]
    flags += ["--eval-documents", 5, "--eval-lengths", *LENGTHS, "--num-layers", 4]
    train(1, tmp_path / "tb", *flags, "--save", tmp_path / "start", "--save-interval", 1)

    def measured(name, ranks, *extra):
        save = tmp_path / name
        # A negligible learning rate, so that the weights stay those of the checkpoint.
        train(
            ranks,
            tmp_path / f"tb-{name}",
            *flags,
            "--lr",
            1e-20,
            "--pretrained-checkpoint",
            tmp_path / "start",
            "--save",
            save,
            "--save-interval",
            1,
            *extra,
        )
        line = (save / "perplexity_by_length.jsonl").read_text().splitlines()[-1]
        return {int(n): value for n, value in json.loads(line)["perplexity"].items()}

    one = measured("one", 1)
    assert list(one) == LENGTHS and all(1 < value < 200 for value in one.values())
    for name, extra in {
        "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
        "pp2": "--pipeline-model-parallel-size 2",
        "pp2-interleaved": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "cp2": "--context-parallel-size 2",
        "dp2": "--use-distributed-optimizer",
    }.items():
        other = measured(name, 2, *extra.split())
        assert other == pytest.approx(one, rel=1e-5), name
