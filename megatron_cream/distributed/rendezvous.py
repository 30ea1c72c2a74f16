"""Messages between the ranks of a job.

They go through a store before the process group exists, and through the group later. A rank that finds an error must
not leave the other ranks waiting for it.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.distributed.launcher import waiting_for_peers

_PRINTED_KEY, _PRINT_TIMEOUT = "megatron_cream/printed", timedelta(seconds=5)
_exchange_numbers = itertools.count()
_store: torch.distributed.Store | None = None  # stays open: Megatron's own rendezvous uses the same port


def check_on_all_ranks(check: Callable[[], None], rank: int, world_size: int) -> None:
    """Call `check` on every rank; if it fails on one, raise its error on all.

    Needs no process group.

    Raises:
        UsageError: the error of the first rank whose `check` raised one.
    """
    fault = ""
    try:
        check()
    except UsageError as error:
        fault = str(error)
    if world_size > 1:
        store, name = open_store(rank, world_size), f"megatron_cream/check/{next(_exchange_numbers)}"
        with waiting_for_peers():
            store.set(f"{name}/{rank}", fault)
            faults = [store.get(f"{name}/{other}").decode() for other in range(world_size)]
            store.set(f"{name}/{rank}/received", "")
            if rank == 0:  # the store may be in this process, which may be about to end
                store.wait([f"{name}/{other}/received" for other in range(world_size)])
        fault = next(filter(None, faults), "")
    if fault:
        raise UsageError(fault)


def print_once(line: str, rank: int, world_size: int) -> None:
    """Print an error line to stderr on one rank, before any rank ends.

    torchrun kills the other ranks when the first one ends. Rank 0 prints the line; if it does not within 5 seconds,
    because the error is not on all ranks, another rank prints it.
    """
    store = open_store(rank, world_size) if _store is not None else None
    if rank > 0:
        try:
            if store:
                store.wait([_PRINTED_KEY], _PRINT_TIMEOUT)
            return
        except torch.distributed.DistNetworkError:  # the store was in rank 0, which has ended
            return
        except torch.distributed.DistStoreError:
            pass  # rank 0 printed nothing in time
        with contextlib.suppress(torch.distributed.DistError):
            if store and store.add(f"{_PRINTED_KEY}/by", 1) > 1:  # a third rank prints it
                store.wait([_PRINTED_KEY], _PRINT_TIMEOUT)
                return
    print(line, file=sys.stderr, flush=True)
    if store:
        store.set(_PRINTED_KEY, "")


def confirm_printed(rank: int, world_size: int) -> None:
    """Tell the other ranks, which call `print_once`, that this rank has printed its error line."""
    with contextlib.suppress(torch.distributed.DistError):  # the store may have ended
        if _store is not None and (store := open_store(rank, world_size)):
            store.set(_PRINTED_KEY, "")


def broadcast_from_rank_0(value: str, rank: int, world_size: int) -> str:
    """Return rank 0's value on every rank. All ranks must call it. Needs no process group."""
    if world_size == 1:
        return value
    store, name = open_store(rank, world_size), f"megatron_cream/value/{next(_exchange_numbers)}"
    if rank == 0:
        store.set(name, value)
    with waiting_for_peers():
        return store.get(name).decode()


def open_store(rank: int, world_size: int) -> torch.distributed.Store | None:
    """Return the store through which the ranks find each other, or None for one rank.

    On one node, torchrun keeps its store when it restarts its ranks (--max-restarts), with the addresses of ranks that
    died: a prefix separates the attempts. On several nodes each restart has a new store (`nodes._check_restarts`), and
    each node counts its restarts by itself.
    """
    global _store
    if world_size == 1:
        return None
    if _store is None:
        with waiting_for_peers():
            _store, _, _ = next(torch.distributed.rendezvous("env://", rank, world_size))
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if keeps_store else 0
    return torch.distributed.PrefixStore(f"attempt/{attempt}", _store)


def find_first_reason(reason: str) -> str:
    """Return the first non-empty `reason` in the order of ranks, on every rank, or "".

    All ranks must call it. Needs the process group.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return reason
    reasons = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, reason)
    return next(filter(None, reasons), "")
