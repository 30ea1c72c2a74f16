"""Tests of a full disk under the outputs of the tools and TensorBoard; tests/faults/outputs.py has every command."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io import gfile
from torch.utils.tensorboard import SummaryWriter

from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import atomic_write, convert_disk_errors, save_picture
from megatron_cream.patches import tensorboard
from tests.bad_inputs import load, start
from tests.evaluation_models import save_llama
from tests.launch import ROOT


def full(path: Path) -> None:
    """Link the temporary file of `path` to /dev/full, so that writing it fails."""
    path.parent.mkdir(exist_ok=True)
    path.with_name(f".{path.name}.partial").symlink_to("/dev/full")


def test_existing_output_stays_when_the_disk_is_full(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    full(path)
    with pytest.raises(UsageError, match=f"^--output {path}: No space left on device; what is done is kept$"):
        with convert_disk_errors(path, "--output", "what is done is kept"), atomic_write(path) as file:
            file.write("after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), convert_disk_errors(path, "--output"):
        open(tmp_path / "no file")


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_pictures_on_a_full_disk(name, tmp_path):
    save_picture(plt.figure(), tmp_path / name)
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[Path(name).suffix]
    assert (tmp_path / name).read_bytes().startswith(begins) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "tool, flags, written",
    [
        ("plan", "--config llama2_7b_32k --gpus 2 --picture {out}", "out.png"),
        ("plot_positions", "--samples 5 --output {out}", "out.png"),
        ("evaluate", "kv --model {model} --keys 3 --samples 1 --output {out}", "out/summary.json"),
    ],
    ids=lambda value: value.split()[0],
)
def test_tools_print_one_line_when_the_disk_is_full(tool, flags, written, tmp_path):
    full(tmp_path / written)
    out = tmp_path / Path(written).parts[0]
    model = save_llama(tmp_path / "model") if "{model}" in flags else None
    ended = start(load(f"tools/{tool}.py").main, f"tools/{tool}.py", *flags.format(out=out, model=model).split())()
    flag = "--picture" if tool == "plan" else "--output"
    assert ended.code == 2, ended.error
    assert f"{tool}.py: error: {flag} {out}: No space left on device" in ended.error.splitlines()[-1]
    assert "Traceback" not in ended.error and not (tmp_path / written).exists()


def test_unwritable_events_are_skipped(tmp_path, monkeypatch, capsys):
    tensorboard.install()
    writer = SummaryWriter(str(tmp_path))
    real = gfile.LocalFileSystem._write

    def half(self, filename, content, mode):
        real(self, filename, content[: len(content) // 2], mode)
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(1, 6):
        with monkeypatch.context() as patched:
            if step in (2, 3):
                patched.setattr(gfile.LocalFileSystem, "_write", half)
            writer.add_scalar("loss", step, step)
            writer.flush()
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (4, 4), (5, 5)]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and warnings[0].endswith("events are missing: No space left on device")


# Runs with its own full file system on /dev/shm.
NO_SHARED_MEMORY = """
import multiprocessing, torch
from megatron_cream.data.workers import map_in_order
from megatron_cream.common.errors import is_full_shared_memory
for act in (
    multiprocessing.get_context("fork").Lock,
    multiprocessing.get_context("spawn").JoinableQueue,
    torch.zeros(10_000).share_memory_,
    lambda: next(iter(torch.utils.data.DataLoader([torch.zeros(10_000)] * 9, num_workers=1))),
    lambda: open("/dev/full", "w", buffering=1).write("x\\n"),  # another one
    lambda: next(map_in_order(len, ["x"], workers=2)),
):
    try:
        act()
        print("went well")
    except Exception as error:
        print(is_full_shared_memory(error), str(error) if isinstance(error, ChildProcessError) else "")
"""


# The worker has no room to send a batch. Python alone drops the batch, and the rank would wait forever.
LOST_BATCH = """
import os, signal
from megatron_cream.patches import platform
platform.setup()
import torch
from megatron.training.dist_signal_handler import DistributedSignalHandler
from megatron_cream.training import signals
from megatron_cream.common.errors import is_dead_data_worker
signals.install()
loader = torch.utils.data.DataLoader(
    [torch.zeros(100_000)] * 9, num_workers=1, collate_fn=lambda batch: batch[0],
    worker_init_fn=lambda _: DistributedSignalHandler(signal.SIGTERM).__enter__(),
)
try:
    next(iter(loader))
except RuntimeError as error:
    print(is_dead_data_worker(error), flush=True)
os._exit(0)
"""


def run_without_shared_memory(code: str, kilobytes: int, filled: int) -> subprocess.CompletedProcess:
    mount = f"mount -t tmpfs -o size={kilobytes}k none /dev/shm && head -c {filled} /dev/zero >/dev/shm/x && exec "
    command = ["unshare", "--mount", "bash", "-c", mount + '"$@"', "bash", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


mounts = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts a file system, as root")


@mounts
def test_full_shared_memory_is_recognized():
    result = run_without_shared_memory(NO_SHARED_MEMORY, 8, 8192)
    said = "False /dev/shm: No space left on device: worker processes need space; use --workers 1"
    assert [line.strip() for line in result.stdout.splitlines()] == ["True"] * 4 + ["False", said], result.stderr


@mounts
def test_a_batch_that_finds_no_shared_memory_ends_its_worker():
    result = run_without_shared_memory(LOST_BATCH, 64, 0)
    assert (result.stdout, "Traceback" in result.stderr) == ("True\n", False), result.stderr
