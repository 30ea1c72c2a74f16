"""An ordered map over worker processes that dies with its parent."""

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
"""A worker process's function, set when it starts."""


def map_in_order(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map(function, items)` over processes, in order, a few items ahead of its reader.

    `function` is inherited by a fork, whether or not it can be pickled; items and results are
    sent. More than one worker needs a caller that has neither started threads nor used CUDA.

    Raises:
        ChildProcessError: a worker was killed, or there is no room in /dev/shm for what joins them.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Read by Hugging Face tokenizers, whose own threads would not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (function, os.getpid()))
    except OSError as error:  # of semaphores, of which the system names no file
        raise ChildProcessError(f"/dev/shm: {error.strerror}: worker processes need some; use --workers 1") from error
    try:
        pool.submit(os.getpid).result()  # forks all of them, before a reader of `items` starts threads
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, perhaps for want of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent(parent=parent)  # a parent that was killed closes no queue: its workers would wait for ever


def _call(item: Any) -> Any:
    return _function(item)
