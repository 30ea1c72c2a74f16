"""What a checkpoint takes of the host's memory, looked at before: beyond it is the OOM killer, or a SIGBUS.

A fully reshardable checkpoint of the distributed optimizer is gathered in the host's memory first: three float32 of
each parameter of a rank's model, on every rank, or with --distrib-optim-fully-reshardable-mem-efficient on the first
of each data-parallel group. What of it a rank writes, an asynchronous save hands over in shared memory.
"""

import os
import shutil
from dataclasses import dataclass

import psutil

_SHARED = "/dev/shm"
_BYTES = 12


@dataclass(frozen=True)
class OptimizerGather:
    """parameters: of this rank's part of the model.
    ranks: of this host.
    tensor_parallel, data_parallel: sizes; of the latter with context parallelism.
    on_one: of each data-parallel group, not on all.
    """

    parameters: int
    ranks: int
    tensor_parallel: int
    data_parallel: int
    one_per_group: bool

    def host_bytes(self) -> int:
        """Bytes on this host, at least."""
        holders = min(self.ranks, self.tensor_parallel) if self.one_per_group else self.ranks
        return holders * _BYTES * self.parameters

    def shared_bytes(self) -> int:
        """Bytes that this host's writers are given, about."""
        return self.host_bytes() if self.one_per_group else self.host_bytes() // self.data_parallel


def count_local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def find_shortage(gathered: OptimizerGather, *, asynchronous: bool) -> str:
    """Return why the host has too little memory for a save; "" where it has enough.

    Args:
        gathered: what the save gathers on this host.
        asynchronous: another process writes, as with --async-save.
    """
    need, free = gathered.host_bytes(), psutil.virtual_memory().available
    if need > free:
        one = "" if gathered.one_per_group else "--distrib-optim-fully-reshardable-mem-efficient or "
        return (
            f"the optimizer is gathered in {need / 1e9:.1f} GB of this host's memory, of which {free / 1e9:.1f} GB are "
            f"free: take {one}--no-dist-ckpt-optim-fully-reshardable"
        )
    need, free = gathered.shared_bytes(), shutil.disk_usage(_SHARED).free
    if asynchronous and need > free:
        return (
            f"--async-save hands {need / 1e9:.1f} GB of the optimizer over in {_SHARED}, which has {free / 1e9:.1f} GB "
            "free: make it larger, or take --no-dist-ckpt-optim-fully-reshardable"
        )
    return ""
