"""An ordered map over worker processes, which end with their parent."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_cream.common.processes import end_with_parent

_function: Callable[[Any], Any]
"""The function of a worker process, set at its start."""


def map_in_order(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield `map(function, items)` in order, computed by processes a few items ahead.

    Workers inherit `function` by fork, so it need not be picklable; items and results must be. With
    more than one worker, the caller must not have started threads or used CUDA.

    Raises:
        ChildProcessError: a worker was killed, or /dev/shm has no space for their semaphores.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # The threads of Hugging Face tokenizers would not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (function, os.getpid()))
    except OSError as error:  # for a semaphore; the error names no file
        raise ChildProcessError(f"/dev/shm: {error.strerror}: worker processes need space; use --workers 1") from error
    try:
        pool.submit(os.getpid).result()  # forks all workers before a reader of `items` starts threads
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, perhaps because memory ran out; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    end_with_parent(parent=parent)  # a killed parent closes no queue: its workers would hang


def _call(item: Any) -> Any:
    return _function(item)
