"""What torchrun gives a rank, and a run that has none, which is one rank.

Imports little: `follow` comes before torch and Megatron, whose imports take seconds.
"""

import ctypes
import os
import signal
import socket

from megatron_cream.errors import UsageError

_PR_SET_PDEATHSIG = 1


def follow() -> None:
    """A torchrun that died would leave its ranks behind, which know nothing of it: its end is SIGUSR1 to them.

    While a rank starts, that ends it; later it saves first (`signals`).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGUSR1)


def die_with_parent(number: signal.Signals) -> None:
    """Let the system send this process a signal when the thread that started it ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended in between, of which the system says nothing
        os.kill(os.getpid(), number)


def ranks() -> tuple[int, int]:
    """This rank and how many there are. Without a launcher 0 of 1, with an address of its own.

    Raises:
        UsageError: what the environment has cannot be.
    """
    found = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1}
    for name, default in found.items():
        value = os.environ.get(name, str(default))
        if not (value.isascii() and value.isdigit()):
            raise UsageError(f"{name}={value} in the environment: must be a whole number, as torchrun sets it")
        found[name] = int(value)
    if not found["RANK"] < found["WORLD_SIZE"]:
        raise UsageError(
            f"RANK={found['RANK']} in the environment: must be below WORLD_SIZE={found['WORLD_SIZE']}, as torchrun sets it"
        )
    if found["WORLD_SIZE"] == 1 and "MASTER_ADDR" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return found["RANK"], found["WORLD_SIZE"]
