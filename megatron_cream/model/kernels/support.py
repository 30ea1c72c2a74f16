"""Detection of Triton, which is part of torch's CUDA wheels, for this project's kernels."""

import importlib.util

from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def can_use_kernels(x: Tensor) -> bool:
    """Return whether the kernels run on this tensor's device."""
    return x.is_cuda and HAS_TRITON
