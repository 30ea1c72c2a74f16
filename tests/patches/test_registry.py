"""The registry of patches: rules for replacements, and the error for an incompatible release."""

import ast
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from packaging.requirements import Requirement

from megatron_cream.common.errors import UsageError
from megatron_cream.patches import hooks, install_all, registry, table
from megatron_cream.patches.registry import Patch
from tests import upstream
from tests.launch import ROOT, TINY

OURS = "megatron_cream"
ALL = table.collect_patches()
CODE = [*(ROOT / OURS).rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_cream.py"]

ALLOWED = {
    "os.environ",
    "sys.argv",
    "sys.stdout",
    "sys.__stdout__",
    "sys.stderr",
    "sys.__stderr__",
    "sys.unraisablehook",
}
"""The process's own: its streams, its command line and its environment."""


def root(node: ast.AST) -> ast.AST:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def foreign_names(tree: ast.Module) -> set[str]:
    """Return the names that a file imports from other libraries, and aliases of them or their attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names if OURS not in alias.name}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(OURS):
            names |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            found = root(node.value)
            if isinstance(found, ast.Name) and found.id in names:
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def replacements(code: str) -> list[str]:
    """Return what a file assigns or deletes in other libraries."""
    tree = ast.parse(code)
    names, found = foreign_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
            target = node.target
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            target = node.args[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unittest"):
            found.append("unittest.mock")
            continue
        else:
            continue
        start = root(target)
        if isinstance(start, ast.Name) and start.id in names and ast.unparse(target) not in ALLOWED:
            found.append(ast.unparse(target))
    return found


@pytest.mark.parametrize(
    "code, found",
    [
        ("import torch\ntorch.cuda.stream = 1", ["torch.cuda.stream"]),
        ("import sys\nsys.modules['a'].b = 1", ["sys.modules['a'].b"]),
        ("from a import B\ndef f():\n    setattr(B, 'c', 1)", ["B"]),
        ("from a import b\nc = b.d\ndel c.e", ["c.e"]),
        ("from unittest import mock", ["unittest.mock"]),
        ("import a\nb = a.C()\nb.d = 1", []),  # an object that this project created
        ("from megatron_cream import a\na.b = 1", []),
        ("import sys\nsys.argv = []", []),
    ],
)
def test_replacements_are_seen(code, found):
    assert replacements(code) == found


def test_only_patches_replace_names_of_other_libraries():
    outside = [path for path in CODE if path.parent.name != "patches"]
    assert len(outside) > 100
    assert {str(path.relative_to(ROOT)): found for path in outside if (found := replacements(path.read_text()))} == {}


def test_patches_replace_by_the_registry():
    """Patches use the registry, except `platform`, which runs before Megatron is imported and has its own list."""
    inside = [
        path for path in CODE if path.parent.name == "patches" and path.name not in ("registry.py", "platform.py")
    ]
    assert len(inside) > 10 and not [path for path in inside if replacements(path.read_text())]


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_each_target_is_as_recorded(patch):
    registry.check(patch)
    assert patch.reason.endswith(".") and patch.written_for and (patch.parameters is None) == bool(patch.value_type)


def test_names_are_unique():
    assert len({patch.name for patch in ALL}) == len(ALL)


def test_patches_of_one_target_say_their_order():
    by_target = {}
    for patch in ALL:
        by_target.setdefault(patch.target, []).append(patch)
    for patches in by_target.values():
        for one, other in itertools.combinations(patches, 2):
            assert (one.name in other.after) != (other.name in one.after), (one.name, other.name)
    names = {patch.name: patch.target for patch in ALL}
    assert all(names[other] == patch.target for patch in ALL for other in patch.after)


def test_the_advised_version_is_within_the_bounds():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    asked = [Requirement(line) for line in lines if line.startswith(("megatron-core", "torch"))]
    bounds = {each.name: each.specifier for each in asked}
    for patch in ALL:
        package, *versions = patch.written_for.replace(" to ", " ").split()
        if package in ("megatron-core", "torch"):
            assert all(bounds[package].contains(version) for version in versions), patch.name
            assert not bounds[package].contains("1.0") and not bounds[package].contains("99")


class Owner:
    """Stand-in for a class of another library."""

    text = "before"

    def method(self, x):
        return [x]

    @staticmethod
    def static(x):
        return [x]

    @classmethod
    def of_class(cls, x):
        return [cls.__name__, x]


def patch_of(name: str, **options) -> Patch:
    return Patch(f"test-{name}", f"{__name__}:Owner.{name}", "A test.", **options)


METHODS = {"method": "self, x", "static": "x", "of_class": "x"}


@pytest.mark.parametrize("name", METHODS)
def test_a_replacement_is_made_once_and_keeps_its_kind(name, monkeypatch):
    monkeypatch.setattr(Owner, name, vars(Owner)[name])  # restored after the test
    patch, before = patch_of(name, parameters=METHODS[name]), getattr(Owner(), name)(1)

    def wrapper(original, *args):
        return [*original(*args), "wrapped"]

    for _ in range(2):
        registry.install(patch, wrapper)
        assert getattr(Owner(), name)(1) == [*before, "wrapped"]
    with registry.override(replace(patch, name="another"), lambda original, *args: [*original(*args), "for a while"]):
        assert getattr(Owner(), name)(1) == [*before, "wrapped", "for a while"]
    assert getattr(Owner(), name)(1) == [*before, "wrapped"]


@pytest.mark.parametrize("first", [0, 1])
def test_the_declared_order_holds_whichever_comes_first(first, monkeypatch):
    monkeypatch.setattr(Owner, "method", Owner.method)
    inner = patch_of("method", parameters="self, x")
    outer = replace(inner, name="outer", after=(inner.name,))
    both = [(inner, lambda original, self, x: [*original(self, x), "inner"])]
    both.append((outer, lambda original, self, x: [*original(self, x), "outer"]))
    for patch, wrapper in (both[first], both[1 - first]):
        registry.install(patch, wrapper)
    assert Owner().method(1) == [1, "inner", "outer"]


def test_a_value_is_replaced(monkeypatch):
    monkeypatch.setattr(Owner, "text", "before")
    patch = patch_of("text", value_type="int | str")
    for value in (None, 3.5):  # the second value replaces a patched one
        registry.assign(patch, value)
        assert Owner.text == value
    with pytest.raises(UsageError, match=r"Owner\.text is str, expected int"):
        registry.check(
            patch_of("text", value_type="int"),
        )


def test_a_built_in_function_is_replaced_in_one_module():
    with registry.override(hooks.OPEN_SHARD, lambda original, path, mode: (path, mode)):
        assert filesystem_async.open("a", "b") == ("a", "b")
    assert "open" not in vars(filesystem_async)


def test_a_change_in_a_release_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(registry, "find_versions", lambda _: {"megatron-core": "0.20.0"})
    caller = sys.modules["megatron.core.dist_checkpointing.strategies.async_utils"].PersistentAsyncCaller
    monkeypatch.setattr(caller, "schedule_async_call", lambda self, request, *, rank: None)
    for check in (table.check_all, lambda: registry.install(hooks.CALL_WRITER, print)):
        with pytest.raises(UsageError) as error:
            check()
        assert str(error.value) == (
            "megatron-core 0.20.0 is installed, but patch call-writer was written for megatron-core 0.19.2: "
            "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller.schedule_async_call is "
            "(self, request, *, rank), expected (self, async_req). Install megatron-core 0.19.2"
        )
    monkeypatch.delattr(serialization, "save_config")
    with pytest.raises(UsageError, match=r"serialization\.save_config is missing, expected"):
        registry.check(hooks.SAVE_CONFIG)
    moved = replace(hooks.CALL_WRITER, target="megatron.core.moved:function")
    with pytest.raises(UsageError, match=r"megatron\.core\.moved\.function is missing, expected"):
        registry.check(moved)


CHANGED = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "megatron.training.dist_signal_handler":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def change(module):
            execute(module)
            module.DistributedSignalHandler.signals_received = lambda self, group: None
        spec.loader.exec_module = change
        return spec

sys.meta_path.insert(0, Finder())
"""


def test_another_release_prints_one_line(tmp_path):
    """A run fails with one line before it writes a file or trains a step."""
    changed, folder = tmp_path / "changed", tmp_path / "work"
    changed.mkdir()
    folder.mkdir()
    (changed / "sitecustomize.py").write_text(CHANGED)
    path = os.pathsep.join(filter(None, [str(changed), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "pretrain_cream.py"), *TINY, "--save", "run", "--train-iters", "1"]
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr[-3000:]
    assert result.stderr == (
        "pretrain_cream.py: error: megatron-core 0.19.2 is installed, but patch signals-received was written for "
        "megatron-core 0.19.2: megatron.training.dist_signal_handler.DistributedSignalHandler.signals_received is "
        "(self, group), expected (self). Install megatron-core 0.19.2\n"
    )
    assert not list(folder.iterdir())


def test_corrections_are_all_in_the_list():
    """Every module with corrections is installed."""
    elsewhere = {"hooks", "platform", "registry", "table", "install_all", "safe_loading", "tensorboard"}
    modules = {path.stem for path in Path(install_all.__file__).parent.glob("*.py")} - elsewhere - {"__init__"}
    assert modules == {name for name in vars(install_all) if hasattr(getattr(install_all, name), "install")}


def test_each_correction_has_its_reproduction():
    """`tests/upstream` has a test of each patch, or the reason why it has none."""
    faults = {name: fault.target for name, fault in upstream.PATCHES.items()}
    assert faults == {patch.name: patch.target for patch in ALL if patch.name not in upstream.HOOKS}
    assert upstream.HOOKS.keys() <= {patch.name for patch in ALL}
