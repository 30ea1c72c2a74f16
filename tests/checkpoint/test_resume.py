"""Runs resume with another schedule, and with or without the distributed optimizer."""

import math
import shutil
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_cream.checkpoint.opening import open_step
from megatron_cream.checkpoint.start import FoundCheckpoint
from megatron_cream.common.errors import UsageError
from megatron_cream.config.checks import checkpoint as checkpoint_checks
from tests.launch import train, write_documents
from tests.selection import slow_but

STEPS, SAVED = 6, 3
SHARDED = ["--use-distributed-optimizer"]
OTHER = "--lr 2e-3 --min-lr 1e-4 --weight-decay 0.05 --lr-decay-style cosine --lr-warmup-iters 1".split()
OTHER += ["--train-iters", 8]
LAYOUTS = {
    "1 rank": (1, []),
    "1 rank, sharded": (1, SHARDED),
    "DP 2": (2, []),
    "DP 2, sharded": (2, SHARDED),
    "CP 2": (2, ["--context-parallel-size", 2]),
    "CP 2, sharded": (2, ["--context-parallel-size", 2, *SHARDED]),
    "TP 2": (2, ["--tensor-model-parallel-size", 2]),
    "TP 2, sharded": (2, ["--tensor-model-parallel-size", 2, *SHARDED]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with checkpoints at step 3 of runs with and without the distributed optimizer, and a data prefix."""
    folder = tmp_path_factory.mktemp("resume")
    write_documents(folder / "documents", documents=20)
    flags = ["--exit-interval", SAVED, "--save-interval", SAVED]
    run(1, folder, "plain", *flags, "--save", folder / "plain")
    run(2, folder, "sharded", *flags, "--save", folder / "sharded", *SHARDED)
    return folder


@pytest.fixture(scope="module")
def alone(runs):
    """Losses and learning rates of a run that was never interrupted."""
    return run(1, runs, "alone")


def run(ranks: int, folder: Path, name: str, *flags, fp32: bool = True) -> dict[int, tuple[float, float]]:
    """Train, and return step -> loss and learning rate."""
    data = ["--data-path", folder / "documents", "--split", "90,10,0", "--eval-iters", 0, "--train-iters", STEPS]
    losses = train(ranks, folder / f"events {name}", *data, *flags, fp32=fp32)
    events = EventAccumulator(str(folder / f"events {name}")).Reload()
    return {event.step: (losses[event.step], event.value) for event in events.Scalars("learning-rate")}


def saved_groups(folder: Path, step: int) -> list[dict]:
    state = open_step(folder / f"iter_{step:07d}", "--load").common["optimizer"]
    return state.get("optimizer", state)["param_groups"]


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "1 rank", "TP 2, sharded"))
def test_both_schedule_flags_resume(runs, alone, tmp_path, layout):
    """--use-checkpoint-opt-param-scheduler keeps the saved schedule, the other flag takes that of the flags."""
    ranks, flags = LAYOUTS[layout]
    flags = [*flags, "--load", runs / ("sharded" if flags[-1:] == SHARDED else "plain"), *OTHER]
    resumed = run(ranks, runs, f"{layout} saved", *flags, "--use-checkpoint-opt-param-scheduler")
    for step in range(SAVED + 1, STEPS + 1):
        assert resumed[step] == pytest.approx(alone[step], rel=1e-4), f"step {step}"
    given = run(ranks, runs, f"{layout} given", *flags, "--override-opt-param-scheduler", "--save", tmp_path)
    assert given.keys() == {4, 5, 6, 7, 8}
    for step, (_, rate) in given.items():  # --train-iters 8 with a warm-up of 1
        assert rate == pytest.approx(1e-4 + 1.9e-3 * (1 + math.cos(math.pi * (step - 1) / 7)) / 2)
    for group in saved_groups(tmp_path, 8):
        assert (group["max_lr"], group["min_lr"]) == (2e-3, 1e-4)
        assert group["weight_decay"] == 0.05 * group["wd_mult"]


@pytest.mark.parametrize("layout", slow_but(["1 rank", "DP 2", "CP 2", "TP 2"], "DP 2"))
def test_resuming_without_the_distributed_optimizer(runs, alone, layout):
    ranks, flags = LAYOUTS[layout]
    resumed = run(ranks, runs, f"{layout} without", *flags, "--load", runs / "sharded")
    for step in range(SAVED + 1, STEPS + 1):
        assert resumed[step] == pytest.approx(alone[step], rel=1e-5), f"step {step}"


@pytest.mark.slow
def test_resuming_without_the_distributed_optimizer_in_half_precision(runs, tmp_path):
    """The master weights have another name too; the losses equal those of a run with the distributed optimizer."""
    half = dict(fp32=False)
    flags = ["--exit-interval", SAVED, "--save-interval", SAVED, "--save", tmp_path / "half"]
    run(2, runs, "half", "--bf16", *flags, *SHARDED, **half)
    kept = run(2, runs, "half kept", "--bf16", "--load", tmp_path / "half", *SHARDED, **half)
    without = run(2, runs, "half without", "--bf16", "--load", tmp_path / "half", **half)
    assert kept.keys() == without.keys() == {4, 5, 6}
    for step in kept:
        assert without[step] == pytest.approx(kept[step], rel=1e-4), f"step {step}"


def test_smaller_batches_do_not_run_out_of_data(runs):
    """Megatron counts the samples of a run as if all batches had this size."""
    flags = ["--load", runs / "plain", "--override-opt-param-scheduler", "--global-batch-size", 4]
    assert run(1, runs, "smaller", *flags).keys() == {4, 5, 6}


@pytest.mark.parametrize("flags", [[], ["--ckpt-step", SAVED]], ids=["the only step", "a given step"])
def test_resuming_without_a_tracker_does_not_start_from_the_pretrained_weights(runs, alone, tmp_path, flags):
    """Megatron takes --pretrained-checkpoint where --load has no tracker, and starts from step 0."""
    save = shutil.copytree(runs / "plain", tmp_path / "run")
    (save / "latest_checkpointed_iteration.txt").unlink()
    flags = [*flags, "--pretrained-checkpoint", runs / "sharded", "--load", save, "--save", save]
    resumed = run(1, runs, f"untracked {len(flags)}", *flags)
    assert resumed.keys() == set(range(SAVED + 1, STEPS + 1))
    for step in resumed:
        assert resumed[step] == pytest.approx(alone[step], rel=1e-5), f"step {step}"


@pytest.mark.parametrize(
    "step, sharded, without_optimizer, is_refused",
    [(2, True, False, True), (4, True, False, False), (2, False, False, False), (2, True, True, False)],
)
def test_mp_rank_files_resume_with_the_optimizer_of_their_step(tmp_path, step, sharded, without_optimizer, is_refused):
    """Megatron reads the optimizer's files of the tracker's step. Only Megatron-LM saves them, so it is not run here."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    found = FoundCheckpoint("--load", tmp_path / f"iter_{step:07d}", Namespace(), None)
    args = Namespace(no_load_optim=without_optimizer, use_distributed_optimizer=sharded)
    words = "^--ckpt-step 2: .* only at step 4, .* add --no-load-optim.$"
    with pytest.raises(UsageError, match=words) if is_refused else nullcontext():
        checkpoint_checks._check_optimizer(args, found)
