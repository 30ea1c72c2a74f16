"""Long evaluation during training, tested in one process: scores against transformers, prompts, time, flags."""

import io
import math
import random
import re
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.common.errors import UsageError
from megatron_cream.config import parse
from megatron_cream.data import embedded
from megatron_cream.data.tokenizers import load_tokenizer
from megatron_cream.evaluation.long_evaluation import Result, Score, Settings
from megatron_cream.evaluation.models.megatron_model import MegatronModel
from megatron_cream.evaluation.models.tokenizer import TrainingTokenizer
from megatron_cream.evaluation.recall import PLACES, Recall, build_recall_texts, measure_recall
from megatron_cream.evaluation.teacher_forced import ScoredText, score_texts
from megatron_cream.training import progress
from megatron_cream.training import watch as watch_module
from tests.evaluation_models import small_tokenizer
from tests.hf_models import save_model
from tests.launch import write_documents
from tests.process_groups import leave_process_group

VOCABULARY = 1003


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the same random Llama as our Megatron model and in transformers."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "hf", "llama-gqa-odd-vocabulary")
    import_hf(HfFolder(folder / "hf"), folder / "ckpt")
    ours = MegatronModel(
        MegatronCheckpoint(folder / "ckpt"),
        dtype=torch.float32,
        prefill_chunk=64,
        tokenizer=None,
        stop_ids=frozenset(),
        max_positions=512,
    )
    yield ours, AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="eager").eval()
    leave_process_group()


def some_texts(lengths_and_firsts) -> list[ScoredText]:
    rng = np.random.default_rng(5)
    return [ScoredText(rng.integers(0, VOCABULARY, size=n), first) for n, first in lengths_and_firsts]


@torch.no_grad()
def test_scores_are_those_of_the_whole_logits(models):
    """Texts are as long as the length, shorter, or one token longer; one, some or all tokens are scored."""
    ours, theirs = models
    texts = some_texts([(40, 30), (33, 1), (41, 40), (2, 1), (40, 39)])
    # Make half of the scored tokens the likeliest ones, which random tokens hardly ever are.
    for i, text in enumerate(texts):
        for place in range(text.first, len(text.tokens), 2):
            text.tokens[place] = theirs(torch.from_numpy(text.tokens[None, :place])).logits[0, -1].argmax()
        texts[i] = text
    sums = score_texts([ours._model], texts, length=40)
    for (nll, count, likeliest), text in zip(sums.tolist(), texts, strict=True):
        tokens = torch.from_numpy(text.tokens)
        logits = theirs(tokens[None, :-1]).logits[0, text.first - 1 :]
        expected = torch.nn.functional.cross_entropy(logits.double(), tokens[text.first :], reduction="sum")
        assert nll == pytest.approx(expected.item(), rel=1e-5)
        assert count == len(text.tokens) - text.first
        assert likeliest == (logits.argmax(-1) == tokens[text.first :]).sum() > 0


@torch.no_grad()
def test_recalled_is_what_greedy_decoding_answers(models):
    """Answers of cached generation count as recalled; with one token changed they do not."""
    ours, _ = models
    prompts = [text.tokens for text in some_texts([(50, 1), (50, 1), (31, 1)])]
    answers = ours.generate([p.tolist() for p in prompts], 8, temperature=0.0, top_p=1.0, seeds=[0] * 3)
    texts = [ScoredText(np.array([*p, *a]), len(p)) for p, a in zip(prompts, answers, strict=True)]
    found = measure_recall([ours._model], texts, length=64)
    assert (found.accuracy, found.tokens) == (1.0, 1.0) and found.loss > 0
    changed = [ScoredText(text.tokens.copy(), text.first) for text in texts]
    for place, text in zip((0, 3, 7), changed, strict=True):
        text.tokens[text.first + place] = (text.tokens[text.first + place] + 1) % VOCABULARY
    assert measure_recall([ours._model], changed, length=64).accuracy == 0
    assert measure_recall([ours._model], [*texts[:2], changed[2]], length=64).accuracy == pytest.approx(2 / 3)


@pytest.fixture(scope="module", params=["hugging-face", "embedded"])
def tokenizer(request, tmp_path_factory):
    if request.param == "hugging-face":
        return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return TrainingTokenizer(load_tokenizer("SentencePieceTokenizer", embedded.prepare().tokenizer_model))


