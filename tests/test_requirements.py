"""Tests of the version bounds in requirements*.txt against the versions in constraints.txt."""

import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tests.launch import ROOT

FILES = ("requirements.txt", "requirements-dev.txt", "requirements-eval.txt", "requirements-qlora.txt")


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r", "python @"))]


@pytest.fixture(scope="module")
def ran() -> dict[str, str]:
    found = (Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#")
    return {_plain(each.name): next(iter(each.specifier)).version for each in found}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", FILES)
def test_the_versions_that_ran_are_within_the_bounds(file, ran):
    for each in requirements(file):
        version = ran[_plain(each.name)]
        assert each.specifier.contains(version), f"{each}: {version} ran"


def test_libraries_with_private_names_in_use_have_an_upper_bound():
    """A newer release may have moved the private names."""
    bounds = {each.name: str(each.specifier) for each in requirements("requirements.txt")}
    assert "<" in bounds["torch"] and "<" in bounds["megatron-core"]


def test_helpers_of_the_chain_need_no_pytest():
    """The chain's commands also run at another Python, which has only what users install."""
    blocked = "import sys; sys.modules |= dict.fromkeys(['pytest', 'hypothesis', 'peft'])"
    script = f"{blocked}; import tests.evaluation_models"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=300)
