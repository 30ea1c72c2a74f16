"""Short fault tests; tests/faults/ has the long ones."""

import multiprocessing
import os
import resource
import shutil
import signal
from argparse import Namespace
from multiprocessing import resource_sharer

import psutil
import pytest
import torch
import yaml
from megatron.training import checkpointing

from megatron_cream.checkpoint import start
from megatron_cream.common.errors import UsageError, is_dead_data_worker
from megatron_cream.config import fill
from megatron_cream.data.recent import RecentSamples
from megatron_cream.patches import tracker as tracker_patch
from megatron_cream.training import signals
from tests.faults.kill import (
    compare,
    kill,
    kill_under_torchrun,
    launch,
    newest,
    ranks,
    run_undisturbed,
    wait_for,
    writing,
)
from tests.launch import ROOT, write_documents


@pytest.mark.slow
def test_killed_runs_end_bit_identical(tmp_path):
    """After SIGKILL at random moments, also during checkpoints, the last checkpoints are bit-identical."""
    met = kill(tmp_path, kills=2, seed=3, steps=16)
    assert sum(met.values()) == 2


@pytest.mark.slow
def test_torchrun_restarts_killed_ranks(tmp_path):
    """With --max-restarts, --save and no --load, runs resume from the newest checkpoint and end bit-identical."""
    kill_under_torchrun(tmp_path, kills=1, seed=1, steps=16)