@pytest.mark.parametrize("task", ["needle", "kv"])
def test_prompts_end_with_their_answers(tokenizer, task):
    """The scored tokens are the answer, the prompt contains the answer, and the whole text fits."""
    texts = build_recall_texts(tokenizer, task, 700, samples=2)
    assert len(texts) == 2 * PLACES
    for text in texts:
        before, answer = (tokenizer.decode(part.tolist()) for part in np.split(text.tokens, [text.first]))
        answer = answer.strip(' "')
        assert len(answer) == {"needle": 7, "kv": 36}[task]
        assert before.count(answer) == 1 and before.index(answer) < before.rindex(
            {"needle": "magic", "kv": "Key"}[task]
        )
        assert 600 < len(text.tokens) <= 701
    again = build_recall_texts(tokenizer, task, 700, samples=2)
    assert all(np.array_equal(one.tokens, other.tokens) for one, other in zip(texts, again, strict=True))
    places = [
        tokenizer.decode(t.tokens.tolist()).index(tokenizer.decode(t.tokens[t.first :].tolist()).strip(' "'))
        for t in texts
    ]
    assert places[-1] > 5 * places[0]


def test_a_length_too_short_for_a_task_prints_one_line(tokenizer):
    with pytest.raises(UsageError, match="--long-eval-lengths 64: .* too short for needle, which takes"):
        build_recall_texts(tokenizer, "needle", 64, samples=1)


def test_score_is_the_mean_over_tasks_and_lengths():
    recalls = {
        "needle": {512: Recall(1.0, 1.0, 0.5), 1024: Recall(0.5, 0.9, 1.5)},
        "kv": {512: Recall(0.0, 0.2, 4.0), 1024: Recall(0.5, 0.6, 2.0)},
    }
    perplexity = {512: 2.0, 1024: 8.0}
    assert Result(recalls, perplexity, "accuracy").score == Score("accuracy", 0.5, 2.0)
    score = Result(recalls, perplexity, "perplexity").score
    assert score.value == pytest.approx(4.0) and score.loss == pytest.approx(math.log(4.0))


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.5, 1.0, 3.0, math.nan])), min_size=1))
def test_the_best_is_kept_in_whatever_order_scores_come(scores):
    best = None
    for value, loss in scores:
        score = Score("accuracy", value, loss)
        best = score if score.is_better_than(best) else best
    sound = [(value, -loss) for value, loss in scores if not math.isnan(loss)]
    assert (best and (best.value, -best.loss)) == max(sound, default=None)


def test_lower_perplexity_is_better():
    assert Score("perplexity", 3.0, math.log(3.0)).is_better_than(Score("perplexity", 4.0, math.log(4.0)))
    assert not Score("perplexity", 4.0, math.log(4.0)).is_better_than(Score("perplexity", 4.0, math.log(4.0)))


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@settings(max_examples=60, deadline=None)
@given(
    share=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    interval=st.integers(1, 7),
    cost=st.floats(0.1, 50.0),
    seed=st.integers(0, 99),
)
@example(share=0.01, interval=1, cost=0.15, seed=0)  # decided by rounding in the last bit
def test_evaluations_stay_within_their_share_of_time(share, interval, cost, seed):
    """Only the first and last evaluations may exceed the share, and none is skipped that would fit."""
    rng, clock, stream = random.Random(seed), Clock(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch_module, "time", clock)
        patch.setattr(watch_module, "_broadcast_from_rank_0", bool)
        patch.setattr(watch_module, "_is_last_rank", lambda: True)
        patch.setattr(watch_module, "log_values", lambda *_: None)

        def evaluation(_):
            clock.now += cost
            return Result({}, {8: 2.0})

        line = progress.StepLine(total_steps=200, tokens_per_step=1, ranks=1, flops_per_token=1.0, stream=stream)
        chosen = Settings(("perplexity",), [8], 1, [], interval=interval, share=share, score=None, folder=None)
        watch = watch_module.Watch(evaluation, chosen, None, line)
        clock.now, spent, done, first = 0.0, 0.0, 0, True
        for step in range(1, 201):
            clock.now += rng.uniform(0.1, 2.0)
            room = (spent + cost) / (clock.now + cost) <= share
            due = watch.is_due(step)
            assert due == (step == 200 or (step % interval == 0 and (first or room)))
            if due:
                watch.evaluate([torch.nn.Linear(1, 1)], step)
                spent, done, first = spent + cost, done + 1, False
        said = stream.getvalue().splitlines()
        assert len(said) == 200 // interval + (200 % interval != 0)
        assert sum("skipped" in line for line in said) == len(said) - done
        took, part = map(float, re.search(r"\| ([\d.]+) s, ([\d.]+) % of the time so far", said[-1]).groups())
        assert took == pytest.approx(cost, abs=0.051) and part == pytest.approx(100 * spent / clock.now, abs=0.051)


