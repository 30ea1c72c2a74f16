"""torchrun's environment variables, or one rank without torchrun.

Imports little: `end_with_launcher` runs before torch and Megatron are imported, which takes seconds.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping

from megatron_cream.common.errors import UsageError
from megatron_cream.common.processes import end_with_parent


def end_with_launcher() -> None:
    """Make the system send SIGUSR1 to this rank when its torchrun ends.

    A rank does not notice otherwise that its torchrun was killed. The signal ends a rank that is starting; a rank that
    trains saves a checkpoint first (`training.signals`).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGUSR1)


@contextlib.contextmanager
def waiting_for_peers() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process while it waits for other ranks.

    The wait is in C++, where no Python signal handler runs. Without this, when one rank fails, the waiting ranks ignore
    torchrun's SIGTERM until its SIGKILL 30 seconds later.
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


def get_rank_and_world_size() -> tuple[int, int]:
    """Return the rank and the world size.

    Without a launcher that is (0, 1), and MASTER_ADDR and MASTER_PORT are set to a free local address.

    Raises:
        UsageError: environment variables are invalid, or some are missing.
    """
    rank, world_size = read_environment(os.environ)
    if world_size == 1 and not ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        # Inherited from an outer torchrun, which has no store at this address.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return rank, world_size


_NUMBERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
)
_UPPER_LIMITS = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE", "GROUP_RANK": "GROUP_WORLD_SIZE"}
_NEEDED_BY_SEVERAL_RANKS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def read_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return RANK and WORLD_SIZE from torchrun's variables, (0, 1) without them.

    Raises:
        UsageError: a variable has a value that torchrun never sets, or one that several ranks need is missing.
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
    for name, limit_name in _UPPER_LIMITS.items():
        limit = found.get(limit_name, 1 if limit_name == "WORLD_SIZE" else None)
        if limit is not None and found.get(name, 0) >= limit:
            raise UsageError(
                f"{name}={found.get(name, 0)} in the environment: must be below {limit_name}={limit}, as torchrun "
                "sets it"
            )
    if world_size > 1:
        for name in _NEEDED_BY_SEVERAL_RANKS:
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
