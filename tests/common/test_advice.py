"""Tests of the commands that a user is advised to run next."""

import shlex
import sys

import pytest

from megatron_cream.common.advice import command_line, export_command
from tests.launch import ROOT


@pytest.mark.parametrize(
    "program, tool, expected",
    [
        (ROOT / "tools" / "convert_hf.py", "evaluate", f"python {ROOT}/tools/evaluate.py --model 'a b'"),
        (ROOT / "pretrain_cream.py", "convert_hf", f"python {ROOT}/tools/convert_hf.py --model 'a b'"),
        (
            ROOT / "tools" / "plan.py",
            "pretrain_cream",
            f"torchrun --nproc_per_node=1 {ROOT}/pretrain_cream.py --model 'a b'",
        ),
        (
            "/usr/bin/megatron-cream-plan",
            "pretrain_cream",
            "torchrun --nproc_per_node=1 -m pretrain_cream --model 'a b'",
        ),
        ("/usr/bin/megatron-cream-convert", "evaluate", "megatron-cream-evaluate --model 'a b'"),
        ("/lib/site-packages/pretrain_cream.py", "plan", "megatron-cream-plan --model 'a b'"),
        ("/lib/site-packages/pretrain_cream.py", "convert_hf", "megatron-cream-convert --model 'a b'"),
    ],
)
def test_the_command_starts_as_this_process_was_started(program, tool, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert shlex.split(command_line(tool, "--model", "a b")) == shlex.split(expected)


def test_paths_are_relative_where_the_program_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pretrain_cream.py"])
    assert export_command("run") == "python tools/convert_hf.py export --checkpoint run --hf-path run-hf"