def test_values_go_to_tensorboard_and_to_wandb(monkeypatch):
    import megatron.training

    board, wandb = Mock(), Mock()
    monkeypatch.setattr(megatron.training, "get_tensorboard_writer", lambda: board)
    monkeypatch.setattr(megatron.training, "get_wandb_writer", lambda: wandb)
    progress.log_values({"a": 1.0, "b": 2.0}, 7)
    assert board.add_scalar.call_args_list == [call("a", 1.0, 7), call("b", 2.0, 7)]
    assert wandb.log.call_args_list == [call({"a": 1.0, "b": 2.0}, 7)]


GOOD = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 128,
    "target_length": 512,
    "micro_batch_size": 1,
    "train_iters": 2,
    "rope_scaling_type": "linear",
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 100,
    "long_eval_interval": 10,
    "long_eval_tasks": "perplexity",
    "save": "somewhere",
}
BAD = [
    ({"long_eval_interval": 0}, ["--long-eval-interval 0", "1 or more"]),
    ({"long_eval_samples": 0}, ["--long-eval-samples 0", "1 or more"]),
    ({"long_eval_share": 0.0}, ["--long-eval-share 0.0", "above 0"]),
    ({"long_eval_share": 10.0}, ["--long-eval-share 10.0", "at most 1"]),
    ({"long_eval_tasks": "perplexity,needles"}, ["'needles'", "needle, kv, perplexity"]),
    ({"long_eval_tasks": "needle"}, ["--long-eval-tasks needle", "--tokenizer-type NullTokenizer"]),
    ({"long_eval_lengths": [128, 1024]}, ["--long-eval-lengths 1024", "512 positions", "--target-length"]),
    ({"long_eval_lengths": [1]}, ["--long-eval-lengths 1", "2 or more"]),
    ({"save": None}, ["--save is missing", "--long-eval-best none"]),
    ({"long_eval_best": "accuracy"}, ["--long-eval-best accuracy", "--long-eval-tasks perplexity"]),
    ({"ckpt_format": "torch"}, ["--ckpt-format torch", "torch_dist"]),
    ({"long_eval_interval": None}, ["--long-eval-tasks perplexity", "--long-eval-interval"]),
    ({"context_parallel_size": 2, "long_eval_lengths": [130]}, ["--long-eval-lengths 130", "--context-parallel-size"]),
]


def read(monkeypatch, tmp_path, changed: dict):
    data = write_documents(tmp_path / "documents", documents=4, shortest=200, longest=900)
    recipe = {k: v for k, v in (GOOD | {"data_path": str(data)} | changed).items() if v is not None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("WORLD_SIZE", str(changed.get("context_parallel_size", 1)))
    return parse.read(["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("changed, words", BAD, ids=lambda value: str(value)[:40])
def test_bad_input_prints_one_line(changed, words, monkeypatch, tmp_path):
    with pytest.raises(UsageError) as caught:
        read(monkeypatch, tmp_path, changed)
    assert "\n" not in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_defaults_follow_from_the_run(monkeypatch, tmp_path):
    args = read(monkeypatch, tmp_path, {})
    assert (args.long_eval_lengths, args.long_eval_best) == ([512], "perplexity")
    args = read(monkeypatch, tmp_path, {"long_eval_lengths": [512, 128], "long_eval_best": "none", "save": None})
    assert args.long_eval_lengths == [128, 512]
