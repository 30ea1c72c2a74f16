"""Tests of examples/study: its data, its measure of recall, and the whole command on a tiny Llama."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "examples" / "study"
TINY = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2 --train-iters 2 --log-interval 1 "
    "--micro-batch-size 2 --global-batch-size 4 --lr-warmup-iters 1 --num-workers 0"
).split()


@pytest.fixture(scope="module")
def study():
    """The modules of the study."""
    sys.path.insert(0, str(STUDY))
    try:
        import corpus
        import methods
        import recall
        import report
        import study as command

        yield SimpleNamespace(corpus=corpus, recall=recall, report=report, methods=methods, command=command)
    finally:
        sys.path.remove(str(STUDY))


KEYS, VALUES = np.arange(1000, 1256), np.arange(2000, 2256)


@pytest.mark.parametrize("count", [2, 32, 128])
def test_a_document_states_its_pairs_over_and_over(study, count):
    stream = np.arange(5000, dtype=np.uint16) % 900
    document = study.corpus.pair_document(np.random.default_rng(count), stream, (KEYS, VALUES), 4096, count)
    places = np.flatnonzero(np.isin(document, KEYS))
    stated = {}
    for key, value in zip(document[places], document[places + 1]):
        assert value in VALUES and stated.setdefault(int(key), int(value)) == value
    assert len(set(stated.values())) == len(stated) <= count and len(places) > len(stated)
    # The remaining tokens are the unchanged text.
    rest = np.setdiff1d(np.arange(4096), np.concatenate([places, places + 1]))
    assert len(set((document[rest].astype(int) - rest) % 900)) == 1
    low, high = study.corpus.GAPS
    assert 4096 / high - 1 <= len(places) <= 4096 / low + 1


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_context_asks_for_what_it_states_once(study, depth):
    haystack = np.arange(3000) % 900
    for seed in range(20):
        tokens, answer = study.recall.context(np.random.default_rng(seed), haystack, (KEYS, VALUES), 512, depth)
        (place,) = np.flatnonzero(tokens[:-1] == tokens[-1])
        assert tokens[place + 1] == answer and len(tokens) == 512
        first, last = study.recall.OPENING, 512 - 4
        assert place == first + 2 * round(depth * (last - first) / 2)
        assert np.isin(tokens[:-1], KEYS).sum() == study.recall.PAIRS


class _Reader:
    """A model that answers with the value of the last key if the first `sees` tokens contain it, else with 0."""

    device = "cpu"

    def __init__(self, sees: int):
        self.sees = sees

    def __call__(self, tokens, logits_to_keep, use_cache):
        logits = torch.zeros(len(tokens), 1, 3000)
        for row, line in zip(logits, tokens):
            places = (line[: self.sees - 1] == line[-1]).nonzero()
            row[0, line[places[0, 0] + 1] if len(places) else 0] = 1.0
        return SimpleNamespace(logits=logits)


def test_recall_is_the_share_that_is_found_at_each_depth(study):
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = study.recall.recall_by_depth(
        _Reader(300), np.arange(3000) % 900, (KEYS, VALUES), 512, depths, samples=9, batch_tokens=1024
    )
    assert found == {0.0: 1.0, 0.25: 1.0, 0.5: 1.0, 0.75: 0.0, 1.0: 0.0}


def test_the_trainer_accepts_every_run(study, tmp_path):
    """Parse the flags of all methods, factors and ablations as pretrain_cream.py does."""
    from megatron_cream.config import parse
    from megatron_cream.config.samplers import sampler_options

    corpus = study.corpus.prepare(tmp_path / "corpus", length=4096, documents=2, source=ROOT / "megatron_cream")
    samplers = {}
    for run in [study.methods.base(0), *study.methods.extensions([0], [4, 8, 16])]:
        flags = study.methods.flags(run, tmp_path, corpus)
        if run.method != "base":
            del flags[(place := flags.index("--pretrained-checkpoint")) : place + 2]  # there is no checkpoint yet
        args = parse.read(flags)
        samplers[run.name] = sampler_options(args)
        assert args.global_batch_size % args.micro_batch_size == 0
        assert samplers[run.name]["target"] == study.methods.WINDOW * run.factor
    assert len(samplers) == 1 + 3 * len(study.methods.METHODS) + len(study.methods.SIGMAS)
    cream = dict(name="cream", window=256, target=2048, sigma=3.0, variant="paper", relativity=0.5)
    assert samplers["cream_s_8_seed_0"] == cream
    assert samplers["cream_no_gaussian_s_8_seed_0"] == {k: v for k, v in cream.items() if k != "sigma"} | {
        "middle": "uniform"
    }
    assert samplers["cream_no_continuity_s_8_seed_0"] == cream | {"relativity": 1.0}
    assert samplers["cream_no_relativity_s_8_seed_0"] == cream | {"relativity": 0.0}
    assert samplers["cream_released_s_8_seed_0"] == cream | {"variant": "released"}
    assert samplers["full_s_16_seed_0"]["window"] == 4096


@pytest.mark.parametrize("gpus", [1, 3])
def test_timed_runs_have_the_first_gpu_to_themselves(study, gpus):
    """Every run starts once, on a GPU with room, in any order of endings."""
    jobs, rng = 4, np.random.default_rng(gpus)
    command = object.__new__(study.command.Study)
    command.flags, command.pools = SimpleNamespace(jobs=jobs), dict.fromkeys(range(gpus))
    wanted = study.methods.extensions([0, 1], [4, 8])
    waiting, going, started = list(wanted), [], []
    while waiting or going:
        while (choice := command._next(waiting, going)) is not None:
            waiting.remove(choice[0])
            going.append(choice)
            started.append(choice[0])
        on = [[run for run, gpu in going if gpu == each] for each in range(gpus)]
        assert all(sum(run.places for run in runs) <= jobs for runs in on)
        assert len(on[0]) == 1 if any(run.alone for run in on[0]) else not any(run.alone for run in waiting)
        assert not any(run.alone for runs in on[1:] for run in runs)
        going.pop(rng.integers(len(going)))
    assert sorted(map(str, started)) == sorted(map(str, wanted))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study of two methods that was stopped at once and resumed."""
    folder = tmp_path_factory.mktemp("study")
    command = [sys.executable, str(STUDY / "study.py"), "--output", str(folder), "--seeds", "0", "--factors", "4"]
    command += ["--methods", "cream", "full", "--samples", "1", "--documents", "4", "--learned", "0", "--jobs", "1"]
    command += ["--source", str(ROOT / "megatron_cream")]
    first = subprocess.run([*command, "--minutes", "0", "--", *TINY], capture_output=True, text=True, timeout=300)
    assert first.returncode == 0 and "goes on from here" in first.stdout, first.stderr
    second = subprocess.run([*command, "--", *TINY], capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stdout + second.stderr
    return folder


def test_the_command_resumes_and_writes_a_table_and_pictures(finished):
    results = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert [(r["method"], r["factor"]) for r in results] == [("base", 1), ("cream", 4), ("full", 4)]
    for result in results:
        assert list(result["recall"]) == ["256", "512", "1024"] and result["seconds"] > 0
        assert all(set(by_depth.values()) <= {0.0, 1.0} for by_depth in result["recall"].values())
    assert list(results[1]["perplexity"]) == ["256", "512", "1024"]
    table = (finished / "table.md").read_text()
    assert "| cream |" in table and "| full |" in table
    for name in ("recall.png", "perplexity.png", "cost.png"):
        assert (finished / name).stat().st_size > 10_000
    assert not list(finished.glob("*.hf")) and (finished / "base_s_1_seed_0").is_dir()


def test_the_table_holds_means_and_deviations(study):
    def result(method, factor, seed, recall, perplexity):
        return dict(
            run=f"{method}{seed}",
            method=method,
            factor=factor,
            seed=seed,
            alone=seed == 0,
            seconds=7.0,
            recall={n: {"0.0": recall - 0.1, "1.0": recall + 0.1} for n in ("256", "1024")},
            perplexity={n: perplexity for n in ("256", "1024")},
        )

    results = [result("base", 1, 0, 0.9, 1.0), result("cream", 4, 0, 0.5, 4.0), result("cream", 4, 1, 0.7, 6.0)]
    table = study.report.table(results)
    assert "| cream | 60.0 ± 14.1 | 50.0 ± 14.1 | 60.0 ± 14.1 | 5.00 ± 1.41 | 5.00 ± 1.41 | 7.0 |" in table
