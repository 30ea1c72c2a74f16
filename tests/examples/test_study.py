"""Tests of examples/study: its data, its measure of recall, and the whole command on a tiny Llama."""

import json
import math
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
    assert {depth: share for depth, (share, _) in found.items()} == {0.0: 1.0, 0.25: 1.0, 0.5: 1.0, 0.75: 0.0, 1.0: 0.0}
    likeliest, others = math.log(math.e + 2999) - 1, math.log(math.e + 2999)  # _Reader's logits are 1 and 0
    losses = {depth: pytest.approx(likeliest if share else others) for depth, (share, _) in found.items()}
    assert {depth: loss for depth, (_, loss) in found.items()} == losses


def test_the_trainer_accepts_every_run(study, tmp_path):
    """Parse the flags of all methods, factors and ablations as pretrain_cream.py does."""
    from megatron_cream.config import parse
    from megatron_cream.config.samplers import sampler_options

    corpus = study.corpus.prepare(tmp_path / "corpus", length=4096, documents=2, source=ROOT / "megatron_cream")
    samplers, ropes = {}, {}
    methods = study.methods
    rates = dict.fromkeys(methods.SCALINGS, 6e-4)
    scaled = [run for run in methods.scaled([0], [4, 8, 16], rates) if run.method in methods.BEYOND or run.factor == 8]
    for run in [methods.base(0), *methods.extensions([0], [4, 8, 16]), *scaled]:
        stages = methods.stages(run, tmp_path, corpus)
        assert len(stages) == (2 if run.method == methods.LONG_END else 1)
        for flags in stages:
            while "--pretrained-checkpoint" in flags:  # there is no checkpoint yet
                del flags[(place := flags.index("--pretrained-checkpoint")) : place + 2]
            args = parse.read(flags)
            samplers[run.name], ropes[run.name] = sampler_options(args), (args.rotary_base, args.rope_scaling_config)
            assert args.global_batch_size % args.micro_batch_size == 0
            assert samplers[run.name]["target"] == methods.WINDOW * run.factor
            assert run.method == "base" or (args.lr, args.min_lr) == (run.rate, pytest.approx(run.rate / 10))
    assert len(samplers) == 1 + 3 * len(methods.METHODS) + len(methods.SIGMAS) + len(scaled)
    assert ropes["theta_mix_s_8_seed_0_lr_0_0006"] == (500_000, None)
    assert ropes["wide_theta_mix_s_8_seed_0_lr_0_0006"] == (1_750_000, None)
    assert ropes["4_wide_theta_mix_s_8_seed_0_lr_0_0006"] == (7_010_000, None)
    assert (
        ropes["yarn_mix_s_8_seed_0_lr_0_0006"][1]["factor"] == 8 and ropes["yarn_mix_s_8_seed_0_lr_0_0006"][0] == 10_000
    )
    assert samplers["theta_cream_long_end_s_8_seed_0_lr_0_0006"]["window"] == 2048  # of the last steps
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
    command += [
        "--parts",
        "samplers",
        "--methods",
        "cream",
        "full",
        "--samples",
        "1",
        "--documents",
        "4",
        "--learned",
        "0",
        "--jobs",
        "1",
    ]
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


def _result(method, factor, seed, recall, perplexity, **more):
    return dict(
        run=f"{method}{factor}{seed}{more}",
        method=method,
        factor=factor,
        seed=seed,
        alone=seed == 0,
        seconds=7.0,
        recall={n: {"0.0": recall - 0.1, "1.0": recall + 0.1} for n in ("256", "512", "1024")},
        perplexity={n: perplexity for n in ("256", "512", "1024")},
        **more,
    )


def test_the_table_holds_means_and_deviations(study):
    results = [_result("base", 1, 0, 0.9, 1.0), _result("cream", 4, 0, 0.5, 4.0), _result("cream", 4, 1, 0.7, 6.0)]
    table = study.report.table(results)
    row = "| linear | cream | 0.0003 | 2 | 60.0 ± 14.1 | 50.0 ± 14.1 | 60.0 ± 14.1 | 5.00 ± 1.41 | 5.00 ± 1.41 | 7.0 |"
    assert row in table and "Pairs" not in table and "learning rate, `cream`" not in table