@pytest.mark.slow
def test_a_run_killed_before_its_first_tracker_resumes(tmp_path):
    """The checkpoint is found complete by its checksums, and the resumed run ends bit-identical."""
    documents, alone, cut = write_documents(tmp_path / "documents", documents=20), tmp_path / "alone", tmp_path / "cut"
    run_undisturbed(documents, alone, 4)
    shutil.copytree(alone / "iter_0000002", cut / "iter_0000002")
    words = run_undisturbed(documents, cut, 4)
    assert newest(cut) == 4 and "step 3/4" in words and "step 1/4" not in words, words[-3000:]
    compare(alone, cut, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, to, code", [("SIGTERM", "torchrun", 1), ("SIGUSR1", "torchrun", -10), ("SIGUSR1", 1, 0)]
)
def test_a_signal_saves_and_exits(tmp_path, number, to, code):
    """Signals that a cluster sends before it takes a machine save a checkpoint and end the run.

    They go to the launcher, or to one of two ranks and its child processes.
    """
    documents, save = write_documents(tmp_path / "documents", documents=20), tmp_path / "run"
    flags = ["--save", save, "--load", save, "--save-interval", 2, "--num-workers", 1]
    flags += ["--async-save"] if to == 1 else []
    process = launch(documents, save, 100_000, tmp_path / "log", flags=flags)
    wait_for(lambda: newest(save) >= 2, process)
    running = ranks(process)
    for each in [process] if to == "torchrun" else [*running[to].children(recursive=True), running[to]]:
        each.send_signal(getattr(signal, number))
    assert process.wait(timeout=300) == code
    gone, left = psutil.wait_procs(running, timeout=300)
    log = (tmp_path / "log").read_text()
    assert not left
    said = f"{number}: step {newest(save)} is saved in {save}; the same command resumes from it"
    assert said in log and (code != 0 or "Traceback" not in log), log[-3000:]
    assert not writing(save, newest(save))


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_loses_only_that_checkpoint(tmp_path, asynchronous):
    """If one of two ranks exceeds its file size limit, both continue, keep the previous checkpoint and print a line.

    If the limit is removed the run succeeds; if it remains the run fails.
    """
    documents, save = write_documents(tmp_path / "documents", documents=20), tmp_path / "run"
    flags = ["--save", save, "--load", save, "--save-interval", 2, "--deterministic"]
    flags += ["--async-save"] if asynchronous else []
    log = tmp_path / "log"
    process = launch(documents, save, 20, log, flags=flags)
    wait_for(lambda: newest(save) >= 2, process)
    for victim in (ranks(process)[1], *ranks(process)[1].children(recursive=True)):
        # Above the size of the log, which this rank writes too, and below that of its shard.
        victim.rlimit(psutil.RLIMIT_FSIZE, (250_000, resource.RLIM_INFINITY))
    wait_for(lambda: log.read_text().count("File too large (rank 1)") >= 2, process)
    before = newest(save)
    assert f"File too large (rank 1); the newest checkpoint is that of step {before}" in log.read_text()
    if not asynchronous:
        ranks(process)[1].rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    code, words = process.wait(timeout=300), log.read_text()
    whole = {path.name for path in save.glob("iter_*")}
    assert f"iter_{before + 2:07d}" not in whole, "the half-written folder is gone"
    if asynchronous:
        assert code == 1 and "error: the last checkpoint is missing: step 20" in words
        assert newest(save) == before and "step 20/20" in words
    else:
        assert code == 0 and newest(save) == 20, words[-3000:]
    settings = yaml.safe_load(next((save / "runs").glob("*.yaml")).read_text())
    assert settings["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # --deterministic


@pytest.mark.slow
def test_a_hanging_rank_ends_the_job_with_all_stacks(tmp_path):
    documents = write_documents(tmp_path / "documents", documents=20)
    script = (ROOT / "tests" / "faults" / "one_rank.py", "stuck", 1, 3)
    process = launch(documents, tmp_path, 100, tmp_path / "log", flags=["--timeout-minutes", 0.1], script=script)
    assert process.wait(timeout=300) == 1
    log = (tmp_path / "log").read_text()
    for rank, place in enumerate(["work.wait()", "stuck_data_loader"]):
        said = [line for line in log.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert "finished no step, evaluation batch or checkpoint in 0.1 minutes (--timeout-minutes)" in said[0]
        assert any(place in line for line in said), said
    assert "step 3/100" in log and "step 4/100" not in log


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_fails_alone_ends_the_job(tmp_path, ranks):
    """The job ends at once with the traceback, without waiting for peer ranks or data loader workers."""
    documents = write_documents(tmp_path / "documents", documents=20)
    script, flags = (ROOT / "tests" / "faults" / "one_rank.py", "memory", ranks - 1, 3), ["--num-workers", 1]
    process = launch(
        documents, tmp_path, 100, tmp_path / "log", f"--nproc_per_node={ranks}", flags=flags, script=script
    )
    assert process.wait(timeout=300) == 1
    log = (tmp_path / "log").read_text()
    assert "MemoryError: nothing is left" in log and "step 3/100" in log and "step 4/100" not in log
    assert log.count("Traceback (most recent call last):") == 2, "the rank's and torchrun's, none of a rank left alone"


@pytest.mark.slow
def test_a_killed_data_worker_prints_one_line(tmp_path):
    """Killed as by the out-of-memory killer: the job ends with one line and leaves no process."""
    documents, save = write_documents(tmp_path / "documents", documents=20), tmp_path / "run"
    flags = ["--save", save, "--load", save, "--save-interval", 2, "--num-workers", 1]
    process = launch(documents, save, 100_000, tmp_path / "log", flags=flags)
    wait_for(lambda: newest(save) >= 2, process)
    started = psutil.Process(process.pid).children(recursive=True)
    workers = [each for each in ranks(process)[1].children() if "pretrain_cream.py" in " ".join(each.cmdline())]
    workers[0].kill()
    assert process.wait(timeout=300) == 1
    assert not psutil.wait_procs(started, timeout=300)[1]
    log = (tmp_path / "log").read_text()
    assert "pretrain_cream.py: error: rank 1: a data loader worker died: " in log
    assert log.count("Traceback") == 1, "torchrun's"


def test_a_data_worker_killed_while_it_hands_over_a_batch_is_recognized():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()

    def worker():
        sender.send(resource_sharer.DupFd(1))
        os.kill(os.getpid(), signal.SIGKILL)

    process = context.Process(target=worker)
    process.start()
    handle = receiver.recv()
    process.join()
    with pytest.raises((OSError, EOFError)) as caught:
        handle.detach()
    assert is_dead_data_worker(caught.value)


def test_samples_of_a_step_keep_no_worker_file_open():
    samples = RecentSamples()
    names = ("sample", "document", "position_ids")
    samples.add(1, {name: torch.zeros(1, 2, dtype=torch.long).share_memory_() for name in names})
    assert not any(kept.is_shared() for batch in samples._batches for kept in batch.values())


def test_an_earlier_runs_folder_is_not_overwritten(tmp_path, monkeypatch):
    """The folder is rejected without --load, unless torchrun restarted the ranks of this job."""

    def check(**given):
        none = dict(load=None, skip_train=False, no_save_optim=None, ckpt_step=None, finetune=False)
        args = Namespace(**none | dict(save=str(tmp_path), no_load_optim=None, no_load_rng=None) | given)
        fill.set_restart(args)
        start.reject_other_run(start.StartFlags(load=args.load, save=args.save))
        return args

    check()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    for load in (None, "elsewhere"):
        with pytest.raises(UsageError, match=f"--save {tmp_path}: contains .* Add --load {tmp_path}"):
            check(load=load)
    check(load=str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args = check(load="elsewhere", finetune=True, no_load_optim=True)
    assert (args.load, args.finetune, args.no_load_optim) == (str(tmp_path), False, None)


def test_the_tracker_is_never_half_written(tmp_path):
    tracker_patch.install()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("100")
    with pytest.raises(KeyboardInterrupt):
        with checkpointing.maybe_msc.open(str(tracker), "w") as file:
            file.write("2")
            raise KeyboardInterrupt  # a kill could happen here
    assert tracker.read_text() == "100"
    with checkpointing.maybe_msc.open(str(tracker), "w") as file:
        file.write("200")
        assert tracker.read_text() == "100"
    assert checkpointing.read_metadata(str(tracker)) == (200, False)


@pytest.mark.parametrize("code, given, comes", [(0, 0, 0), (0, 75, 75), (3, 75, 3)])
def test_a_run_ended_by_a_signal_has_the_requested_exit_code(monkeypatch, code, given, comes):
    """The code is that of --signal-exit-code, unless the run fails while exiting."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    said = []
    with (
        pytest.raises(SystemExit) as left,
        signals.exit_on_signal(Namespace(rank=0, save=None, signal_exit_code=given), said.append),
    ):
        monkeypatch.setattr(signals, "_received", signal.SIGTERM)
        raise SystemExit(code)
    assert left.value.code == comes and bool(said) == (code == 0)
