"""Every task of evaluate.py has a summary, a table, a picture and rows in a comparison."""

import pytest

from megatron_cream.commands.evaluate import RUNS
from megatron_cream.evaluation import pictures, report
from megatron_cream.evaluation.comparison import measures
from megatron_cream.evaluation.flags import build_parser
from megatron_cream.evaluation.runner import summarise_perplexity
from tests.evaluation_models import is_picture

WITHOUT_PICTURE = {"harness", "suite", "compare"}  # lm_eval prints its own table; a suite and a comparison have others
SCORES = [
    dict(name=f"{length}/{depth}", part="4_pairs", length=length, depth=depth, score=0.5, prompt_tokens=9)
    for length in (4096, 8192)
    for depth in (0.0, 1.0)
]
LOSSES = [dict(name="book", tokens=99, lengths={"50": dict(nll=1.0, tokens=9), "99": dict(nll=0.5, tokens=9)})]


def test_every_command_runs():
    (commands,) = (action for action in build_parser("")._actions if action.dest == "command")
    assert commands.choices.keys() == RUNS.keys()


@pytest.mark.parametrize("task", sorted(RUNS.keys() - WITHOUT_PICTURE))
def test_a_finished_task_is_shown(task, tmp_path):
    """A task that is missing in one of these would fail after its whole run."""
    summary = summarise_perplexity(LOSSES) if task == "perplexity" else report.summarise(task, SCORES)
    assert report.build_table(task, summary).row_count
    pictures.draw(task, summary, tmp_path / "picture.png")
    assert is_picture(tmp_path / "picture.png")


@pytest.mark.parametrize("task", sorted(RUNS.keys() - {"suite", "compare"}))
def test_a_task_has_tables_in_a_comparison(task):
    assert task in measures._TABLES
