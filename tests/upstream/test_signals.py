"""Faults of Megatron's and torch's processes when they get signals, or when another process ends."""

import contextlib
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, PersistentAsyncCaller
from megatron.training import initialize
from megatron.training.dist_signal_handler import DistributedSignalHandler
from torch.utils.data import DataLoader

from tests.upstream import upstream_fault
from tests.upstream.small import start_one_rank
from tests.upstream.unpatched import unpatched

SECONDS = 2
"""How long a test waits for an event that the fault prevents."""


@upstream_fault(
    "writer-process",
    "the writer of --async-save has no handler: a cluster's signal, which asks for a checkpoint, ends it",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_writer_writes_after_a_signal(number):
    assert unpatched(_write_after, number)


def _write_after(number: signal.Signals) -> bool:
    """Send the writer a signal, and return whether it still handles a request."""
    process = _start_writer()
    os.kill(process.pid, number)
    PersistentAsyncCaller._persistent_queue.put(AsyncRequest(os.getpid, (), [], call_idx=1))
    done = PersistentAsyncCaller._persistent_comp_q._reader
    return done in wait([process.sentinel, done])


@upstream_fault(
    "results-queue",
    "the process that passes the writers' answers on has no handler either",
)
def test_answers_of_the_writers_arrive_after_a_signal():
    assert unpatched(_is_alive_after_sigterm)


def _is_alive_after_sigterm() -> bool:
    answers = filesystem_async.get_write_results_queue()
    process = answers._manager._process
    process.terminate()
    process.join(SECONDS)
    return process.is_alive()


@upstream_fault("writer-loop", "the writer waits for requests of a rank that is gone, for ever")
def test_the_writer_ends_with_its_rank():
    assert unpatched(_ends_with_its_rank)


def _ends_with_its_rank() -> bool:
    reads, writes = os.pipe()
    rank = _fork(_be_a_rank, writes)
    writer = psutil.Process(int(os.read(reads, 20)))
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    try:
        writer.wait(SECONDS)
        return True
    except psutil.TimeoutExpired:
        writer.kill()
        return False


def _be_a_rank(pipe: int) -> None:
    os.write(pipe, str(_start_writer().pid).encode())
    signal.pause()


def _start_writer() -> BaseProcess:
    """Start a writer, let it handle a first request, and return its process.

    It is forked because that is fast. Megatron uses a fork server, with the same result.
    """
    process = PersistentAsyncCaller._get_process(0, "fork")
    PersistentAsyncCaller._persistent_queue.put(AsyncRequest(os.getpid, (), [], call_idx=0))
    PersistentAsyncCaller._persistent_comp_q.get()
    return process


@upstream_fault(
    "writer-is-done",
    "the rank asks an empty queue again and again, and not whether the writer is alive",
    raises=TimeoutError,
)
def test_a_save_ends_when_its_writer_was_killed():
    unpatched(_wait_for_a_dead_writer)


def _wait_for_a_dead_writer() -> None:
    caller = _caller_of_a_dead_writer()
    with _time_out(caller):
        caller.is_current_async_call_done(blocking=True, no_dist=True)


@upstream_fault(
    "writer-process",
    "the rank waits until the writer has taken the tensors, and does not ask whether it is alive",
    raises=TimeoutError,
)
def test_handing_over_tensors_ends_when_the_writer_was_killed():
    unpatched(_hand_over_to_a_dead_writer)


def _hand_over_to_a_dead_writer() -> None:
    caller = _caller_of_a_dead_writer()
    with _time_out(caller):
        caller.schedule_async_call(AsyncRequest(os.getpid, (0, 0, 0), [], preload_fn=os.getpid, call_idx=1))


@upstream_fault("call-writer", "the next request goes to the writer that is dead")
def test_the_save_after_that_gets_another_writer():
    assert unpatched(_schedule_after_a_dead_writer)


def _schedule_after_a_dead_writer() -> bool:
    caller = _caller_of_a_dead_writer()
    caller.schedule_async_call(AsyncRequest(os.getpid, (), [], call_idx=1))
    alive, caller.process = caller.process.is_alive(), None
    return alive


def _caller_of_a_dead_writer() -> PersistentAsyncCaller:
    start_one_rank()
    caller = PersistentAsyncCaller()
    caller.process = _start_writer()
    caller.process.kill()
    caller.process.join()
    return caller


@contextlib.contextmanager
def _time_out(caller: PersistentAsyncCaller) -> Iterator[None]:
    """Raise TimeoutError if the block is still waiting after SECONDS."""
    signal.signal(signal.SIGALRM, _say_late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        caller.process = None  # otherwise its destructor waits too


def _say_late(*_) -> None:
    raise TimeoutError


@upstream_fault(
    "rendezvous",
    "the handler of --exit-signal-handler is Python's, and the rank waits for the others in C++",
)
def test_a_rank_that_waits_for_the_others_ends_at_sigterm():
    assert unpatched(_ends_while_it_waits)


def _ends_while_it_waits() -> bool:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = _fork(_wait_for_another_rank, port)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()  # connected: the handler is set, and the rank waits
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    os.kill(rank, signal.SIGTERM)
    try:
        psutil.Process(rank).wait(SECONDS)
        return True
    except psutil.TimeoutExpired:
        os.kill(rank, signal.SIGKILL)
        return False


def _wait_for_another_rank(port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    args = Namespace(
        rank=0,
        world_size=2,
        local_rank=0,
        distributed_backend="gloo",
        distributed_timeout_minutes=10,
        cuda_graph_impl="none",
        flight_recorder_dump_path=None,
        fake_process_group=False,
    )
    initialize.get_args = lambda: args
    DistributedSignalHandler().__enter__()
    initialize._initialize_distributed(None, None, None)


def _fork(function: Callable, *args) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        finally:
            os._exit(1)
    return pid


@upstream_fault(
    "lost-batch",
    "a worker drops a batch that it cannot send (/dev/shm is full, say), and the loader waits for it for ever",
)
def test_a_data_loader_fails_when_a_batch_cannot_be_sent():
    with pytest.raises(Exception) as failure:
        unpatched(_load_what_cannot_be_sent)
    assert "timed out" not in str(failure.value)


class _CannotBeSent:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


class _Samples:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _):
        return _CannotBeSent()


def _load_what_cannot_be_sent() -> None:
    loader = DataLoader(_Samples(), num_workers=1, collate_fn=list, timeout=SECONDS, multiprocessing_context="fork")
    next(iter(loader))
