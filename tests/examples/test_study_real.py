"""Tests of examples/study_real: its grid, its prompts, its scores, and its commands on a tiny Llama."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation_models import save_llama

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "examples" / "study_real"
NAMES = ("cells", "retrieval", "report", "study", "worker")


@pytest.fixture(scope="module")
def study():
    """The modules of the study; another study of examples/ has modules with the same names."""
    others = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(STUDY))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    finally:
        sys.path.remove(str(STUDY))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def test_the_grid_starts_with_prerequisites(study):
    settings = study.cells.Settings()
    order = study.cells.order(settings)
    assert len({cell.name for cell in order}) == len(order)
    choosing = [cell for scaling in study.cells.SCALINGS for cell in study.cells.choosing(settings, scaling)]
    assert order[: len(choosing)] == choosing and all(cell.rate is None for cell in order[len(choosing) :])
    apart = ("full", study.cells.LONG_END, *study.cells.ADAPTERS)
    trained = {(c.scaling, c.sampler, c.factor, c.seed) for c in order if c.trains and c.sampler not in apart}
    critical = {cell for cell in trained if cell[0] in study.cells.CRITICAL}
    assert len(trained - critical) == 4 * 6 * 2 * 3  # every scaling, sampler, target and seed
    assert len(critical) == 3 * 2 * 3 and {sampler for _, sampler, *_ in critical} == {"cream"}
    assert study.study.wanted(settings, []) == order
    named = study.study.wanted(settings, ["yarn,pose,s4,seed 2", "theta,pi,s8,seed 1", "theta,pi,s8"])
    assert [cell.name for cell in named if cell.rate is None] == [
        "yarn_pose_s4_seed_2",
        *(f"theta_pi_s8_seed_{seed}" for seed in (1, 2, 3)),
    ]
    assert [cell.rate is None for cell in named] == [False] * 10 + [True] * 4  # what they wait for is first
    some = study.study.wanted(settings, ["ntk,pose,s8", "none,base"])
    assert {cell.name for cell in some} == {
        *(f"ntk_pose_s8_seed_{seed}" for seed in (1, 2, 3)),
        "none_base_s8_seed_0",
        *(f"ntk_cream_s8_seed_1_lr_{rate}" for rate in ("5e5", "0.0002", "0.0008", "0.0016", "0.0032")),
    }


def test_the_long_end_takes_the_time_of_cream(study, tmp_path):
    """Steps at the window, then a few of the target length from what these saved, at a rate that decays there only."""
    settings = study.cells.Settings()
    for factor, steps in ((4, [80, 14]), (8, [80, 7])):
        cell = study.cells.Cell("yarn", study.cells.LONG_END, factor, 1, 8e-4)
        stages = study.cells.stages(cell, settings, tmp_path, tmp_path)
        first, last = (dict(zip(flags[::2], flags[1::2], strict=True)) for flags in stages)
        assert [int(stage["--train-iters"]) for stage in (first, last)] == steps
        assert (first["--seq-length"], last["--seq-length"]) == ("8192", str(8192 * factor))
        assert "--position-sampler" not in first and last["--position-sampler"] == "full"
        assert last["--pretrained-checkpoint"] == first["--save"] != last["--save"] == str(tmp_path / cell.name)
        assert "--load-hf" in first and "--load-hf" not in last
        assert first["--lr-decay-style"] == "constant" and "--lr-decay-style" not in last
        assert int(last["--lr-warmup-iters"]) < steps[1] and last["--log-interval"] == "1"
        for flag in ("--rope-scaling-type", "--rope-scaling-factor", "--lr", "--target-length", "--data-cache-path"):
            assert first[flag] == last[flag]
        time = (steps[0] + steps[1] * 0.6 * factor) / settings.steps
        assert time == pytest.approx(1, abs=0.02)


def test_critical_thetas_follow_from_the_target(study, tmp_path):
    """At the critical base a dimension that turns once within the window turns once within the target."""
    settings = study.cells.Settings()
    for factor in (8, 4):
        theta = study.cells.theta(settings, "critical", factor)
        dimension = math.log(8192 / (2 * math.pi)) / math.log(1e5)  # as a share of the head
        assert 2 * math.pi * theta**dimension == pytest.approx(8192 * factor, rel=0.01)
        assert study.cells.theta(settings, "16 critical", factor) == pytest.approx(16 * theta, rel=0.01)
        (cell,) = [c for c in study.study.wanted(settings, [f"4 critical,s{factor},seed 2"]) if c.scaling != "theta"]
        flags = study.cells.flags(cell.with_rate(8e-4), settings, tmp_path, tmp_path)
        assert float(flags[flags.index("--rotary-base") + 1]) == pytest.approx(4 * theta, rel=0.01)
        assert flags[flags.index("--rope-scaling-type") + 1] == "none" and "--rope-scaling-factor" not in flags


def test_critical_thetas_take_the_rate_of_theta(study):
    settings = study.cells.Settings(factors=(4,), rates=(1.0, 2.0))
    lines = [result(study, "theta", "cream", 1, rate, 3 - rate) for rate in (1.0, 2.0)]
    lines.append(result(study, "critical", "cream", 1, 2.0, 0.5))
    found = {line["run"]: line for line in lines}
    assert study.cells.chosen_rate(settings, "critical", found) == 2.0
    results = study.report.Results(lines)
    assert results.chosen["critical"] == 2.0 and set(results.rates) == {"theta"}
    assert "| critical | cream | 1 | 50.0 |" in study.report.report(results)


def test_shares_of_short_text_have_cells_of_their_own(study, tmp_path):
    settings = study.cells.Settings(shares=(0.0, 0.3))
    short = study.cells.short(settings)
    assert study.study.wanted(settings, ["short"]) == [cell for cell in study.cells.order(settings) if cell in short]
    assert {cell.name for cell in short if cell.seed == 2} == {
        "yarn_cream_s8_seed_2_lr_0.0008",
        "yarn_cream_s8_seed_2_lr_0.0008_short_0.3",
    }
    flags = study.cells.flags(short[1], settings, tmp_path, tmp_path)
    assert flags[flags.index("--short-share") + 1] == "0.3" and "--short-share" not in study.cells.flags(
        short[0], settings, tmp_path, tmp_path
    )
    lines = [
        result(study, "yarn", "cream", seed, 8e-4, 1.0) | {"share": share, "short": {"code": 10 - 10 * share + seed}}
        for share in (0.0, 0.3)
        for seed in (1, 2)
    ]
    lines = [line | {"run": f"{line['run']} {line['share']}"} for line in lines]
    text = study.report.report(study.report.Results(lines))
    assert "| yarn | cream | 2 |" in text  # the ordinary tables leave out short text
    assert "| 0 | 2 | 11.500 ± 0.707 |" in text and "| 0.3 | 2 | 8.500 ± 0.707 |" in text


def test_short_documents_are_scored_alone_from_their_start(study, tmp_path, monkeypatch):
    documents = {"code": [np.arange(5), np.arange(10, 13)], "manual": [np.arange(20, 22)]}
    study.retrieval.save_short(tmp_path / "short.npz", documents)
    seen = []

    def scores(model, tokens, marks):
        seen.append((tokens.tolist(), marks.tolist()))
        return np.full((2, int(marks.sum())), math.log(float(tokens[0]) + 2))

    monkeypatch.setattr(study.retrieval, "_scores", scores)
    found = study.retrieval.evaluate_short(None, tmp_path / "short.npz")
    assert seen == [
        (document.tolist(), [1.0] * (len(document) - 1) + [0.0]) for texts in documents.values() for document in texts
    ]
    assert found == {"code": pytest.approx((2**4 * 12**2) ** (1 / 6), abs=1e-3), "manual": 22.0}


def test_every_run_has_the_same_tokens(study, tmp_path):
    settings = study.cells.Settings()
    for cell in study.cells.order(settings):
        if cell.trains:
            flags = study.cells.flags(cell.with_rate(1e-4), settings, tmp_path, tmp_path)
            value = lambda name: float(flags[flags.index(name) + 1])
            assert value("--global-batch-size") * value("--seq-length") * value("--train-iters") == 115 * 32 * 8192
            assert value("--target-length") == 8192 * cell.factor and value("--lr") == (cell.rate or 1e-4)
            assert value("--micro-batch-size") * value("--seq-length") == 4 * 8192


def test_a_training_is_read_from_its_log(study, tmp_path):
    """Megatron prints one line in --log-interval steps; one that ended early is an error."""
    worker = study.worker
    line = "iteration {:8}/{:8} | elapsed time per iteration (ms): {} | learning rate: 1E-4 | lm loss: {} | x\n"
    first = worker._FLAGS + " ..\n" + line.format(5, 80, 9.0, "9E+00")  # of a worker that was killed
    first += worker._FLAGS + " ..\n" + "".join(line.format(step, 80, 100.0, "2E+00") for step in range(5, 81, 5))
    last = worker._FLAGS + " ..\n" + "".join(line.format(step, 7, 1000.0, "1E+00") for step in range(1, 8))
    log = tmp_path / "log"
    log.write_text(first + last)
    found = worker._training(log, 2, 0.0)
    assert found["seconds"] == 80 * 0.1 + 7 and list(found["losses"])[-8:] == [str(n) for n in range(80, 88)]
    log.write_text(worker._FLAGS + " ..\n" + "".join(line.format(step, 14, 1000.0, "1E+00") for step in (5, 10)))
    assert worker._training(log, 1, 0.0)["seconds"] == 14
    for early in ("", line.format(5, 14, 1000.0, "1E+00")):
        log.write_text(worker._FLAGS + " ..\n" + early)
        with pytest.raises(RuntimeError, match="did not come to its last step"):
            worker._training(log, 1, 0.0)


def result(study, scaling, sampler, seed, rate, loss, accuracy=0.5):
    cell = study.cells.Cell(scaling, sampler, 4, seed, rate)
    of_length = dict(
        accuracy=accuracy, loss=loss, by_depth={"5": [accuracy, loss, 2]}, by_prompt=[[accuracy, loss]] * 2
    )
    tasks = {task: {n: of_length for n in ("256", "1024")} for task in study.retrieval.TASKS}
    return dict(
        run=cell.name,
        what="evaluation",
        scaling=scaling,
        sampler=sampler,
        factor=4,
        seed=seed,
        rate=rate,
        tasks=tasks,
        perplexity={"text": {"256": math.e, "1024": math.e}},
    )


def test_the_best_learning_rate_is_kept(study):
    settings = study.cells.Settings(factors=(4,), rates=(1.0, 2.0, 3.0))
    losses = {1.0: 2.0, 2.0: 1.5, 3.0: float("nan")}
    lines = [result(study, "yarn", "cream", 1, rate, loss) for rate, loss in losses.items()]
    assert study.cells.score(lines[1]) == pytest.approx(2.5)  # plus one nat of text loss
    found = {line["run"]: line for line in lines}
    assert study.cells.chosen_rate(settings, "yarn", found) == 2.0
    assert study.cells.chosen_rate(settings, "ntk", found) is None
    report = study.report.Results([*lines, result(study, "yarn", "cream", 2, 1.0, 9.0)])
    assert report.chosen == {"yarn": 2.0} and [e["rate"] for e in report.of("yarn", "cream", 4)] == [2.0]


def test_the_report_compares_differences_with_the_spread(study, tmp_path):
    lines = [result(study, "ntk", "base", 0, None, 5.0)]
    for seed, (cream, pose, pi) in enumerate([(0.80, 0.50, 0.6), (0.82, 0.52, 0.9), (0.81, 0.51, 0.3)], 1):
        lines += [
            result(study, "ntk", "cream", seed, 1.0, 1.0, cream),
            result(study, "ntk", "pose", seed, 1.0, 1.0, pose),
        ]
        lines.append(result(study, "ntk", "pi", seed, 1.0, 1.0, pi))
        lines.append(result(study, "yarn", "cream", seed, 1.0, 1.0, cream + 0.1))
    results = study.report.Results(lines)
    text = study.report.report(results)
    assert "| ntk | cream | 3 | 81.0 ± 1.0 | 81.0 ± 1.0 |" in text and "| ntk | (not trained) | 1 | 50.0 |" in text
    assert "| ntk | cream - pose | +30.0 ± 0.8 | yes | +0.000 ± 0.000 | no | +0.0000 ± 0.0000 | no |" in text
    assert "| ntk | cream - pi | +21.0 ± 17.3 | no |" in text
    assert "| cream | yarn - ntk | +10.0 ± 0.8 | yes |" in text
    alone = [line | {"factor": 2, "run": f"{line['run']} s2"} for line in lines[1:3]]  # one seed of each sampler
    both = study.report.report(study.report.Results([*lines, *alone]))
    assert both.count("| ntk | pose | 1 |") > 0 and both.count("**Pairs**") == text.count("**Pairs**") == 1
    study.report.draw(results, tmp_path)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("retrieval", "depth", "perplexity"))


ENCODE = lambda text: list(text.encode())
FILLER = [np.frombuffer(b"some text of a book\n" * 800, dtype=np.uint8).astype(np.int64)]


@pytest.mark.parametrize("task, questions", [("needle", 1), ("multikey", 4), ("lines", 4)])
def test_prompts_state_what_they_ask_for(study, task, questions):
    prompts = study.retrieval.PromptWriter(ENCODE, FILLER).prompts(task, 3000, 6, questions)
    assert prompts.tokens.shape == (6, 3000) and prompts.answers.shape == (6, questions, 3)
    for tokens, answers in zip(prompts.tokens, prompts.answers):
        text = bytes(tokens.tolist()).decode()
        for first, end, depth in answers:
            fact = text[text.rindex("The number of", 0, first) : end] + "."
            stated = text.index(fact)
            assert fact.endswith(f" is{text[first:end]}.") and len(text[first:end]) == 6
            assert stated < 3000 - len(fact) and text.count(fact) == 2
            assert stated / first == pytest.approx(depth / 1000, abs=0.2)
    again = study.retrieval.PromptWriter(ENCODE, FILLER).prompts(task, 3000, 6, questions)
    np.testing.assert_array_equal(prompts.tokens, again.tokens)


def test_an_answer_counts_when_all_its_tokens_are_the_likeliest(study, monkeypatch):
    """Score two answers of three tokens each: all tokens of one are the likeliest, all but one of the other."""
    tokens = np.arange(2 * 20, dtype=np.uint16).reshape(2, 20)
    answers = np.array([[[14, 17, 100], [8, 11, 950]]] * 2)
    marked = []

    def scores(model, tokens, marks):
        marked.append(np.flatnonzero(marks).tolist())
        return np.array([[1.0, 1.0, 4.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]])

    monkeypatch.setattr(study.retrieval, "_scores", scores)
    found = study.retrieval._of_prompts(None, study.retrieval.Prompts(tokens, answers))
    assert marked == [[7, 8, 9, 13, 14, 15]] * 2  # the labels at these places are the answers
    assert (found["accuracy"], found["loss"], found["answers"]) == (0.5, 1.0, 4)
    assert found["by_depth"] == {"1": [1.0, 0.0, 2], "9": [0.0, 2.0, 2]} and found["by_prompt"] == [[0.5, 1.0]] * 2


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study_real")
    save_llama(folder / "hf", "llama-mqa-tied")
    sources = sorted((ROOT / "megatron_cream" / "checkpoint").glob("*.py"))
    text = "\n".join(file.read_text() for file in sources)[:60000]
    line = lambda start, kind: json.dumps({"text": text[start : start + 9000], "kind": kind}) + "\n"
    (folder / "train.jsonl").write_text("".join(line(900 * i, "") for i in range(8)))
    (folder / "held.jsonl").write_text("".join(line(9000 * i, kind) for i, kind in enumerate(("code", "manual"))))
    files = ["--hf", folder / "hf", "--train", folder / "train.jsonl", "--held", folder / "held.jsonl"]
    size = "--window 256 --factors 4 --steps 2 --batch 2 --micro-batch 1 --rates 1e-3 --seeds 1 --prompts 1 1 1".split()
    extra = "--questions 2 --texts 1 --workers 1 -- --lr-warmup-iters 0 --num-workers 0 --log-interval 1".split()
    made = run(STUDY / "prepare.py", *files, "--output", folder / "data", *size, *extra)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("positions:") == 4 * 6 + 2 + 3 + 2  # every cell was checked
    return folder


def test_the_command_resumes_at_what_is_missing(prepared):
    """A failed evaluation is retried once, then skipped. A new start evaluates the run without training again."""
    data, out = prepared / "data", prepared / "out"
    command = [STUDY / "study.py", "--data", data, "--output", out, "--no-ahead", "--cells"]
    (data / "evaluation.npz").rename(prepared / "away.npz")
    first = run(*command, "yarn,cream")
    assert first.returncode == 0 and first.stdout.count("failed after") == 2, first.stdout + first.stderr
    assert (out / "failed.log").read_text().count("evaluation.npz") >= 2
    (prepared / "away.npz").rename(data / "evaluation.npz")
    second = run(*command, "yarn,cream", "none,base")
    assert "over: 2 cells have results, 0 are left" in second.stdout, second.stdout + second.stderr
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(line["what"], line["sampler"]) for line in lines] == [
        ("training", "cream"),
        ("evaluation", "cream"),
        ("evaluation", "base"),
    ]
    assert set(lines[0]["losses"]) == {"1", "2"} and lines[0]["seconds"] > 0
    for line in lines[1:]:
        assert set(line["tasks"]) == {"needle", "multikey", "lines"} and set(line["perplexity"]) == {"code", "manual"}
        assert list(line["tasks"]["lines"]) == ["256", "512", "1024"]
    ended = run(*command, "yarn,cream long end")
    assert "over: 3 cells have results, 0 are left" in ended.stdout, ended.stdout + ended.stderr
    trained = json.loads((out / "results.jsonl").read_text().splitlines()[3])
    assert (trained["sampler"], list(trained["losses"])) == ("cream long end", ["1", "2"])
    assert not list((out / "runs").glob("*end*/"))
    third = run(*command, "yarn,cream", "none,base")
    assert "GPU 0" not in third.stdout and "over: 3 cells have results" in third.stdout, third.stdout + third.stderr
    report = run(STUDY / "report.py", "--results", out / "results.jsonl", "--output", out)
    assert report.returncode == 0 and "| yarn | cream | 1 |" in (out / "report.md").read_text(), report.stderr
    for name in ("tradeoff", "retrieval", "depth", "perplexity"):
        assert (out / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "command, word",
    [("study.py --data DATA --output OUT", "settings.json"), ("report.py --results FILE --output OUT", "FILE")],
)
def test_missing_data_prints_one_line(tmp_path, command, word):
    (tmp_path / "FILE").touch()
    name, *flags = command.split()
    ended = run(STUDY / name, *(str(tmp_path / flag) if flag.isupper() else flag for flag in flags))
    assert ended.returncode == 2 and word in ended.stderr and ended.stderr.count("\n") == 1
