import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded; pytest runs two tests at a time

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Where a virtual environment was not activated: commands under test start torchrun and python.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

from megatron_cream import platform

platform.setup()


def pytest_collection_modifyitems(items):
    if platform.has_cuda():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
