"""Faults of Megatron and torch when they write and read checkpoints."""

import multiprocessing
import os
import pickle
import queue
import tempfile
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing
from torch.distributed import checkpoint as dcp

from tests.upstream import upstream_fault
from tests.upstream.small import hand_over_in_process, start_one_rank
from tests.upstream.unpatched import unpatched, unpatched_ranks


@upstream_fault("tracker", "the file that names the newest checkpoint is emptied before it is written")
def test_a_save_that_is_killed_leaves_the_checkpoint_before(tmp_path):
    unpatched(_save, tmp_path, 1)
    assert _tracker(tmp_path) == "1"
    unpatched(_save_and_die, tmp_path, 2)
    assert _tracker(tmp_path) in ("1", "2")


def _tracker(folder: Path) -> str:
    return Path(checkpointing.get_checkpoint_tracker_filename(str(folder))).read_text()


def _save_and_die(folder: Path, step: int) -> None:
    """Save in a fork that dies between two system calls: after opening a file, before writing it."""
    rank = os.fork()
    if rank == 0:
        checkpointing.maybe_msc.open = _open_and_die
        try:
            _save(folder, step)
        finally:
            os._exit(1)
    os.waitpid(rank, 0)


def _open_and_die(path: str, mode: str = "r", *args):
    file = open(path, mode, *args)
    if "w" in mode:
        os._exit(9)
    return file


def _save(folder: Path, step: int) -> None:
    start_one_rank()
    args = Namespace(
        save=str(folder),
        async_save=False,
        use_dist_ckpt=False,
        ckpt_format="torch",
        use_distributed_optimizer=False,
        no_save_optim=True,
        no_save_rng=True,
        log_progress=False,
        save_retain_interval=None,
    )
    checkpointing.get_args = lambda: args
    checkpointing.get_rng_state = lambda *_, **__: None
    checkpointing.get_rerun_state_machine = lambda: Namespace(state_dict=lambda **_: None)
    checkpointing.generate_state_dict = lambda *_, **__: {}
    checkpointing.save_checkpoint(step, [], None, None, 0)


@upstream_fault("save-shards write-metadata", "the first rank raises alone, and the others wait for it")
def test_all_ranks_fail_when_metadata_cannot_be_written(tmp_path):
    raised = unpatched_ranks(2, _save_together, tmp_path, ".metadata")
    assert raised[0] == raised[1]


@upstream_fault("save-shards save-config", "the first rank raises alone, and the others wait for it")
def test_all_ranks_fail_when_the_configuration_cannot_be_written(tmp_path):
    raised = unpatched_ranks(2, _save_together, tmp_path, "metadata.json")
    assert raised[0] == raised[1]


def _save_together(rank: int, folder: Path, name: str) -> str:
    """Save where the file `name` cannot be written, and return the name of the raised exception."""
    (folder / name).mkdir(exist_ok=True)
    store = torch.distributed.FileStore(f"{folder}.store", 2)
    wait = timedelta(seconds=3)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
    hand_over_in_process()
    tensor = ShardedTensor.from_rank_offsets("weight", torch.ones(2), (0, rank, 2))
    try:
        dist_checkpointing.save({"weight": tensor}, folder)
    except Exception as error:
        return type(error).__name__
    return ""


@upstream_fault("write-shards", "of an error there is the type alone, not what the system said of which file")
def test_a_writer_says_why_it_failed(tmp_path):
    answer = unpatched(_write, [tmp_path / "missing" / "a"])
    assert "No such file or directory" in str(answer)


@upstream_fault(
    "write-shards",
    "an error in a thread is raised past the queue, for whose answer the rank waits",
)
def test_a_failing_writer_thread_reports_back(tmp_path):
    answer = unpatched(_write, [tmp_path / "missing" / "a", tmp_path / "b"])
    assert isinstance(answer, Exception)


def _write(files: list[Path]):
    answers = queue.Queue()
    buckets = [(str(file), file.name, ([], [])) for file in files]
    FileSystemWriterAsync.write_preloaded_data_multithread([], False, 0, buckets, answers)
    return answers.get_nowait()


@upstream_fault("results-queue", "a queue between processes is made for what one process does")
def test_a_save_without_async_save_starts_no_process(tmp_path):
    assert unpatched(_processes_of_a_save, tmp_path) == 0


def _processes_of_a_save(folder: Path) -> int:
    start_one_rank()
    filesystem_async._results_queue = None  # its initial value
    planner, writer = dcp.DefaultSavePlanner(), FileSystemWriterAsync(folder)
    planner.set_up_planner({"weight": torch.ones(2)}, is_coordinator=True)
    writer.prepare_write_data(writer.prepare_decentralized_global_plan(planner.create_local_plan()), planner)
    return len(multiprocessing.active_children())


class _Command:
    """An object that creates a folder when unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@upstream_fault("read-metadata", "the metadata of a checkpoint is a pickle, opened whatever it names")
def test_reading_metadata_runs_nothing(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Command(tmp_path / "ran")))
    unpatched(_read_metadata, tmp_path)
    assert not (tmp_path / "ran").exists()


def _read_metadata(folder: Path) -> None:
    try:
        dcp.FileSystemReader(folder).read_metadata()
    except Exception:
        pass


@upstream_fault("load-bytes", "bytes in a checkpoint are loaded with weights_only=False")
def test_reading_bytes_runs_nothing(tmp_path):
    unpatched(_save_and_load_a_command, tmp_path)
    assert not (tmp_path / "ran").exists()


def _save_and_load_a_command(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as checkpoint:
        dcp.save({"x": _Command(folder / "ran")}, checkpoint_id=checkpoint, no_dist=True)
        try:
            dcp.load({"x": 0}, checkpoint_id=checkpoint, no_dist=True)
        except pickle.UnpicklingError:
            pass
