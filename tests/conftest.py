import gc
import os
import sys
from pathlib import Path

import pytest

gc.disable()  # until the tests run: collections take a quarter of the imports' time and find nothing

# Both are read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs several tests at a time
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warning when rank 0, with the store, ends a moment earlier

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Commands under test start torchrun and python, also where the virtual environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

from tests import forked_commands, help_texts
from tests.skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]  # hooks


# Files are distributed to the workers in this order: a long file that starts last would run alone.
LONGEST = (
    "docs chain faults nodes slurm long_evaluation_runs bad_inputs parallel resume_preprocess traffic convert_faults "
    "study perplexity one_pass after_save"
).split()


# Files that take minutes: how many of their tests run by default, spread evenly. The others are marked slow, and run
# with -m "" and in .ci/run.
KEPT = {
    "checkpoint/test_after_save.py": 5, "checkpoint/test_convert_faults.py": 8, "commands/test_no_room.py": 4,
    "commands/test_tool_faults.py": 12, "common/test_entry.py": 10, "config/test_advice.py": 5,
    "config/test_bad_inputs.py": 25, "distributed/test_nodes.py": 1,
    "distributed/test_processes.py": 1, "evaluation/test_evaluate.py": 4, "evaluation/test_long_evaluation_runs.py": 0,
    "examples/test_slurm.py": 0, "examples/test_study.py": 3, "examples/test_study_real.py": 1,
    "optimizer/test_one_pass.py": 0, "planning/test_measured.py": 15, "planning/test_traffic.py": 0, "training/test_default_run.py": 0,
    "upstream/test_checkpoints.py": 0, "upstream/test_distributed_optimizer.py": 0,
    "upstream/test_signals.py": 0, "upstream/test_schedule.py": 0, "upstream/test_cuda_graphs.py": 0,
}  # fmt: skip


def _mark_slow(items):
    for name, kept in KEPT.items():
        of_file = [item for item in items if item.path == ROOT / "tests" / name]
        first = {round(i * len(of_file) / kept) for i in range(kept)}
        for place, item in enumerate(of_file):
            if place not in first:
                item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        forked_commands.share()  # by the workers that this process starts


@pytest.hookimpl(tryfirst=True)  # before a module of tests is imported; a process that starts workers imports none
def pytest_pycollect_makemodule():
    from megatron_cream.patches import platform

    platform.setup()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    from megatron_cream.common import devices

    help_texts.read_once()
    _mark_slow(items)
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if devices.has_cuda():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="gpu: needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # what is imported stays alive: later collections skip it
    gc.enable()