def test_learning_rates_are_chosen_and_pairs_have_the_same_bases(study, tmp_path):
    def scaled(scaling, rate, seed, recall, perplexity):
        loss = {n: 1 - recall for n in ("256", "512", "1024")}
        return _result("cream", 4, seed, recall, perplexity, scaling=scaling, rate=rate, loss=loss)

    # An older result of linear scaling, with another base: it is in the table of the factor, alone, and in no pair.
    results = [_result("cream", 4, 0, 0.1, 9.0)]
    results += [scaled("linear", rate, 3, 0.5, 5.0 - 1000 * rate) for rate in (3e-4, 6e-4, 1.2e-3)]
    results += [scaled("linear", 1.2e-3, 4, 0.6, 4.0)]
    results += [scaled("theta", 3e-4, seed, 0.9, 2.0 + seed / 100) for seed in (3, 4)]
    results += [scaled("theta", 6e-4, 3, 0.9, float("nan"))]
    results += [scaled("theta", 1.2e-3, 3, 0.9, 2.5)]
    rates = {scaling: study.report.chosen_rate(results, scaling, 3) for scaling in study.methods.SCALINGS}
    assert rates == {"linear": 1.2e-3, "theta": 3e-4, "wide theta": 3e-4, "4 wide theta": 3e-4, "yarn": None}
    table = study.report.table(results)
    assert "| linear | cream | 0.0003 | 1 | 10.0" in table and "| linear | cream | 0.0012 | 2 | 55.0 ± 7.1" in table
    assert "| linear | cream | 0.0006 |" not in table  # it was only tried
    assert "| linear | 3 |  | 2.048 | 1.982 | **1.835** |  |" in table
    (pair,) = [line for line in table.splitlines() if "theta - linear" in line]
    study.report.write(results, tmp_path)
    assert (tmp_path / "scalings.png").stat().st_size > 10_000 and (tmp_path / "table.md").read_text() == table
    scalings = [
        result for result in results if result.get("loss") and (result["scaling"], result["rate"]) != ("linear", 3e-4)
    ]
    (tmp_path / "scalings alone").mkdir()
    study.report.write(scalings, tmp_path / "scalings alone")
    assert {file.name for file in (tmp_path / "scalings alone").iterdir()} == {"table.md", "scalings.png"}
    # A later search, on a base of its own, changes nothing for the seeds before it, and is paired at its own rates.
    later = [scaled("linear", rate, 7, 0.5, 4.0 + 1000 * rate) for rate in (3e-4, 6e-4)]
    later += [scaled("theta", rate, 7, 0.8, 4.0 - 1000 * rate) for rate in (3e-4, 6e-4)]
    both = study.report.table(results + later)
    assert "| linear | cream | 0.0012 | 2 | 55.0 ± 7.1" in both and "| theta | cream | 0.0006 | 1 | 80.0" in both
    assert "| cream | theta - linear | 3 | +33.3 ± 3.3 | yes |" in both
    assert pair.startswith(
        "| 4 | cream | theta - linear | 2 | +35.0 ± 5.0 | yes | +35.0 ± 5.0 | yes | -0.350 ± 0.050 | yes | -0.65"
    )


def test_the_runs_of_the_part_scalings_take_the_chosen_rates(study):
    methods, results = study.methods, {}
    command = SimpleNamespace(
        results=results,
        flags=SimpleNamespace(parts=["scalings"], factors=[4, 8, 16], methods=["cream", "mix"], output=None),
    )
    parts = study.command._parts(command, [3, 4, 5])
    tried = next(parts)
    assert len(tried) == len({run.name for run in tried}) == len(methods.TRIED) * len(methods.RATES)
    assert {(run.method, run.factor, run.seed) for run in tried} == {("cream", 8, 3)}
    for run in tried:
        best = 1.2e-3 if run.scaling == "linear" else 6e-4
        loss = {"256": abs(run.rate - best)}
        results[run.name] = _result("cream", 8, 3, 0.5, 5.0, scaling=run.scaling, rate=run.rate, loss=loss)
    (scaled,) = parts
    assert {(run.scaling, run.rate) for run in scaled} == {
        ("linear", 1.2e-3),
        ("theta", 6e-4),
        ("wide theta", 6e-4),
        ("4 wide theta", 6e-4),
        ("yarn", 6e-4),
    }
    assert len({run.name for run in scaled}) == len(scaled) == 5 * 2 * 3 * 3
    assert {run.name for run in scaled[:9]} == {
        f"{name}cream_s_8_seed_{seed}_lr_{rate}"
        for seed in (3, 4, 5)
        for name, rate in (("", "0_0012"), ("theta_", "0_0006"), ("yarn_", "0_0006"))
    }
