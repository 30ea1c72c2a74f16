"""What the ranks of a job tell each other: through a store before the process group is there, through the group after.

A rank that finds a fault of its own must not leave the others waiting for it.
"""

import itertools
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.distributed.launcher import waiting_for_peers

_SAID, _PATIENCE = "megatron_cream/said", timedelta(seconds=5)
_agreements = itertools.count()
_store: torch.distributed.Store | None = None  # lives on: Megatron's own rendezvous is at the same port


def agree(look: Callable[[], None], rank: int, ranks: int) -> None:
    """Run `look` on every rank; what one of them finds, all raise. Needs no process group.

    Raises:
        UsageError: that of the first rank whose `look` raised one.
    """
    fault = ""
    try:
        look()
    except UsageError as error:
        fault = str(error)
    if ranks > 1:
        store, name = common_store(rank, ranks), f"megatron_cream/look/{next(_agreements)}"
        with waiting_for_peers():
            store.set(f"{name}/{rank}", fault)
            found = [store.get(f"{name}/{other}").decode() for other in range(ranks)]
            store.set(f"{name}/{rank}/heard", "")
            if rank == 0:  # the store may be in this process, which may be about to end
                store.wait([f"{name}/{other}/heard" for other in range(ranks)])
        fault = next(filter(None, found), "")
    if fault:
        raise UsageError(fault)


def say_once(line: str, rank: int, ranks: int) -> None:
    """To stderr, by rank 0, before any rank of the job ends: torchrun kills the others when the first one has ended.

    Another rank says it when rank 0 does not, as the error was not everybody's.
    """
    store = common_store(rank, ranks) if _store is not None else None
    if rank > 0:
        try:
            if store:
                store.wait([_SAID], _PATIENCE)
            return
        except torch.distributed.DistNetworkError:  # the store was in rank 0, which has ended
            return
        except torch.distributed.DistStoreError:
            pass  # nothing came
    print(line, file=sys.stderr, flush=True)
    if store:
        store.set(_SAID, "")


def from_rank_0(value: str, rank: int, ranks: int) -> str:
    """Rank 0's value, on every rank; all must call it. Needs no process group."""
    if ranks == 1:
        return value
    store, name = common_store(rank, ranks), f"megatron_cream/value/{next(_agreements)}"
    if rank == 0:
        store.set(name, value)
    with waiting_for_peers():
        return store.get(name).decode()


def common_store(rank: int, ranks: int) -> torch.distributed.Store | None:
    """Where the ranks of this start of the job find each other; None for one rank, which has nobody to find.

    A torchrun of one node keeps its store when it starts its ranks again (--max-restarts), with the addresses of those
    that died in it. Several have a new one each time (`nodes`), and count their restarts each by itself.
    """
    global _store
    if ranks == 1:
        return None
    if _store is None:
        with waiting_for_peers():
            _store, _, _ = next(torch.distributed.rendezvous("env://", rank, ranks))
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if kept else 0
    return torch.distributed.PrefixStore(f"attempt/{attempt}", _store)


def first_reason(why: str) -> str:
    """Return the first rank's `why` that is not empty, on every rank; all must call it. Needs the process group."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return why
    reasons = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, why)
    return next(filter(None, reasons), "")
