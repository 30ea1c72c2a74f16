"""Check before a save that the host has enough memory.

Otherwise the OOM killer or a SIGBUS would end the run. A fully reshardable checkpoint of the distributed optimizer is
gathered in host memory: three float32 values for each parameter of a rank's model, on every rank, or with
--distrib-optim-fully-reshardable-mem-efficient on the first rank of each data-parallel group. An asynchronous save
passes each rank's part to the writer process in shared memory.
"""

import os
import shutil
from dataclasses import dataclass

import psutil

_SHARED = "/dev/shm"
_BYTES = 12  # of one parameter


@dataclass(frozen=True)
class OptimizerGather:
    """The optimizer state that a save gathers on this host.

    parameters: number of parameters in this rank's part of the model.
    ranks: number of ranks on this host.
    tensor_parallel, data_parallel: number of ranks; data_parallel includes context parallelism.
    on_one: of each data-parallel group, not on all.
    """

    parameters: int
    ranks: int
    tensor_parallel: int
    data_parallel: int
    one_per_group: bool

    def host_bytes(self) -> int:
        """Return the least number of bytes that are gathered in this host's memory."""
        holders = min(self.ranks, self.tensor_parallel) if self.one_per_group else self.ranks
        return holders * _BYTES * self.parameters

    def shared_bytes(self) -> int:
        """Return about how many bytes this host's ranks pass to writer processes in shared memory."""
        return self.host_bytes() if self.one_per_group else self.host_bytes() // self.data_parallel


def count_local_ranks() -> int:
    """Return the number of ranks on this host, from torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def find_shortage(gathered: OptimizerGather, *, asynchronous: bool) -> str:
    """Return why the host has too little memory for a save, or "" if it has enough.

    Args:
        gathered: the optimizer state that the save gathers on this host.
        asynchronous: another process writes, as with --async-save.
    """
    need, free = gathered.host_bytes(), psutil.virtual_memory().available
    if need > free:
        one = "" if gathered.one_per_group else "--distrib-optim-fully-reshardable-mem-efficient or "
        return (
            f"gathering the optimizer needs {need / 1e9:.1f} GB of this host's memory, but {free / 1e9:.1f} GB are "
            f"free. Use {one}--no-dist-ckpt-optim-fully-reshardable."
        )
    need, free = gathered.shared_bytes(), shutil.disk_usage(_SHARED).free
    if asynchronous and need > free:
        return (
            f"--async-save needs {need / 1e9:.1f} GB in {_SHARED} for the optimizer, but {free / 1e9:.1f} GB are free. "
            "Make it larger, or use --no-dist-ckpt-optim-fully-reshardable."
        )
    return ""
