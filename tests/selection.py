"""Selection of the cases of a parametrised test that run by default."""

from collections.abc import Iterable

import pytest


def slow_but(cases: Iterable[str], *by_default: str) -> list:
    """Return the cases as pytest parameters, with all but `by_default` marked slow."""
    cases = list(cases)
    assert set(by_default) <= set(cases), by_default
    return [pytest.param(name, marks=[] if name in by_default else pytest.mark.slow) for name in cases]
