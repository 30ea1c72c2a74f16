"""Which cases of a parametrised test run by default."""

from collections.abc import Iterable

import pytest


def slow_but(cases: Iterable[str], *by_default: str) -> list:
    """Return the cases as parameters of a test, all but `by_default` marked slow."""
    cases = list(cases)
    assert set(by_default) <= set(cases), by_default
    return [pytest.param(name, marks=[] if name in by_default else pytest.mark.slow) for name in cases]
