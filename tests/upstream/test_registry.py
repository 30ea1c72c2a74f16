"""Tests that `PATCHES` and the tests of this folder match."""

import importlib
from pathlib import Path
from pkgutil import resolve_name

from tests.upstream import HOOKS, PATCHES, WORKAROUNDS

FAULTS = PATCHES | WORKAROUNDS


def test_each_patch_has_the_tests_that_it_names():
    marked = {}
    for file in Path(__file__).parent.glob("test_*.py"):
        module = importlib.import_module(f"tests.upstream.{file.stem}")
        for name, function in vars(module).items():
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "xfail":
                    for patch in mark.kwargs["reason"].partition(":")[0].split():
                        marked.setdefault(patch, set()).add(f"{file.name}::{name}")
    assert marked == {name: set(fault.tests) for name, fault in FAULTS.items()}


def test_each_target_exists():
    assert not HOOKS.keys() & FAULTS.keys()
    for fault in FAULTS.values():
        resolve_name(fault.target)
