"""Tests of every command under Ctrl-C, with unwritable standard output, and under `python -O`."""

import os
import signal
import subprocess
import sys

import pytest

from tests.launch import ROOT

COMMANDS = [
    "pretrain_cream.py",
    "tools/convert_hf.py",
    "tools/evaluate.py",
    "tools/plan.py",
    "tools/plot_positions.py",
    "tools/preprocess_data.py",
]
# Python loads this before the script. It sends the process SIGINT when the script imports a given module.
INTERRUPT_AT_IMPORT = """
import os, signal, sys
def hook(event, found):
    if event == "import" and found[0] == os.environ["INTERRUPT_AT"]:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
"""
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from megatron_cream.common import entry
if __name__ == "__main__":
    entry.start()
def main():
{body}
if __name__ == "__main__":
    entry.run(main)
"""


def run(command, shell_redirect: str = "", **environment) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, command)]
    if shell_redirect:
        words = ["bash", "-c", f'"$@" {shell_redirect}', "bash", *words]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | environment
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def script(tmp_path, body: str):
    path = tmp_path / "tool.py"
    path.write_text(SCRIPT.format(root=str(ROOT), body="\n".join(f"    {line}" for line in body.splitlines())))
    return path


@pytest.mark.parametrize(
    "command, module",
    [
        *((command, "torch") for command in COMMANDS[:4]),
        ("tools/plot_positions.py", "numpy"),
        ("tools/plot_positions.py", "matplotlib"),
        ("tools/preprocess_data.py", "numpy"),
    ],
)
def test_ctrl_c_during_imports_prints_one_line(tmp_path, command, module):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT_AT_IMPORT)
    flags = ["--samples", 10, "--output", tmp_path / "x.png"] if module == "matplotlib" else []
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = run([command, *flags], PYTHONPATH=path, INTERRUPT_AT=module)
    assert (result.returncode, result.stderr) == (130, f"{os.path.basename(command)}: interrupted\n")
    assert not (tmp_path / "x.png").exists()


def test_only_rank_0_reports_ctrl_c(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT_AT_IMPORT)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = run(["pretrain_cream.py"], PYTHONPATH=path, INTERRUPT_AT="torch", RANK="1", WORLD_SIZE="2")
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize(
    "body",
    [
        "os.kill(os.getpid(), 2)",
        "try: os.kill(os.getpid(), 2)\nexcept KeyboardInterrupt: raise RuntimeError",  # as extension modules do
        "class Deleted:\n    def __del__(self): os.kill(os.getpid(), 2)\nDeleted()",
        "import atexit\natexit.register(lambda: os.kill(os.getpid(), 2))",
        # A fork that has not yet set its own handler.
        "child = os.fork() or os.kill(os.getpid(), 2)\nos.waitpid(child, 0)\nos.kill(os.getpid(), 2)",
    ],
)
def test_ctrl_c_during_a_command_prints_one_line(tmp_path, body):
    result = run([script(tmp_path, f"import os\n{body}")])
    assert (result.returncode, result.stderr) == (130, "tool.py: interrupted\n")


def test_an_ignored_sigint_stays_ignored(tmp_path):
    path = script(tmp_path, "import os\nos.kill(os.getpid(), 2)\nprint('on')")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run([path])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.returncode, result.stdout, result.stderr) == (0, "on\n", "")


FULL = "tool.py: error: standard output: No space left on device\n"
CLOSED = "tool.py: error: standard output: Bad file descriptor\n"


@pytest.mark.parametrize(
    "redirect, code, error",
    [
        (">/dev/full", 2, FULL),
        (">/dev/full 2>&1", 2, ""),
        (">&-", 2, CLOSED),
        (">&- 2>&-", 2, ""),
        ("| true; exit ${PIPESTATUS[0]}", 141, ""),
        ("2>/dev/full", 0, ""),
        ("2>&-", 0, ""),
        ("<&-", 0, "said\n"),
    ],
)
@pytest.mark.parametrize("unbuffered", [(), ("-u",)])
def test_unwritable_standard_output(tmp_path, redirect, code, error, unbuffered):
    """Unwritable standard output is an error; unwritable standard error is ignored."""
    body = "import sys\nprint('said', file=sys.stderr) if {said} else None\nfor _ in range(100_000): print('a line')"
    body = body.format(said=code == 0)
    result = run([*unbuffered, script(tmp_path, body)], redirect)
    assert (result.returncode, result.stderr) == (code, error)
    assert (result.stdout.count("a line\n") == 100_000) == (code == 0)


def test_a_full_standard_output_is_not_blamed_on_another_file(tmp_path):
    body = "try: print('a line', flush=True)\nexcept OSError: print('--output: no room')\nreturn 3"
    result = run([script(tmp_path, body)], ">/dev/full")
    assert (result.returncode, result.stderr) == (2, FULL)


@pytest.mark.parametrize("redirect", [">/dev/full", "| true; exit ${PIPESTATUS[0]}", ">&-", ""])
def test_training_continues_without_standard_output(tmp_path, redirect):
    body = """
from megatron_cream.common import console
with console.redirect_output("full", None) as terminal:
    for _ in range(10_000): print('a line', file=terminal, flush=True)
return 3"""
    result = run([script(tmp_path, body)], redirect)
    assert (result.returncode, result.stderr) == (3, "") and result.stdout in ("", "a line\n" * 10_000)


@pytest.mark.parametrize("flags", [["--help"], ["--samples", "10", "--output", "x.png"]])
def test_a_tool_that_prints_to_a_full_disk(tmp_path, flags):
    flags = [str(tmp_path / flag) if flag == "x.png" else flag for flag in flags]
    result = run(["tools/plot_positions.py", *flags], ">/dev/full")
    assert (result.returncode, result.stderr) == (2, FULL.replace("tool", "plot_positions"))


def test_a_picture_larger_than_the_file_size_limit(tmp_path):
    path = tmp_path / "x.png"
    command = f"ulimit -f 1; {sys.executable} tools/plot_positions.py --samples 10 --output {path}"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, f"plot_positions.py: error: --output {path}: File too large\n")
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    result = run([script(tmp_path, "print('x\\udcff')")])
    assert (result.returncode, result.stdout, result.stderr) == (0, "x\\udcff\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_python_without_assertions_is_rejected(command):
    result = run([command, "--help"], PYTHONOPTIMIZE="1")
    assert (result.returncode, result.stdout) == (2, "") and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"{os.path.basename(command)}: error: python -O or PYTHONOPTIMIZE: ")
