"""Tests of docs/architecture.md and CONTRIBUTING.md: their files and functions exist, the rooms are the folders."""

import ast
import re

import pytest

from tests.launch import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "megatron_cream"


def test_the_rooms_are_the_package():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(re.findall(r"^  (\w+)/", PAGE[: PAGE.index("tools/ ")], re.MULTILINE))
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]  # no module in the root


@pytest.mark.parametrize("file, name", re.findall(r"`([\w/]+\.py)`:\s+`(\w+)", PAGE))
def test_functions_of_the_tours_exist(file, name):
    found = [path for path in (ROOT / file, PACKAGE / file, *PACKAGE.glob(f"*/{file}")) if path.is_file()]
    assert found, file
    names = {node.name for node in ast.walk(ast.parse(found[0].read_text())) if hasattr(node, "name")}
    names |= {
        target.id
        for node in ast.walk(ast.parse(found[0].read_text()))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert name in names


def test_places_that_contributing_names_exist():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where a new thing goes")[2].partition("## Rules")[0]
    places = re.findall(r"`([a-z_]+/[\w/.]*)`", table)
    missing = [
        place
        for place in places
        if "NAME" not in place and not any((folder / place).exists() for folder in (ROOT, PACKAGE))
    ]
    assert len(places) > 20 and not missing, missing


def test_files_are_small_and_init_files_only_re_export():
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        if path.name == "__init__.py" and path.parent != PACKAGE:
            assert all(isinstance(node, kinds) for node in ast.parse(text).body), path
