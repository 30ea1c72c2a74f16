"""What the nodes of a run must have in common, found out before a process group or a GPU is touched.

A run on one node sees one disk. On several, a data file or a checkpoint may be missing on one, and a --save that
is no shared file system would be filled with checkpoints of which each node has a part.
"""

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.distributed.rendezvous import agree

_PATIENCE = 30.0
"""Seconds that a network file system may take to show a new file."""


def run_on_all_ranks[Found](look: Callable[[], Found]) -> Found:
    """`look()` on every rank. If it fails on one, all raise its error, with the node's name if there are several.

    Raises:
        UsageError: that of the first rank whose `look` raised one.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return look()
    found = []

    def looked() -> None:
        here = f" (on {socket.gethostname()})" if int(os.environ.get("GROUP_RANK", 0)) else ""
        try:
            found.append(look())
        except UsageError as error:
            raise UsageError(f"{error}{here}") from error
        except Exception as error:  # the others must not wait for this one
            traceback.print_exc()
            raise UsageError(f"{type(error).__name__}: {one_line(error)}{here}") from error

    if is_multi_node():
        _check_restarts()
    agree(looked, int(os.environ["RANK"]), ranks)
    return found[0]


def check_shared(folders: dict[str, str | None], rank: int, ranks: int) -> None:
    """Check that every node sees what the first rank writes into each folder.

    All ranks must call it.

    Args:
        folders: {flag: folder}; None is passed over.
        rank: of this process, from 0.
        ranks: of the job.

    Raises:
        UsageError: a node does not.
    """
    for flag, folder in folders.items():
        if folder and is_multi_node():
            _check_folder(flag, Path(folder), rank, ranks)


def _check_folder(flag: str, folder: Path, rank: int, ranks: int) -> None:
    # Of a name that was never looked up: network file systems remember what was not there.
    run = f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ['MASTER_PORT']}".replace("/", "_")
    sign = folder / f".seen-by-all-nodes-{run}"

    def write() -> None:
        if rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                sign.write_text("")
            except OSError as error:
                raise UsageError(f"{flag} {folder}: {error.strerror or error}") from error

    def see() -> None:
        deadline = time.monotonic() + _PATIENCE
        while not sign.exists():
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{flag} {folder}: {socket.gethostname()} does not see what the first node writes there; "
                    "give a folder on a file system that all nodes share"
                )
            time.sleep(0.2)

    agree(write, rank, ranks)
    try:
        agree(see, rank, ranks)
    finally:
        if rank == 0:
            sign.unlink(missing_ok=True)


def is_multi_node() -> bool:
    """Whether torchrun runs on more than one node."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1


def _check_restarts() -> None:
    """torchrun's store, which it keeps over restarts, is no use where one of several nodes may be started anew."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if kept and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UsageError(
            "torchrun --max-restarts on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all of them, "
            "or its ranks would not find each other after a restart"
        )
