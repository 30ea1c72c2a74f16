"""Messages between the ranks of a job.

They go through a store before the process group exists, and through the group later. A rank that finds an error must
not leave the other ranks waiting for it.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.distributed.launcher import waiting_for_peers

_PRINTED_KEY, _PRINT_TIMEOUT = "megatron_cream/printed", timedelta(seconds=5)
_exchange_numbers = itertools.count()
_store: torch.distributed.Store | None = None  # stays open: Megatron's own rendezvous uses the same port


@contextlib.contextmanager
def share_errors() -> Iterator[None]:
    """Raise the UsageError of one rank's block on all ranks. All ranks must enter and leave the block.

    Needs no process group.

    Raises:
        UsageError: the error of the first rank whose block raised one.
    """
    fault = ""
    try:
        yield
    except UsageError as error:
        fault = str(error)
    rank, world_size = _get_place()
    if store := open_store():
        name = f"megatron_cream/check/{next(_exchange_numbers)}"
        with waiting_for_peers():
            store.set(f"{name}/{rank}", fault)
            faults = [store.get(f"{name}/{other}").decode() for other in range(world_size)]
            store.set(f"{name}/{rank}/received", "")
            if rank == 0:  # the store may be in this process, which may be about to end
                store.wait([f"{name}/{other}/received" for other in range(world_size)])
        fault = next(filter(None, faults), "")
    if fault:
        raise UsageError(fault)


def print_once(line: str) -> None:
    """Print an error line to stderr on one rank, before any rank ends.

    torchrun kills the other ranks when the first one ends. Rank 0 prints the line; if it does not within 5 seconds,
    because the error is not on all ranks, another rank prints it.
    """
    store = open_store() if _store is not None else None
    if _get_place()[0] > 0:
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


def confirm_printed() -> None:
    """Tell the other ranks, which call `print_once`, that this rank has printed its error line."""
    with contextlib.suppress(torch.distributed.DistError):  # the store may have ended
        if _store is not None and (store := open_store()):
            store.set(_PRINTED_KEY, "")


def broadcast_from_rank_0(value: str) -> str:
    """Return rank 0's value on every rank. All ranks must call it. Needs no process group."""
    if (store := open_store()) is None:
        return value
    name = f"megatron_cream/value/{next(_exchange_numbers)}"
    if _get_place()[0] == 0:
        store.set(name, value)
    with waiting_for_peers():
        return store.get(name).decode()


def open_store() -> torch.distributed.Store | None:
    """Return the store through which the ranks find each other, or None for one rank.

    On one node, torchrun keeps its store when it restarts its ranks (--max-restarts), with the addresses of ranks that
    died: a prefix separates the attempts. On several nodes each restart has a new store (`nodes._check_restarts`), and
    each node counts its restarts by itself.
    """
    global _store
    rank, world_size = _get_place()
    if world_size == 1:
        return None
    if _store is None:
        with waiting_for_peers():
            _store, _, _ = next(torch.distributed.rendezvous("env://", rank, world_size))
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if keeps_store else 0
    return torch.distributed.PrefixStore(f"attempt/{attempt}", _store)


def _get_place() -> tuple[int, int]:
    """Return the rank and the world size that the launcher set, as Megatron reads them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def find_first_reason(reason: str) -> str:
    """Return the first non-empty `reason` in the order of ranks, on every rank, or "".

    All ranks must call it. Needs the process group.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return reason
    reasons = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, reason)
    return next(filter(None, reasons), "")
