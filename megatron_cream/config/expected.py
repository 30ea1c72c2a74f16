"""What the planner expects of a run; its lines of the summary say it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """The plan of a run on this machine's GPUs.

    gpu: the kind of GPU, such as H100.
    step: seconds of a step.
    memory: bytes of the fullest GPU.
    usable: bytes that the GPU has.
    is_close: whether the run may not fit, as far as the plan can tell.
    """

    gpu: str
    step: float
    memory: int
    usable: int
    is_close: bool
