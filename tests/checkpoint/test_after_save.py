"""After a complete checkpoint: the removal of older ones, and the user's command in the background."""

import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.checkpoint import after_save, host_memory, retention
from megatron_cream.checkpoint.retention import Retention
from megatron_cream.checkpoint.save_hook import SaveHook
from tests.launch import train, write_documents


def put(save: Path, *steps: int, newest: int | None = None) -> Path:
    for step in steps:
        folder = save / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        for name in (".metadata", "metadata.json", "__0_0.distcp"):
            (folder / name).write_text("x")
    (save / "latest_checkpointed_iteration.txt").write_text(str(newest or max(steps)))
    return save


def left(save: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*"))


@settings(max_examples=150, deadline=None)
@given(
    steps=st.sets(st.integers(1, 30), min_size=1, max_size=12),
    last=st.integers(1, 4),
    every=st.none() | st.integers(1, 7),
    data=st.data(),
)
def test_kept_checkpoints(tmp_path_factory, steps, last, every, data):
    """The kept checkpoints equal those of an independent formula.

    Steps after the tracker's are left from before a run went back to an earlier step.
    """
    newest = data.draw(st.sampled_from(sorted(steps)))
    loaded, busy = (data.draw(st.none() | st.sampled_from(sorted(steps))) for _ in range(2))
    save = put(tmp_path_factory.mktemp("save"), *steps, newest=newest)
    folder = {step: save / f"iter_{step:07d}" for step in steps}
    kept = Retention(
        save,
        last=last,
        every=every,
        protected=[folder[loaded]] if loaded else [],
        busy=lambda: {folder[busy]} if busy else set(),
    )
    kept.prune()
    kept.close()
    rank = {step: sum(step < other <= newest for other in steps) for step in steps}
    wanted = [
        s for s in sorted(steps) if s >= newest or rank[s] < last or (every and s % every == 0) or s in (loaded, busy)
    ]
    assert left(save) == wanted and not list(save.glob(".iter_*"))


def test_incomplete_and_foreign_folders_stay_and_do_not_count(tmp_path):
    save = put(tmp_path / "save", 1, 2, 3, 4)
    (save / "iter_0000003" / ".metadata").unlink()  # a save that was killed
    (save / "best").mkdir()
    put(save / "best", 1)
    (save / "iter_of_mine").mkdir()
    elsewhere = put(tmp_path / "elsewhere", 1)
    (save / "iter_0000000").symlink_to(elsewhere / "iter_0000001")
    kept = Retention(save, last=2, every=None, protected=[])
    kept.prune()
    kept.close()
    stays = ["best", "iter_0000000", "iter_0000002", "iter_0000003", "iter_0000004", "iter_of_mine"]
    assert sorted(path.name for path in save.iterdir() if path.is_dir()) == stays
    assert left(save / "best") == [1] and left(elsewhere) == [1]


def test_a_crash_during_removal_leaves_no_incomplete_checkpoint(tmp_path, monkeypatch, capfd):
    save = put(tmp_path, 1, 2)

    def stops(folder):
        (Path(folder) / ".metadata").unlink()
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", stops)
        kept = Retention(save, last=1, every=None, protected=[])
        kept.prune()
        kept.close()
    assert left(save) == [2] and (save / ".iter_0000001.removed").is_dir()
    said = capfd.readouterr().err
    assert "iter_0000001.removed: cannot remove an older checkpoint: Input/output error" in said
    assert said.count("\n") == 1
    Retention(save, last=1, every=None, protected=[]).close()  # the next start
    assert not (save / ".iter_0000001.removed").exists()


def test_a_removal_that_starts_during_another_is_silent(tmp_path, monkeypatch, capfd):
    """A hook that ends beside a save prunes while the removal before it runs, and finds its folder."""
    save, goes_on, rmtree = put(tmp_path, 1, 2, 3), threading.Event(), retention.shutil.rmtree

    def waits(folder):
        assert goes_on.wait(60)
        rmtree(folder)

    monkeypatch.setattr(retention.shutil, "rmtree", waits)
    kept = Retention(save, last=1, every=None, protected=[])
    kept.prune()
    kept.prune()
    goes_on.set()
    kept.close()
    assert left(save) == [3] and not list(save.glob(".iter_*")) and capfd.readouterr().err == ""


def test_a_failed_removal_prints_one_line(tmp_path, monkeypatch, capfd):
    save = put(tmp_path, 1, 2)

    def refuses(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuses)
    Retention(save, last=1, every=None, protected=[]).prune()
    assert left(save) == [1, 2]
    assert capfd.readouterr().err == f"warning: {save}: cannot remove an older checkpoint: Permission denied\n"


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_hooks_run_in_order_without_delaying_training(tmp_path):
    after = threading.Event()
    code = """
import json, os, sys, time
while not os.path.exists("GO"): time.sleep(0.01)
print(json.dumps([sys.argv[1], os.environ["CHECKPOINT_FOLDER"], os.environ["CHECKPOINT_STEP"]]))
""".replace("GO", str(tmp_path / "go"))
    hook = SaveHook(command(code), tmp_path / "log", 60, after=after.set)
    folders = [tmp_path / f"with a space {step}" for step in (1, 2)]
    for step, folder in enumerate(folders, 1):
        hook.start(step, folder)
    assert hook.busy() == set(folders) and not after.is_set()
    (tmp_path / "go").touch()
    hook.close()
    assert not hook.busy() and after.is_set()
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("[")]
    assert said == [[str(folder), str(folder), str(step)] for step, folder in enumerate(folders, 1)]


