"""Keep checkpoint helpers alive through SIGTERM and SIGUSR1; end them with their rank.

Megatron's writer of --async-save dies of SIGTERM and SIGUSR1, and Slurm signals every process of a step: the
checkpoint that the signal asks for is never written. If its rank is killed, the writer stays forever, with 0.7 GB of
memory, its fork server and a resource tracker. The fork server is the writer's parent, so PR_SET_PDEATHSIG does not
fire when the rank ends. Here the rank starts the writer directly.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from multiprocessing.queues import JoinableQueue

from megatron_cream.common.processes import end_with_parent
from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

_CALLER = "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller."
_KILLED_WRITER = "Megatron keeps using a checkpoint writer that was killed."

RESULTS_QUEUE = Patch(
    "results-queue",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
    "Megatron starts a process for the results queue even without a writer, and signals kill it.",
    parameters="mp_mode",
)
WRITER_PROCESS = Patch(
    "writer-process",
    _CALLER + "_get_process",
    "The writer dies of the signals that ask for a checkpoint, and outlives its rank if that is killed.",
    parameters="rank, mp_mode, cpu_priority, io_priority",
)
WRITER_LOOP = Patch(
    "writer-loop",
    _CALLER + "async_loop",
    "The writer must call PR_SET_PDEATHSIG in its own process to end with its rank.",
    parameters="rank, queue, preload_q, comp_q, log_level, cpu_priority, io_priority",
)
WRITER_RESULTS = Patch(
    "writer-results",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.retrieve_write_results",
    "If the process that keeps the results is killed, one rank raises while the others wait in a collective.",
    parameters="self",
)
FORGET_PROCESS = Patch(
    "forget-process", _CALLER + "_persistent_process", _KILLED_WRITER, value_type="NoneType | SpawnProcess"
)
FORGET_QUEUE = Patch(
    "forget-queue", _CALLER + "_persistent_queue", _KILLED_WRITER, value_type="NoneType | JoinableQueue"
)
FORGET_PRELOAD_QUEUE = Patch(
    "forget-preload-queue", _CALLER + "_persistent_preload_q", _KILLED_WRITER, value_type="NoneType | JoinableQueue"
)
FORGET_RESULTS = Patch("forget-results", _CALLER + "_persistent_comp_q", _KILLED_WRITER, value_type="NoneType | Queue")

_results_queue = None


def install() -> None:
    """Install the patches of the checkpoint writer. Call before `pretrain`."""
    registry.install(RESULTS_QUEUE, _make_results_queue)
    registry.install(WRITER_PROCESS, _start_writer)
    registry.install(WRITER_RESULTS, _retrieve_results)


def forget_writer(caller) -> None:
    """Make the next save start a new writer after the one of Megatron's `caller` was killed."""
    caller.process = None
    for patch in (FORGET_PROCESS, FORGET_QUEUE, FORGET_PRELOAD_QUEUE, FORGET_RESULTS):
        registry.assign(patch, None)


def _make_results_queue(original, mp_mode: str | None = None):
    """Return the queue between the writer and its rank.

    Megatron passes `mp_mode` when it starts the writer, but not at each save. Without a writer the rank writes the
    checkpoint itself, and gets a plain queue that needs no process.
    """
    global _results_queue
    if _results_queue is None and mp_mode is None:
        return queue.Queue()
    if _results_queue is None or not _results_queue._manager._process.is_alive():  # killed
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode or "fork"))
        with signals_blocked():
            manager.start(end_with_parent, (signal.SIGKILL, os.getpid()))
        _results_queue = manager.Queue()
    return _results_queue


def _retrieve_results(original, self):
    """Return an error instead of raising it, because the other ranks wait in a collective."""
    from torch.distributed.checkpoint.api import _wrap_exception

    try:
        return original(self)
    except (OSError, EOFError):
        return _wrap_exception(RuntimeError("the process that keeps the results of --async-save was killed"))


def _start_writer(original, rank: int, _mp_mode: str = "spawn", *args, **kwargs):
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    registry.assign(WRITER_LOOP, functools.partial(_write_for_rank, os.getpid()))
    with signals_blocked():
        process = original(rank, "spawn", *args, **kwargs)
    # A failing rank terminates the writer at its exit, and the writer blocks SIGTERM.
    process._popen.terminate = process._popen.kill
    _join_while_alive(process, PersistentAsyncCaller._persistent_queue, PersistentAsyncCaller._persistent_preload_q)
    return process


def _join_while_alive(process: multiprocessing.Process, *queues: JoinableQueue) -> None:
    """Make `join` return for queues that `process` reads once that process has ended.

    Megatron joins these queues until the writer has received the tensors, and at the end of a run. A killed writer
    never empties its queues, and at exit Python would wait until it did.
    """

    def join(tasks: JoinableQueue) -> None:
        # Does not take the queue's lock, which the killed process may have held.
        while process.is_alive() and not tasks._unfinished_tasks._semlock._is_zero():
            multiprocessing.connection.wait([process.sentinel], timeout=0.001)

    for tasks in queues:
        tasks.join = functools.partial(join, tasks)
        tasks.cancel_join_thread()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block a cluster's signals in processes that are started in this context.

    This process receives them when the context ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()  # ignores SIGTERM; its start unblocks SIGTERM in this process
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # Ctrl-C, from a terminal
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write_for_rank(rank_pid: int, *args) -> None:
    """Run Megatron's writer loop in the writer's process, which has no patches."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    end_with_parent(parent=rank_pid)
    try:
        PersistentAsyncCaller.async_loop(*args)
    except (OSError, EOFError):  # the process that keeps its results was killed; disk errors are results
        os._exit(1)
