"""A folder replaces another: whenever the process is killed, one of the two has the name and is complete."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cream.checkpoint import output
from megatron_cream.common.errors import UsageError
from tests.launch import ROOT

# Overwrites the folder `name`, and kills itself instead of the call that {kill} names.
REPLACE = """
import os, signal, sys
from pathlib import Path
from megatron_cream.checkpoint import output

def killed_at(call):
    calls = []
    def counted(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return counted

exchange, function, call = sys.argv[2] == "exchange", sys.argv[3], int(sys.argv[4])
if not exchange:
    output._exchange = lambda a, b: False
where = Path if function == "rename" else output
original = getattr(where, function)
setattr(where, function, killed_at(call))
with output.new_folder(Path(sys.argv[1]), flag="--output", overwrite=True, needs_bytes=0) as folder:
    (folder / "content").write_text("new")
    output.write_manifest(folder, {})
"""


def write(path: Path, content: str) -> None:
    with output.new_folder(path, flag="--output", overwrite=True, needs_bytes=0) as folder:
        (folder / "content").write_text(content)
        output.write_manifest(folder, {})


def replace_killed(path: Path, how: str, function: str, call: int) -> None:
    command = [sys.executable, "-c", REPLACE, path, how, function, call]
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize("function, call", [("_exchange", 1), ("_sync", 1), ("_sync", 2)])
def test_a_swapped_folder_is_never_missing(tmp_path, function, call):
    path = tmp_path / "out"
    write(path, "old")
    replace_killed(path, "exchange", function, call)
    assert (path / "content").read_text() == ("new" if (function, call) == ("_sync", 2) else "old")
    output.check_unchanged(path)
    write(path, "newer")
    assert (path / "content").read_text() == "newer" and [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_without_a_swap_the_next_start_restores_it(tmp_path, call):
    """The calls of rename move the old folder away, then the new one into place; the manifest has none."""
    path = tmp_path / "out"
    write(path, "old")
    if call == 3:  # killed after both renames
        replace_killed(path, "rename", "_sync", 2)
    else:
        replace_killed(path, "rename", "rename", call)
    assert path.exists() == (call != 2)
    with (
        pytest.raises(UsageError, match="is not empty"),
        output.new_folder(path, flag="--output", overwrite=False, needs_bytes=0),
    ):
        pass
    assert (path / "content").read_text() == ("new" if call == 3 else "old")
    output.check_unchanged(path)
    write(path, "newer")
    assert (path / "content").read_text() == "newer" and [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_error_between_the_renames_restores_it(tmp_path, monkeypatch):
    path, rename = tmp_path / "out", Path.rename
    write(path, "old")
    monkeypatch.setattr(output, "_exchange", lambda a, b: False)

    def no_second(self, target):
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", no_second)
    with pytest.raises(OSError, match="No space"):
        write(path, "new")
    assert (path / "content").read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["out"]