@pytest.mark.parametrize(
    "words, seconds, reason",
    [
        (command("import sys; sys.exit(3)"), 60, "exit code 3"),
        (command("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), 60, "exit code -9"),
        (command("import time; time.sleep(600)"), 0.3, "killed after 0.005 minutes (--save-hook-minutes)"),
        (["/no/such/program"], 60, "No such file or directory"),
    ],
)
def test_a_failing_hook_prints_one_line(tmp_path, capfd, words, seconds, reason):
    hook = SaveHook(words, tmp_path / "log", seconds)
    hook.start(5, tmp_path / "iter_0000005")
    while hook.busy():
        time.sleep(0.01)
    hook.close()
    line = f"warning: --save-hook: {tmp_path}/iter_0000005: {reason}; see {tmp_path}/log\n"
    assert capfd.readouterr().err == line


def test_a_hook_may_outlive_the_run(tmp_path, capfd):
    hook = SaveHook(command("import os, time; print(os.getpid(), flush=True); time.sleep(600)"), tmp_path / "log", 600)
    hook.start(1, tmp_path / "iter_0000001")
    while not (tmp_path / "log").exists() or (tmp_path / "log").read_text().count("\n") < 2:
        time.sleep(0.01)
    hook._seconds = 0.05
    hook.close()
    assert "iter_0000001: not finished 0.000833333 minutes after the run" in capfd.readouterr().err
    os.kill(int((tmp_path / "log").read_text().splitlines()[1]), signal.SIGKILL)  # it is still alive


@pytest.mark.slow
def test_asynchronous_saves_run_hooks_and_resume_at_another_layout(tmp_path):
    """The newest two steps and every fourth one are kept, and each hook gets a complete checkpoint."""
    documents, save = write_documents(tmp_path / "documents"), tmp_path / "save"
    hook = tmp_path / "hook"
    hook.write_text(
        f"#!{sys.executable}\nimport os, sys, time\n"
        "whole = all(os.path.exists(f'{sys.argv[2]}/{name}') for name in ('.metadata', 'metadata.json'))\n"
        "newest = open(f'{os.path.dirname(sys.argv[2])}/latest_checkpointed_iteration.txt').read()\n"
        "print(sys.argv[1], os.environ['CHECKPOINT_STEP'], whole, int(newest) >= int(os.environ['CHECKPOINT_STEP']))\n"
        f"sys.exit(int(os.environ['CHECKPOINT_STEP']) == 6)\n"
    )
    hook.chmod(0o755)
    flags = ["--data-path", documents, "--split", "90,10,0", "--train-iters", 10, "--save-interval", 2, "--async-save"]
    flags += ["--use-distributed-optimizer", "--most-recent-k", 2, "--save-retain-interval", 4]
    flags += ["--save-hook", f"{hook} 'two words'", "--save", save]
    whole = train(2, tmp_path / "whole", *flags)
    assert left(save) == [4, 8, 10] and not list(save.glob(".iter_*"))
    lines = [line for line in (save / "save_hook.log").read_text().splitlines() if line.startswith("two words ")]
    assert lines == [f"two words {step} True True" for step in (2, 4, 6, 8, 10)]
    # A possible token is only in the output of the command itself, which only the user can read.
    assert (save / "save_hook.log").stat().st_mode & 0o777 == 0o600
    written = [path for path in (*save.rglob("*"), *(tmp_path / "whole").rglob("*")) if path.is_file()]
    assert [path.name for path in written if b"two words" in path.read_bytes()] == ["save_hook.log"]
    assert any(str(hook).encode() in path.read_bytes() for path in (save / "runs").iterdir())
    rest = train(
        2,
        tmp_path / "rest",
        *flags[:-2],
        "--save",
        tmp_path / "other",
        "--load",
        save,
        "--ckpt-step",
        8,
        "--tensor-model-parallel-size",
        2,
        "--sequence-parallel",
    )
    assert list(rest) == [9, 10]
    assert max(abs(rest[step] - whole[step]) / whole[step] for step in rest) < 1e-5


def test_best_is_not_counted_among_the_checkpoints(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(after_save, "_save_folder", tmp_path)
    monkeypatch.setattr(after_save, "_prune", lambda: called.append(1))
    after_save.process_checkpoint(str(tmp_path / "best"), 2, tmp_path / "best" / "iter_0000002")
    assert not called
    after_save.process_checkpoint(str(tmp_path), 2, tmp_path / "iter_0000002")
    assert called


@pytest.mark.parametrize(
    "ranks, data, gigabytes",
    [
        (8, 8, 12),
        (8, 16, 6),
        (8, 4, 24),
        (1, 1, 12),
    ],  # 8, 4: TP 2 on one host, so that all ranks have 2 x 1e9 parameters
)
def test_a_save_too_large_for_host_memory_prints_one_line(monkeypatch, ranks, data, gigabytes):
    def said(memory_left: float, shared_left: float, in_shared_memory: bool) -> str:
        monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: Namespace(available=memory_left * 1e9))
        monkeypatch.setattr(host_memory.shutil, "disk_usage", lambda _: Namespace(free=shared_left * 1e9))
        sharing = {"ranks": ranks, "data_parallel": data, "in_shared_memory": in_shared_memory}
        return host_memory.find_shortage(10**9, **sharing)

    assert not said(gigabytes, gigabytes, True) and not said(gigabytes, 0, False)
    assert f"{gigabytes:.1f} GB of this host's memory" in said(gigabytes - 1, gigabytes, False)
    assert f"needs {gigabytes:.1f} GB in /dev/shm for the optimizer" in said(gigabytes, gigabytes - 1, True)
