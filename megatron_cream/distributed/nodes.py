"""Checks that all nodes of a run agree, before a process group or a GPU is used.

With several nodes, a data file or a checkpoint may be missing on one of them. If --save is not on a shared file system,
each node would write only its part of every checkpoint.
"""

import contextlib
import os
import secrets
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.distributed.rendezvous import broadcast_from_rank_0, share_errors

_VISIBILITY_SECONDS = 30.0
"""Seconds that a network file system may take to show a new file on another node."""


@contextlib.contextmanager
def share_all_errors() -> Iterator[None]:
    """Raise any error of one rank's block on all ranks. All ranks must enter and leave the block.

    The error has the node's name, unless it is the first node.

    Raises:
        UsageError: the error of the first rank that failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if is_multi_node():
        _check_restarts()
    node = f" (on {socket.gethostname()})" if int(os.environ.get("GROUP_RANK", 0)) else ""
    with share_errors():
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{error}{node}") from error
        except Exception as error:  # the other ranks must not wait for this one
            traceback.print_exc()
            raise UsageError(f"{type(error).__name__}: {one_line(error)}{node}") from error


def check_shared(folders: dict[str, str | None]) -> None:
    """Check that every node sees the files that rank 0 writes into each folder.

    All ranks must call it.

    Args:
        folders: {flag: folder}; None is skipped.

    Raises:
        UsageError: a node does not see them.
    """
    for flag, folder in folders.items():
        if folder and is_multi_node():
            _check_folder(flag, Path(folder))


def _check_folder(flag: str, folder: Path) -> None:
    # A name that no node has looked up before, because network file systems cache missing files.
    marker = folder / f".seen-by-all-nodes-{broadcast_from_rank_0(secrets.token_hex(8))}"
    is_writer = int(os.environ.get("RANK", 0)) == 0
    with share_errors():
        if is_writer:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                marker.write_text("")
            except OSError as error:
                raise UsageError(f"{flag} {folder}: {error.strerror or error}") from error
    try:
        with share_errors():
            _wait_for(marker, flag)
    finally:
        if is_writer:
            marker.unlink(missing_ok=True)


def _wait_for(marker: Path, flag: str) -> None:
    """Raise UsageError if this node does not see the marker in time."""
    deadline = time.monotonic() + _VISIBILITY_SECONDS
    while not marker.exists():
        if time.monotonic() > deadline:
            raise UsageError(
                f"{flag} {marker.parent}: {socket.gethostname()} does not see the files that the first node writes "
                "there. Give a folder on a file system that all nodes share."
            )
        time.sleep(0.2)


def is_multi_node() -> bool:
    """Return whether the job may run on more than one node.

    torchrun tells the number of nodes; mpirun, srun and other launchers do not.
    """
    return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("WORLD_SIZE", 1)) > 1


def _check_restarts() -> None:
    """Reject restarts on several nodes with torchrun's own store.

    torchrun keeps that store over restarts, and each node counts its restarts by itself.
    """
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if keeps_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UsageError(
            "torchrun --max-restarts on several nodes: needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes. "
            "Without it the ranks do not find each other after a restart."
        )
