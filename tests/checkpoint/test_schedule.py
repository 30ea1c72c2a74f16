"""Runs resume with another number of ranks, batch or length: what the error says, and what its advice does."""

import itertools
import re
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_cream.checkpoint.start import FoundCheckpoint
from megatron_cream.common.errors import UsageError
from megatron_cream.config.checks import schedule
from tests.evaluation_models import save_llama
from tests.launch import torchrun, write_documents

FLAGS = "--split 90,10,0 --seq-length 64 --lr 1e-3 --eval-iters 0 --fp32 --num-workers 0 --log-interval 1".split()
SAVED, STEPS = 3, 6
OVERRIDE, KEEP = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a model, data and checkpoints of one rank.

    one, two: at step 3 of 6, with a micro-batch of 1 and 2; rates: their learning rates without interruption. done: one
    at its end; pair: at the end of a run with a global batch of 2.
    """
    folder = tmp_path_factory.mktemp("schedule")
    save_llama(folder / "hf")
    write_documents(folder / "data")
    for name, micro, *flags in (
        ("one", 1, "--exit-interval", SAVED),
        ("two", 2, "--exit-interval", SAVED),
        ("done", 1),
        ("pair", 1, "--global-batch-size", 2),
    ):
        ended, _ = run(1, folder, name, "--micro-batch-size", micro, "--save", folder / name, *flags)
        assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def run(ranks, folder, events, *flags, steps=STEPS):
    """Train, and return the ended process and step -> learning rate after it, which is 0 at the end of a decay."""
    data = ["--load-hf", folder / "hf", "--data-path", folder / "data", "--train-iters", steps]
    where = folder / "events" / events
    ended = torchrun(ranks, *FLAGS, *data, "--tensorboard-dir", where, *flags)
    found = EventAccumulator(str(where)).Reload() if where.exists() else None
    rates = found.Scalars("learning-rate") if found and "learning-rate" in found.Tags()["scalars"] else []
    return ended, {event.step: event.value for event in rates}


def read_error(ended) -> tuple[str, str, list[list[str]]]:
    """Return what a run was saved with, what the flags set, and the flags of each advice, of a one-line error."""
    assert ended.returncode == 1, ended.stderr[-3000:]  # of torchrun
    (line,) = [line for line in ended.stderr.splitlines() if "was saved with" in line]
    return split_error(line)


def split_error(line: str) -> tuple[str, str, list[list[str]]]:
    saved, ours, advice = re.search(r"was saved with (.*), but these flags set (.*)\. Give (.*)\.$", line).groups()
    return saved, ours, [part.partition(" for the ")[0].split() for part in advice.split(", or ")]


@pytest.mark.parametrize("name, micro, batch", [("one", 1, 1), ("two", 2, 2)])
def test_more_ranks_keep_the_schedule_by_the_saved_batch(runs, tmp_path, name, micro, batch):
    """The default global batch grows with the ranks. The advice gives the learning rates of an uninterrupted run."""
    flags = ["--micro-batch-size", micro, "--load", runs / name]
    saved, ours, advice = read_error(run(2, runs, f"{name} fails", *flags)[0])
    assert saved == f"--global-batch-size {batch}"
    assert ours.startswith(f"--global-batch-size {2 * batch} (--micro-batch-size {micro} x 2 data-parallel ranks)")
    assert all("iters" not in said for said in (saved, ours))
    same, other = advice
    given = ["--global-batch-size", str(batch), *(["--micro-batch-size", "1"] if batch == 2 else [])]
    assert same[: len(given)] == given
    alone = run(1, runs, f"{name} alone", "--micro-batch-size", micro)[1]
    if batch == 1:  # cannot be split over two data-parallel ranks: the ranks split each sample
        assert " ".join(same[2:]) == "on 1 data-parallel rank"
        given += ["--context-parallel-size", 2]
    ended, rates = run(2, runs, f"{name} same", *flags, *given)
    assert rates == {step: pytest.approx(alone[step]) for step in range(SAVED + 1, STEPS + 1)}, ended.stderr[-3000:]
    assert other[0] == OVERRIDE
    ended, rates = run(2, runs, f"{name} other", *flags, *other)
    assert rates.keys() == {4, 5, 6} and min(rates.values()) > 0, ended.stderr[-3000:]
    assert "warning" not in ended.stderr


def test_a_longer_run_takes_the_schedule_of_its_flags(runs):
    """The saved schedule has ended, so that the other flag trains the added steps at the minimum rate, and says so."""
    flags = ["--micro-batch-size", 1, "--load", runs / "done"]
    saved, ours, advice = read_error(run(1, runs, "longer fails", *flags, steps=9)[0])
    assert (saved, ours, advice) == ("--train-iters 6", "--train-iters 9", [[OVERRIDE]])
    ended, rates = run(1, runs, "longer", *flags, OVERRIDE, steps=9)
    assert rates.keys() == {7, 8, 9} and rates[7] > rates[8] > rates[9] == 0, ended.stderr[-3000:]
    assert "minimum rate" not in ended.stderr
    ended, rates = run(1, runs, "longer at 0", *flags, KEEP, steps=9)
    assert rates == {7: 0, 8: 0, 9: 0}, ended.stderr[-3000:]
    (line,) = [line for line in ended.stderr.splitlines() if "minimum rate" in line]
    assert line.startswith(f"warning: {KEEP}: ") and "last 3 steps" in line and f"Use {OVERRIDE} for" in line


def test_a_smaller_batch_does_not_end_the_decay_before_the_run(runs):
    """12 samples have been seen; nine steps of one sample would end the decay before the first of them."""
    flags = ["--micro-batch-size", 1, "--load", runs / "pair"]
    saved, ours, advice = read_error(run(1, runs, "smaller fails", *flags, steps=9)[0])
    assert saved == "--global-batch-size 2 --train-iters 6" and "--train-iters 9" in ours
    assert advice == [[OVERRIDE, "--lr-decay-iters", "15"]]
    ended, rates = run(1, runs, "smaller at 0", *flags, OVERRIDE, steps=9)
    assert rates == {7: 0, 8: 0, 9: 0}, ended.stderr[-3000:]
    (line,) = [line for line in ended.stderr.splitlines() if "minimum rate" in line]
    assert line.endswith("Add --lr-decay-iters 15")
    ended, rates = run(1, runs, "smaller", *flags, *advice[0], steps=9)
    assert rates.keys() == {7, 8, 9} and rates[7] > rates[8] > rates[9] == 0, ended.stderr[-3000:]
    assert "minimum rate" not in ended.stderr


def test_each_difference_is_named_at_once(runs):
    """Following the first advice leads to no second error: the run is that of the saved schedule."""
    flags = ["--micro-batch-size", 1, "--load", runs / "one", "--weight-decay", 0.2, "--lr-decay-iters", 5]
    flags += ["--lr-warmup-fraction", 0.5]
    saved, ours, advice = read_error(run(1, runs, "many fails", *flags, steps=8)[0])
    assert saved == "--weight-decay 0.01 --train-iters 6 --lr-decay-iters 6 --lr-warmup-iters 0"
    assert ours == "--weight-decay 0.2 --train-iters 8 --lr-decay-iters 5 --lr-warmup-fraction 0.5"
    ended, rates = run(1, runs, "many same", "--micro-batch-size", 1, "--load", runs / "one", *advice[0])
    assert rates.keys() == {4, 5, 6}, ended.stderr[-3000:]


def test_a_schedule_that_was_kept_is_described_in_samples(runs, tmp_path):
    """A run that kept an earlier schedule has a checkpoint with lengths that its own flags do not give."""
    shutil.copytree(runs / "done", tmp_path / "kept")
    flags = ["--micro-batch-size", 1, "--load", tmp_path / "kept", "--save", tmp_path / "kept"]
    assert run(1, runs, "kept", *flags, KEEP, steps=8)[0].returncode == 0
    saved, ours, advice = read_error(run(1, runs, "kept fails", *flags, steps=9)[0])
    assert (saved, ours) == ("a schedule of 6 samples (warm-up 0, weight decay 6)",
                             "a schedule of 9 samples (warm-up 0, weight decay 9)")  # fmt: skip
    assert advice == [[OVERRIDE]]


def settings_of(steps: int, batch: int, ranks: int, **more) -> Namespace:
    """Return Megatron's flags of a run with a linear decay over its steps and one sample a rank and step."""
    values = dict(lr=1.0, min_lr=0.0, lr_decay_style="linear", start_weight_decay=0.0, end_weight_decay=0.0)
    values |= dict(weight_decay_incr_style="constant", train_iters=steps, train_samples=None, lr_warmup_iters=0)
    values |= dict(lr_warmup_fraction=None, lr_decay_iters=None, global_batch_size=batch, micro_batch_size=1)
    values |= dict(data_parallel_size=ranks, override_opt_param_scheduler=False, no_load_optim=False, skip_train=False)
    return Namespace(**values | dict(use_checkpoint_opt_param_scheduler=False) | more)


