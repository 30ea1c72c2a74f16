"""Replace names of other libraries whose signatures are as recorded.

Each replacement is declared as a `Patch`: next to the correction that it belongs to, or in `hooks` if another package
of this project has the replacement. `table` lists all of them. Only `platform` also assigns to names of other
libraries.
"""

import builtins
import contextlib
import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_cream.common.errors import UsageError
from megatron_cream.common.versions import find_versions

MEGATRON = "megatron-core 0.19.2"
"""The release that most patches were written for."""

_DISTRIBUTIONS = {"megatron": "megatron-core", "multiprocessing": "python"}
_MISSING = object()


@dataclass(frozen=True)
class Patch:
    """A name of another library that this project replaces.

    Args:
        name: unique among all patches.
        target: "module:name" or "module:Class.name".
        reason: why it is replaced, in one sentence.
        parameters: the function's parameters, without defaults, annotations and a class method's `cls`:
            "self, rank, *, blocking". None if the target is a plain value.
        value_type: type name of a plain value, or several separated by " | ". "missing" means that the name does not
            exist.
        written_for: the releases whose target has these parameters.
        fixed_in: the first release that does not need the patch, if there is one.
        after: patches of the same target whose wrappers this patch's wrapper calls, if they are installed.
    """

    name: str
    target: str
    reason: str
    parameters: str | None = None
    value_type: str = ""
    written_for: str = MEGATRON
    fixed_in: str | None = None
    after: tuple[str, ...] = ()


_chains: weakref.WeakKeyDictionary[Callable, tuple[Any, list[tuple[Patch, Callable]]]] = weakref.WeakKeyDictionary()
"""Installed function -> (original target, [(patch, wrapper)], innermost first)."""
_assigned: dict[str, Any] = {}
"""Name of a patch -> the original target of `assign`."""


def install(patch: Patch, wrapper: Callable) -> None:
    """Replace a function or method by `wrapper`.

    `wrapper` gets the original as its first argument. A second call for the same patch does nothing.

    Raises:
        UsageError: the target differs from the record.
    """
    check(patch)
    owner, name = _find(patch)
    found = _look_up(owner, name)
    original, steps = _chains.get(getattr(found, "__func__", found), (found, []))
    if any(other.name == patch.name for other, _ in steps):
        return
    place = next((i for i, (other, _) in enumerate(steps) if patch.name in other.after), len(steps))
    setattr(owner, name, _join(owner, name, original, [*steps[:place], (patch, wrapper), *steps[place:]]))


def assign(patch: Patch, value: Any) -> None:
    """Replace a value, or a function by an object that does not call the original.

    Raises:
        UsageError: the target differs from the record.
    """
    check(patch)
    owner, name = _find(patch)
    before = _assigned.setdefault(patch.name, _look_up(owner, name))
    setattr(owner, name, staticmethod(value) if isinstance(before, staticmethod) else value)


@contextlib.contextmanager
def override(patch: Patch, wrapper: Callable) -> Iterator[None]:
    """Install `wrapper` until the context ends."""
    check(patch)
    owner, name = _find(patch)
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, _join(owner, name, _look_up(owner, name), [(patch, wrapper)]))
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def check(patch: Patch) -> None:
    """Check that the target has the recorded parameters or type.

    Raises:
        UsageError: it is missing, or has other parameters or another type.
    """
    expected = patch.value_type if patch.parameters is None else f"({patch.parameters})"
    found = describe(patch)
    if found == expected or (patch.parameters is None and found in expected.split(" | ")):
        return
    distribution = _DISTRIBUTIONS.get(package := patch.target.partition(".")[0], package)
    installed = f"{distribution} {find_versions([distribution]).get(distribution, 'of an unknown version')}"
    raise UsageError(
        f"{installed} is installed, but patch {patch.name} was written for {patch.written_for}: "
        f"{patch.target.replace(':', '.')} is {found}, expected {expected}. Install {patch.written_for}"
    )


def describe(patch: Patch) -> str:
    """Return the target's parameters in parentheses, or a value's type, or "missing"."""
    try:
        owner, name = _find(patch)
    except (ImportError, AttributeError):
        return "missing"
    found = _assigned.get(patch.name, _look_up(owner, name))
    if found is _MISSING:
        return "missing"
    function = found.__get__(None, owner) if isinstance(found, staticmethod | classmethod) else found
    if patch.parameters is None or not callable(function):
        return type(found).__name__
    signature = inspect.signature(function)
    plain = [each.replace(annotation=each.empty, default=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def _find(patch: Patch) -> tuple[Any, str]:
    """Return the module or class that has the target, and the target's name in it."""
    module, _, path = patch.target.partition(":")
    *outer, name = path.split(".")
    return functools.reduce(getattr, outer, importlib.import_module(module)), name


def _look_up(owner: Any, name: str) -> Any:
    """Return the attribute without binding it. Modules also have the built-in names."""
    own = inspect.getattr_static(owner, name, _MISSING)
    return getattr(builtins, name, _MISSING) if own is _MISSING and inspect.ismodule(owner) else own


def _join(owner: Any, name: str, original: Any, steps: list[tuple[Patch, Callable]]) -> Any:
    """Return a function that calls the wrappers, the last one first, and the original."""
    bound = isinstance(original, staticmethod | classmethod)
    innermost = original.__get__(None, owner) if bound else original
    call = innermost
    for _, wrapper in steps:
        call = functools.partial(wrapper, call)

    @functools.wraps(innermost)
    def function(*args, **kwargs):
        return call(*args, **kwargs)

    _chains[function] = original, steps
    return staticmethod(function) if bound else function
