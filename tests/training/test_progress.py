"""What a person watching a run reads."""

import io

from megatron_cream.training.progress import StepLine


def shown(losses):
    stream = io.StringIO()
    line = StepLine(total_steps=1000, tokens_per_step=1, ranks=1, flops_per_token=1.0, stream=stream)
    for step, loss in enumerate(losses, 1):
        line.show(step, loss, 1e-4, 1.0, 2**30)
    return stream.getvalue()


def test_loss_spike_is_said_once():
    usual = [3.0 + 0.01 * (i % 5) for i in range(40)]
    text = shown([*usual, 4.5, *usual])
    assert text.count("warning:") == 1
    assert "warning: step 41: loss spike, 4.5000 where 3.0200 is usual" in text


def test_no_warning_at_the_start_nor_of_noise():
    assert "warning" not in shown([10.0, 5.0, 9.0, 4.0, 8.0])
    assert "warning" not in shown([3.0 + 0.2 * (i % 3) for i in range(200)])


def test_a_loss_that_is_no_number_does_not_hide_the_next_spike():
    text = shown([3.0] * 30 + [float("nan"), 6.0])
    assert text.count("warning:") == 1 and "step 32" in text
