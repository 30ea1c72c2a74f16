"""Keep checkpoint helper processes alive through a cluster's signals, and end them with their rank.

By itself the writer of --async-save dies of SIGTERM and SIGUSR1, so that the checkpoint that the signal asks for
cannot be written (Slurm signals every process of a step). And it outlives a rank that is killed, with 0.7 GB, its
fork server and a resource tracker, for ever. A fork server stands between it and the rank, so that the system
cannot tell it of the rank's end: here the rank starts it without one.
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
_FORGET = "Megatron goes on with a checkpoint writer that was killed."

RESULTS_QUEUE = Patch(
    "results-queue",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
    "Megatron starts a process for a queue, which signals end, even where a rank writes by itself.",
    parameters="mp_mode",
)
WRITER_PROCESS = Patch(
    "writer-process",
    _CALLER + "_get_process",
    "The writer dies of the signals that ask for a checkpoint, and outlives a rank that is killed.",
    parameters="rank, mp_mode, cpu_priority, io_priority",
)
WRITER_LOOP = Patch(
    "writer-loop",
    _CALLER + "async_loop",
    "The writer must ask the system, in its own process, to be ended with its rank.",
    parameters="rank, queue, preload_q, comp_q, log_level, cpu_priority, io_priority",
)
WRITER_RESULTS = Patch(
    "writer-results",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.retrieve_write_results",
    "When the process that keeps the results was killed, one rank raises while the others are in a collective.",
    parameters="self",
)
FORGET_PROCESS = Patch("forget-process", _CALLER + "_persistent_process", _FORGET, value_type="NoneType | SpawnProcess")
FORGET_QUEUE = Patch("forget-queue", _CALLER + "_persistent_queue", _FORGET, value_type="NoneType | JoinableQueue")
FORGET_PRELOAD_QUEUE = Patch(
    "forget-preload-queue", _CALLER + "_persistent_preload_q", _FORGET, value_type="NoneType | JoinableQueue"
)
FORGET_RESULTS = Patch("forget-results", _CALLER + "_persistent_comp_q", _FORGET, value_type="NoneType | Queue")

_results_queue = None


def install() -> None:
    """Call before `pretrain`."""
    registry.install(RESULTS_QUEUE, _make_results_queue)
    registry.install(WRITER_PROCESS, _start_writer)
    registry.install(WRITER_RESULTS, _retrieve_results)


def forget_writer(caller) -> None:
    """Let the next save start another writer, after that of Megatron's `caller` was killed."""
    caller.process = None
    for patch in (FORGET_PROCESS, FORGET_QUEUE, FORGET_PRELOAD_QUEUE, FORGET_RESULTS):
        registry.assign(patch, None)


def _make_results_queue(original, mp_mode: str | None = None):
    """Return the queue between the writer and its rank.

    `mp_mode` is given when the writer is made, and not by each save. A rank that writes by itself has no writer: it
    gets a queue of its own, without a process.
    """
    global _results_queue
    if _results_queue is None and mp_mode is None:
        return queue.Queue()
    if _results_queue is None or not _results_queue._manager._process.is_alive():  # the next save gets another
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode or "fork"))
        with signals_blocked():
            manager.start(end_with_parent, (signal.SIGKILL, os.getpid()))
        _results_queue = manager.Queue()
    return _results_queue


def _retrieve_results(original, self):
    """Raise nothing, as the other ranks are in a collective already; an error is an answer."""
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
    process._popen.terminate = process._popen.kill  # as a failing rank ends it, on its own way out
    _join_while_alive(process, PersistentAsyncCaller._persistent_queue, PersistentAsyncCaller._persistent_preload_q)
    return process


def _join_while_alive(process: multiprocessing.Process, *queues: JoinableQueue) -> None:
    """Let the `join` of queues that `process` reads end with that process too.

    Megatron waits for the writer of --async-save in them: until it has taken the tensors, and at the end of a run. A
    writer that was killed never answers, and Python's own exit would wait until it has read what it was sent.
    """

    def join(tasks: JoinableQueue) -> None:
        # Without the queue's lock, which the killed process may have held.
        while process.is_alive() and not tasks._unfinished_tasks._semlock._is_zero():
            multiprocessing.connection.wait([process.sentinel], timeout=0.001)

    for tasks in queues:
        tasks.join = functools.partial(join, tasks)
        tasks.cancel_join_thread()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block a cluster's signals in processes that the block starts; here they wait for the block's end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()  # blocks SIGTERM by itself, and unblocks it here at its start
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # Ctrl-C, from a terminal
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write_for_rank(rank_pid: int, *args) -> None:
    """Run the writer's loop in its own process, which has none of these patches."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    end_with_parent(parent=rank_pid)
    try:
        PersistentAsyncCaller.async_loop(*args)
    except (OSError, EOFError):  # the process that keeps its results was killed; what a disk says is one of those
        os._exit(1)
