"""The step line and warnings of a run."""

import functools
import io

import pytest
from megatron.training import training, utils

from megatron_cream.training import progress
from megatron_cream.training.progress import StepLine, print_steps


def shown(losses):
    stream = io.StringIO()
    line = StepLine(total_steps=1000, tokens_per_step=1, ranks=1, flops_per_token=1.0, stream=stream)
    for step, loss in enumerate(losses, 1):
        line.show(step, loss, 1e-4, 1.0, 2**30)
    return stream.getvalue()


def test_a_loss_spike_is_reported_once():
    usual = [3.0 + 0.01 * (i % 5) for i in range(40)]
    text = shown([*usual, 4.5, *usual])
    assert text.count("warning:") == 1
    assert "warning: step 41: loss spike: 4.5000, median 3.0200" in text


def test_no_warning_at_the_start_nor_of_noise():
    assert "warning" not in shown([10.0, 5.0, 9.0, 4.0, 8.0])
    assert "warning" not in shown([3.0 + 0.2 * (i % 3) for i in range(200)])


def test_a_nan_loss_does_not_hide_the_next_spike():
    text = shown([3.0] * 30 + [float("nan"), 6.0])
    assert text.count("warning:") == 1 and "step 32" in text


@pytest.mark.parametrize("step, interval, apart", [(11, 1, False), (11, 10, True), (20, 10, False)])
def test_the_first_step_is_excluded_from_the_rate(step, interval, apart, monkeypatch):
    """A logged first step is not marked as first: Megatron would add its loss to the next interval."""
    told = []

    @functools.wraps(training.training_log)
    def log(*_, is_first_iteration):
        told.append(is_first_iteration)

    monkeypatch.setattr(training, "training_log", log)
    monkeypatch.setattr(utils, "is_last_rank", lambda: False)
    monkeypatch.setattr(progress, "peak_memory", lambda: 0)
    line = StepLine(total_steps=1000, tokens_per_step=1, ranks=1, flops_per_token=1.0, stream=io.StringIO())
    with print_steps(line, interval):
        training.training_log({}, {}, 1e-4, step, 1.0, False, 0, 1.0, is_first_iteration=True)
    assert told == [apart]
