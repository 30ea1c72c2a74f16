"""CUDA kernels of this project, each with a plain form in torch that it is tested against.

Triton, which comes with torch's CUDA wheels; nothing is compiled at installation.
"""

import importlib.util

from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether the kernels run on this tensor's device."""
    return x.is_cuda and INSTALLED
