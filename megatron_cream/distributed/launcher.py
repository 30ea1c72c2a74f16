"""What torchrun gives a rank, and a run that has none, which is one rank.

Imports little: `follow` comes before torch and Megatron, whose imports take seconds.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping

from megatron_cream.common.errors import UsageError
from megatron_cream.common.processes import end_with_parent


def follow() -> None:
    """A torchrun that died would leave its ranks behind, which know nothing of it: its end is SIGUSR1 to them.

    While a rank starts, that ends it; later it saves first (`signals`).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGUSR1)


@contextlib.contextmanager
def waiting_for_peers() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process while it waits for other ranks in C++, where no Python handler runs.

    Else torchrun, one of whose ranks has failed, kills those that wait 30 seconds later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ranks() -> tuple[int, int]:
    """Return this rank and how many there are. Without a launcher 0 of 1, with an address of its own.

    Raises:
        UsageError: the environment's variables cannot be, or a part of them is missing.
    """
    rank, world_size = read_environment(os.environ)
    if world_size == 1 and not ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # of a torchrun around this one: it has no store there
    return rank, world_size


_NUMBERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
)  # fmt: skip
_BELOW = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE", "GROUP_RANK": "GROUP_WORLD_SIZE"}
_OF_SEVERAL = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def read_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return RANK and WORLD_SIZE of torchrun's variables, 0 of 1 without them.

    Raises:
        UsageError: one has a value that torchrun never gives it, or one of several ranks lacks what it needs.
    """
    found = {}
    for name in _NUMBERS:
        if (value := environment.get(name)) is None:
            continue
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            raise UsageError(f"{name}={value} in the environment: must be a whole number, as torchrun sets it")
        found[name] = int(value)
    if found.get("MASTER_PORT", 0) > 65535:
        raise UsageError(f"MASTER_PORT={found['MASTER_PORT']} in the environment: must be 65535 or less")
    rank, world_size = found.get("RANK", 0), found.get("WORLD_SIZE", 1)
    for name, limit in _BELOW.items():
        most = found.get(limit, 1 if limit == "WORLD_SIZE" else None)
        if most is not None and found.get(name, 0) >= most:
            raise UsageError(
                f"{name}={found.get(name, 0)} in the environment: must be below {limit}={most}, as torchrun sets it"
            )
    if world_size > 1:
        for name in _OF_SEVERAL:
            if not environment.get(name):
                raise UsageError(
                    f"WORLD_SIZE={world_size} in the environment: {name} is missing; start the ranks with torchrun, or "
                    "unset WORLD_SIZE for a run of one rank"
                )
        if found["LOCAL_RANK"] >= world_size:
            raise UsageError(
                f"LOCAL_RANK={found['LOCAL_RANK']} in the environment: must be below WORLD_SIZE={world_size}, as "
                "torchrun sets it"
            )
    if found.get("GROUP_WORLD_SIZE", 1) > 1 and not environment.get("TORCHELASTIC_RUN_ID"):
        raise UsageError(
            f"GROUP_WORLD_SIZE={found['GROUP_WORLD_SIZE']} in the environment: TORCHELASTIC_RUN_ID is missing; start "
            "the ranks of several nodes with torchrun"
        )
    return rank, world_size
