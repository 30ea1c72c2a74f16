"""The GPUs of this machine, without importing torch."""

import os
import shutil
import subprocess
from dataclasses import dataclass

TOOL = "nvidia-smi"


@dataclass(frozen=True)
class Machine:
    """The GPUs that a benchmark uses.

    count: number of them, or of CPU ranks.
    gpu: their kind in the planner's words, H100 or H200; None without GPUs.
    memory: GiB of each.
    names: their names in CUDA_VISIBLE_DEVICES.
    """

    count: int
    gpu: str | None = None
    memory: float = 1024.0
    names: tuple[str, ...] = ()

    def visible(self, gpus: set[int]) -> str:
        """Return CUDA_VISIBLE_DEVICES for these GPUs."""
        return ",".join(self.names[gpu] for gpu in sorted(gpus))

    def read_used_memory(self) -> list[float]:
        """Return the GiB that are used of each GPU, by all processes; without GPUs none."""
        if not self.names or not shutil.which(TOOL):
            return []
        return [int(line) / 1024 for line in _query("memory.used", "-i", ",".join(self.names))]


def find_machine(count: int) -> Machine:
    """Return the first `count` GPUs of this machine.

    Raises:
        SystemExit: it has fewer.
    """
    if not shutil.which(TOOL):
        return Machine(count)
    lines = _query("name,memory.total")
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(gpu) for gpu in range(len(lines))]
    if len(names) < count:
        raise SystemExit(f"{count} GPUs are needed; this machine has {len(names)}")
    model, memory = lines[0].rsplit(",", 1)
    kind = next((kind for kind in ("H200", "H100", "A100") if kind in model), "H100")
    return Machine(count, kind, int(memory) / 1024, tuple(names[:count]))


def _query(fields: str, *flags: str) -> list[str]:
    """Return what nvidia-smi says of each GPU, memory in MiB."""
    command = [TOOL, f"--query-gpu={fields}", "--format=csv,noheader,nounits", *flags]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
