"""The command that preprocessing advises uses the data in the way that training accepts it."""

import itertools
import shlex
from pathlib import Path

import pytest

from megatron_cream.commands.next_step import training_on


@pytest.mark.parametrize("longest, data, short", [(4096, "data/books", None), (4095, "LONG_DATA", "data/books")])
def test_short_data_is_packed(tmp_path, longest, data, short):
    words = shlex.split(training_on(Path("data/books"), tmp_path / "tokenizer.model", longest))
    given = {flag: value for flag, value in itertools.pairwise(words) if flag.startswith("--")}
    assert given["--seq-length"] == "4096"
    assert given["--data-path"] == data and given.get("--short-data-path") == short
    assert ("--short-share" in given) == (short is not None)
