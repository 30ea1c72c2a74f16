import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded; pytest runs several tests at a time

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Where a virtual environment was not activated: commands under test start torchrun and python.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

from megatron_cream.common import devices
from megatron_cream.patches import platform

platform.setup()


# Files are handed out in this order: a long one that comes last would run alone.
LONGEST = (
    "chain faults nodes slurm long_evaluation_runs bad_inputs parallel resume_preprocess traffic convert_faults "
    "study perplexity one_pass after_save"
).split()


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if devices.has_cuda():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="gpu: needs a CUDA device"))


def _fail_if_skipped_in_ci(report):
    """Turn a skip for any reason but a GPU into a failure where CI=true: what CI skips is tested nowhere."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith("gpu: "):
            report.outcome = "failed"
            report.longrepr = f"skipped, which CI does not allow: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _fail_if_skipped_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _fail_if_skipped_in_ci((yield))
