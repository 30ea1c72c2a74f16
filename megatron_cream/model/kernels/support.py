"""Where this project's kernels run: Triton comes with torch's CUDA wheels."""

import importlib.util

from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether the kernels run on this tensor's device."""
    return x.is_cuda and INSTALLED
