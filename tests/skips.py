"""Hooks of pytest that turn a skip into a failure in CI: no other machine runs the tests that CI skips."""

import os

import pytest


def _fail_if_skipped_in_ci(report):
    """If CI=true, turn a skip into a failure unless a GPU is missing."""
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
