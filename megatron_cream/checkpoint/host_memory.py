"""Check before a save that the host has enough memory.

Otherwise the OOM killer or a SIGBUS would end the run. Each rank copies its part of the distributed optimizer, three
float32 values for each parameter, to the host's memory. If the values are there already, an asynchronous save passes
them to the writer process in shared memory.
"""

import os
import shutil

import psutil

SHARED = "/dev/shm"
_BYTES = 12  # of one parameter


def count_local_ranks() -> int:
    """Return the number of ranks on this host, from torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def format_bytes(count: int) -> str:
    """Return a number of bytes in GB, or in MB if they are few."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def find_shortage(parameters: int, *, ranks: int, data_parallel: int, in_shared_memory: bool) -> str:
    """Return why the host has too little memory for a save, or "" if it has enough.

    Args:
        parameters: number of parameters in this rank's part of the model.
        ranks: number of ranks on this host.
        data_parallel: number of ranks that share the optimizer of these parameters.
        in_shared_memory: the copies are passed to another process in shared memory.
    """
    need, free = ranks * _BYTES * parameters // data_parallel, psutil.virtual_memory().available
    if need > free:
        return (
            f"copying the optimizer needs {format_bytes(need)} of this host's memory, but {format_bytes(free)} "
            "are free. --no-save-optim saves the weights alone."
        )
    free = shutil.disk_usage(SHARED).free
    if in_shared_memory and need > free:
        return (
            f"--async-save needs {format_bytes(need)} in {SHARED} for the optimizer, but {format_bytes(free)} are "
            "free. Make it larger, or save without --async-save."
        )
    return ""