counts = st.integers(1, 8)


@given(
    saved_batch=counts,
    saved_steps=counts,
    saved_ranks=counts,
    ranks=counts,
    accumulate=st.integers(1, 3),
    data=st.data(),
)
def test_no_advice_trains_at_the_minimum_rate(saved_batch, saved_steps, saved_ranks, ranks, accumulate, data):
    """Compare with the samples at which each step begins. A flag that trains at rate 0 is followed by a warning."""
    step = data.draw(st.integers(1, saved_steps))
    steps = data.draw(st.integers(step + 1, 12))
    seen, end = step * saved_batch, saved_steps * saved_batch
    saved = dict(max_lr=1.0, min_lr=0.0, lr_decay_style="linear", start_wd=0.0, end_wd=0.0, wd_incr_style="constant")
    saved |= dict(lr_warmup_steps=0, lr_decay_steps=end, wd_incr_steps=end, num_steps=seen)
    found = FoundCheckpoint(
        "--load", Path(f"run/iter_{step:07d}"), settings_of(saved_steps, saved_batch, saved_ranks),
        SimpleNamespace(common={"opt_param_scheduler": saved}),
    )  # fmt: skip
    args = settings_of(steps, ranks * accumulate, ranks)

    def late(decay: int, batch: int, last: int = steps) -> int:
        return sum(seen + i * batch >= decay for i in range(last - step))

    for flag, decay in (("override", steps * args.global_batch_size), ("use_checkpoint", end)):
        vars(args)[f"{flag}_opt_param_scheduler"] = True
        line, number = schedule.warn_of_minimum_rate(args, found), late(decay, args.global_batch_size)
        assert ("minimum rate" in line and f"last {number} steps" in line) if number else not line
        vars(args)[f"{flag}_opt_param_scheduler"] = False
    if end == steps * args.global_batch_size:
        return schedule.check(args, found)
    with pytest.raises(UsageError) as error:
        schedule.check(args, found)
    _, _, advice = split_error(str(error.value))
    for words in advice:
        value = {name: int(number) for name, number in itertools.pairwise(words) if number.isdecimal()}
        batch = value.get("--global-batch-size", args.global_batch_size)
        if words[0] == OVERRIDE:
            assert late(value.get("--lr-decay-iters", steps) * batch, batch) == 0
        elif words[0] == KEEP:
            assert late(end, batch) == 0
        else:
            last = value.get("--train-iters", steps)
            assert (last * batch, late(end, batch, last)) == (end, 0) and last > step
            assert batch % value.get("on", ranks) == 0
